"""Query, key and value projections that compute the queries of kept heads only.

    q[b, t, h*D + d] = sum_c x[b, t, c] * wq[h*D + d, c] + bq[h*D + d]    for kept heads h, else 0
    k, v: the same with wk, wv, always for every head: a head that returns later finds its past

x [B, T, C] float32; wq [H*D, C], wk and wv [G*D, C] of one matrix dtype, biases float32 or None;
index int32 [B, H] ascending, of which the first count[b] (int32 [B]) count; both None = all heads.
-> q [B, T, H*D], k and v [B, T, G*D] float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowc.errors import KernelError
from shadowc.kernels.linear import matmul
from shadowc.native import (
    NATIVE_ROWS,
    check,
    check_keep,
    check_optional,
    check_rank,
    function,
    keep_mask,
    pointer,
    register,
    weight_dtype,
)

_native = function("qkv", "12P 6q 2i")


def sparse_qkv_reference(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    bv: Tensor | None,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch."""
    linear = torch.nn.functional.linear
    q = linear(x, wq.float(), bq)
    mask = keep_mask(index, count, wq.shape[0] // head_dim)
    if mask is not None:
        q = q.where(mask.repeat_interleave(head_dim, 1)[:, None], 0.0)
    return q, linear(x, wk.float(), bk), linear(x, wv.float(), bv)


def _sparse_qkv(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    bv: Tensor | None,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_rank("x", x, 3)
    batch, tokens, hidden = x.shape
    dtype = weight_dtype("wq", wq)
    queries, keys = wq.shape[0], wk.shape[0]
    if head_dim <= 0 or queries % head_dim or keys % head_dim:
        raise KernelError(
            "argument 'head_dim' does not fit",
            expected=f"a divisor of {queries} and {keys}, the rows of wq and wk",
            got=head_dim,
        )
    heads = queries // head_dim
    check("x", x, torch.float32, batch, tokens, hidden)
    check("wq", wq, wq.dtype, queries, hidden)
    check("wk", wk, wq.dtype, keys, hidden)
    check("wv", wv, wq.dtype, keys, hidden)
    check_optional("bq", bq, torch.float32, queries)
    check_optional("bk", bk, torch.float32, keys)
    check_optional("bv", bv, torch.float32, keys)
    check_keep(index, count, batch, heads)
    if index is None and batch * tokens > NATIVE_ROWS:
        flat = x.view(batch * tokens, hidden)
        return (
            matmul(flat, wq, bq).view(batch, tokens, queries),
            matmul(flat, wk, bk).view(batch, tokens, keys),
            matmul(flat, wv, bv).view(batch, tokens, keys),
        )
    q = x.new_empty(batch, tokens, queries)
    k = x.new_empty(batch, tokens, keys)
    v = x.new_empty(batch, tokens, keys)
    _native(
        x.data_ptr(),
        wq.data_ptr(),
        pointer(bq),
        wk.data_ptr(),
        pointer(bk),
        wv.data_ptr(),
        pointer(bv),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        pointer(index),
        pointer(count),
        batch,
        tokens,
        hidden,
        heads,
        keys // head_dim,
        head_dim,
        torch.get_num_threads(),
        dtype,
    )
    return q, k, v


def _sparse_qkv_fake(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    bv: Tensor | None,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, tokens, _ = x.shape
    return (
        x.new_empty(batch, tokens, wq.shape[0]),
        x.new_empty(batch, tokens, wk.shape[0]),
        x.new_empty(batch, tokens, wv.shape[0]),
    )


register(
    "sparse_qkv(Tensor x, Tensor wq, Tensor? bq, Tensor wk, Tensor? bk, Tensor wv, Tensor? bv, "
    "int head_dim, Tensor? index, Tensor? count) -> (Tensor q, Tensor k, Tensor v)",
    _sparse_qkv,
    _sparse_qkv_fake,
)
