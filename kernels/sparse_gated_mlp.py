"""Gated MLP over the kept neurons only, with residual.

    h_u = act(sum_c w_gate[u, c] * x[c]) * (sum_c w_up[u, c] * x[c])     for kept neurons u
    y[c] = residual[c] + sum over kept u of h_u * w_downt[u, c]

The last matrix is packed transposed, so that a neuron is one contiguous row of each of the three.
With `skip_zeros` a gate that is exactly 0 (after a ReLU) skips its row of w_up too, and the rows of
w_downt whose h_u is exactly 0 are not read, which changes nothing in the result.

x [B, T, C] float32; w_gate, w_up, w_downt [F, C] of one matrix dtype; residual [B, T, C] float32 or
None; activation relu | silu | gelu; index int32 [B, F] ascending, of which the first count[b]
(int32 [B]) count; both None = all neurons. -> y [B, T, C] float32, rows int32 [B]: rows of w_downt
that each batch row needed, summed over T.

Source: Shazeer 2020, "GLU Variants Improve Transformer".
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


def sparse_gated_mlp_reference(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_downt: Tensor,
    residual: Tensor | None,
    activation: str,
    skip_zeros: bool,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The op in plain torch."""
    linear = torch.nn.functional.linear
    hidden = activate(linear(x, w_gate.float()), activation) * linear(x, w_up.float())
    mask = keep_mask(index, count, w_gate.shape[0])
    kept = torch.ones_like(hidden, dtype=torch.bool)
    if mask is not None:
        kept = kept & mask[:, None]
        hidden = hidden.where(kept, 0.0)
    y = linear(hidden, w_downt.float().T)
    rows = (kept & (hidden != 0) if skip_zeros else kept).sum((1, 2), dtype=torch.int32)
    return y if residual is None else residual + y, rows


def _sparse_gated_mlp(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_downt: Tensor,
    residual: Tensor | None,
    activation: str,
    skip_zeros: bool,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor]:
    check_rank("x", x, 3)
    batch, tokens, hidden = x.shape
    neurons = w_gate.shape[0]
    dtype, code = weight_dtype("w_gate", w_gate), activation_code(activation)
    check("x", x, torch.float32, batch, tokens, hidden)
    check("w_gate", w_gate, w_gate.dtype, neurons, hidden)
    check("w_up", w_up, w_gate.dtype, neurons, hidden)
    check("w_downt", w_downt, w_gate.dtype, neurons, hidden)
    check_optional("residual", residual, torch.float32, batch, tokens, hidden)
    check_keep(index, count, batch, neurons)
    rows = x.new_empty(batch, dtype=torch.int32)
    if index is None and batch * tokens > NATIVE_ROWS:
        y = torch.zeros_like(x) if residual is None else residual.clone()
        flat, flat_y = x.view(-1, hidden), y.view(-1, hidden)
        rows.fill_(0 if skip_zeros else neurons * tokens)
        for part, chunk in row_chunks(w_gate):
            h = activate(torch.nn.functional.linear(flat, chunk.float()), activation)
            h *= torch.nn.functional.linear(flat, w_up[part].float())
            flat_y.addmm_(h, w_downt[part].float())
            if skip_zeros:
                rows += (h != 0).view(batch, -1).sum(1, dtype=torch.int32)
        return y, rows
    y = torch.empty_like(x)
    _native(
        x.data_ptr(),
        w_gate.data_ptr(),
        w_up.data_ptr(),
        0,
        w_downt.data_ptr(),
        0,
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


def _sparse_gated_mlp_fake(
    x: Tensor,
    w_gate: Tensor,
    w_up: Tensor,
    w_downt: Tensor,
    residual: Tensor | None,
    activation: str,
    skip_zeros: bool,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(x.shape[0], dtype=torch.int32)


register(
    "sparse_gated_mlp(Tensor x, Tensor w_gate, Tensor w_up, Tensor w_downt, Tensor? residual, "
    "str activation, bool skip_zeros, Tensor? index, Tensor? count) -> (Tensor y, Tensor rows)",
    _sparse_gated_mlp,
    _sparse_gated_mlp_fake,
)
