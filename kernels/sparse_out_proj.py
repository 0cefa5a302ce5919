"""Output projection of attention over the kept heads only, with residual and bias.

    y[b, t, c] = residual[b, t, c] + bias[c]
                 + sum over kept heads h, d of ctx[b, t, h*D + d] * weight_t[h*D + d, c]

The weight is packed transposed, so that a head is D contiguous rows. ctx [B, T, H*D] float32;
weight_t [H*D, C]; bias [C], residual [B, T, C] float32 or None; index int32 [B, H] ascending, of
which the first count[b] (int32 [B]) count; both None = all heads. -> y [B, T, C] float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowc.errors import KernelError
from shadowc.kernels.linear import row_chunks
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

_native = function("out_proj", "5P q 2P 5q 2i")


def sparse_out_proj_reference(
    ctx: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    """The op in plain torch."""
    mask = keep_mask(index, count, weight_t.shape[0] // head_dim)
    if mask is not None:
        ctx = ctx.where(mask.repeat_interleave(head_dim, 1)[:, None], 0.0)
    y = torch.nn.functional.linear(ctx, weight_t.float().T, bias)
    return y if residual is None else residual + y


def _sparse_out_proj(
    ctx: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    check_rank("ctx", ctx, 3)
    batch, tokens, rows = ctx.shape
    dtype = weight_dtype("weight_t", weight_t)
    hidden = weight_t.shape[-1]
    if head_dim <= 0 or rows % head_dim:
        raise KernelError(
            "argument 'head_dim' does not fit",
            expected=f"a divisor of {rows}, the width of ctx",
            got=head_dim,
        )
    check("ctx", ctx, torch.float32, batch, tokens, rows)
    check("weight_t", weight_t, weight_t.dtype, rows, hidden)
    check_optional("bias", bias, torch.float32, hidden)
    check_optional("residual", residual, torch.float32, batch, tokens, hidden)
    check_keep(index, count, batch, rows // head_dim)
    if index is None and batch * tokens > NATIVE_ROWS:
        y = ctx.new_zeros(batch, tokens, hidden) if residual is None else residual.clone()
        flat, flat_y = ctx.view(-1, rows), y.view(-1, hidden)
        for part, chunk in row_chunks(weight_t):
            flat_y.addmm_(flat[:, part], chunk.float())
        return y if bias is None else y.add_(bias)
    y = ctx.new_empty(batch, tokens, hidden)
    _native(
        ctx.data_ptr(),
        weight_t.data_ptr(),
        pointer(bias),
        pointer(residual),
        y.data_ptr(),
        rows,
        pointer(index),
        pointer(count),
        rows // head_dim,
        head_dim,
        batch * tokens,
        tokens,
        hidden,
        torch.get_num_threads(),
        dtype,
    )
    return y


def _sparse_out_proj_fake(
    ctx: Tensor,
    weight_t: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    return ctx.new_empty((*ctx.shape[:-1], weight_t.shape[1]))


register(
    "sparse_out_proj(Tensor ctx, Tensor weight_t, Tensor? bias, Tensor? residual, int head_dim, "
    "Tensor? index, Tensor? count) -> Tensor",
    _sparse_out_proj,
    _sparse_out_proj_fake,
)
