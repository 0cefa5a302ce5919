"""Two-layer MLP over the kept neurons only, with residual and bias.

    h_u = act(sum_c w1[u, c] * x[c] + b1[u])                for kept neurons u
    y[c] = residual[c] + b2[c] + sum over kept u of h_u * w2t[u, c]

The second matrix is packed transposed, so that a neuron is one contiguous row of each. With
`skip_zeros` the rows of w2t whose h_u is exactly 0 (most of them, after a ReLU) are not read, which
changes nothing in the result.

x [B, T, C] float32; w1, w2t [F, C] of one matrix dtype; b1 [F], b2 [C], residual [B, T, C] float32
or None; activation relu | silu | gelu; index int32 [B, F] ascending, of which the first count[b]
(int32 [B]) count; both None = all neurons. -> y [B, T, C] float32, rows int32 [B]: rows of w2t that
each batch row needed, summed over T.

Source: Liu et al. 2023, "Deja Vu" (kept neurons);
Mirzadeh et al. 2023, "ReLU Strikes Back" (zeros).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowc.kernels.linear import row_chunks
from shadowc.native import (
    NATIVE_ROWS,
    activate,
    activation_code,
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

_native = function("mlp", "11P 6q 4i")


def sparse_mlp_reference(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2t: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    activation: str,
    skip_zeros: bool,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op in plain torch."""
    hidden = activate(torch.nn.functional.linear(x, w1.float(), b1), activation)
    mask = keep_mask(index, count, w1.shape[0])
    kept = torch.ones_like(hidden, dtype=torch.bool)
    if mask is not None:
        kept = kept & mask[:, None]
        hidden = hidden.where(kept, 0.0)
    y = torch.nn.functional.linear(hidden, w2t.float().T, b2)
    rows = (kept & (hidden != 0) if skip_zeros else kept).sum((1, 2), dtype=torch.int32)
    return y if residual is None else residual + y, rows


def _sparse_mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2t: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    activation: str,
    skip_zeros: bool,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_rank("x", x, 3)
    batch, tokens, hidden = x.shape
    neurons = w1.shape[0]
    dtype, code = weight_dtype("w1", w1), activation_code(activation)
    check("x", x, torch.float32, batch, tokens, hidden)
    check("w1", w1, w1.dtype, neurons, hidden)
    check("w2t", w2t, w1.dtype, neurons, hidden)
    check_optional("b1", b1, torch.float32, neurons)
    check_optional("b2", b2, torch.float32, hidden)
    check_optional("residual", residual, torch.float32, batch, tokens, hidden)
    check_keep(index, count, batch, neurons)
    rows = x.new_empty(batch, dtype=torch.int32)
    if index is None and batch * tokens > NATIVE_ROWS:
        y = torch.zeros_like(x) if residual is None else residual.clone()
        flat, flat_y = x.view(-1, hidden), y.view(-1, hidden)
        rows.fill_(0 if skip_zeros else neurons * tokens)
        for part, chunk in row_chunks(w1):
            bias = None if b1 is None else b1[part]
            h = activate(torch.nn.functional.linear(flat, chunk.float(), bias), activation)
            flat_y.addmm_(h, w2t[part].float())
            if skip_zeros:
                rows += (h != 0).view(batch, -1).sum(1, dtype=torch.int32)
        return y if b2 is None else y.add_(b2), rows
    y = torch.empty_like(x)
    _native(
        x.data_ptr(),
        w1.data_ptr(),
        0,
        pointer(b1),
        w2t.data_ptr(),
        pointer(b2),
        pointer(residual),
        y.data_ptr(),
        rows.data_ptr(),
        pointer(index),
        pointer(count),
        neurons,
        1,
        batch * tokens,
        tokens,
        hidden,
        neurons,
        code,
        skip_zeros,
        torch.get_num_threads(),
        dtype,
    )
    return y, rows


def _sparse_mlp_fake(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2t: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    activation: str,
    skip_zeros: bool,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.int32)


register(
    "sparse_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2t, Tensor? b2, Tensor? residual, "
    "str activation, bool skip_zeros, Tensor? index, Tensor? count) -> (Tensor y, Tensor rows)",
    _sparse_mlp,
    _sparse_mlp_fake,
)
