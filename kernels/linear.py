"""Dense linear layer over a weight stored once, in float32, bfloat16 or float16.

    y[m, o] = sum_i x[m, i] * weight[o, i] + bias[o]

x [..., I] float32, weight [O, I], bias [O] float32 -> y [..., O] float32. A few tokens run in the
native library, which reads the weight as it is stored. Many tokens (prefill) run as matrix products
over chunks of rows, converted to float32 while they are in cache: there is never a float32 copy of
a weight.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowc.native import (
    NATIVE_ROWS,
    check,
    check_optional,
    function,
    pointer,
    register,
    weight_dtype,
)

CHUNK_BYTES = 1 << 20
"""Size of a float32 chunk of a weight: it must stay in the cache of the cores."""


_native = function("linear", "4P 3q 2i")


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The op in plain torch."""
    return torch.nn.functional.linear(x, weight.float(), bias)


def row_chunks(weight: Tensor) -> list[tuple[slice, Tensor]]:
    """Slices of rows of a matrix [O, I], with views of them small enough to convert in cache."""
    rows = max(1, CHUNK_BYTES // (4 * max(1, weight.shape[1])))
    if weight.dtype is torch.float32:
        rows = max(1, weight.shape[0])
    return [
        (slice(start, start + rows), weight[start : start + rows])
        for start in range(0, weight.shape[0], rows)
    ]


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x weight^T + bias for many rows of x [M, I], weight [O, I] -> [M, O]."""
    out = x.new_empty(x.shape[0], weight.shape[0])
    for rows, chunk in row_chunks(weight):
        out[:, rows] = torch.nn.functional.linear(
            x, chunk.float(), None if bias is None else bias[rows]
        )
    return out


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, inputs = weight.shape
    dtype = weight_dtype("weight", weight)
    check("x", x, torch.float32, *x.shape[:-1], inputs)
    check("weight", weight, weight.dtype, rows, inputs)
    check_optional("bias", bias, torch.float32, rows)
    shape = (*x.shape[:-1], rows)
    tokens = x.shape[:-1].numel()
    if tokens > NATIVE_ROWS:
        return matmul(x.view(tokens, inputs), weight, bias).view(shape)
    out = x.new_empty(shape)
    _native(
        x.data_ptr(),
        weight.data_ptr(),
        pointer(bias),
        out.data_ptr(),
        tokens,
        rows,
        inputs,
        torch.get_num_threads(),
        dtype,
    )
    return out


def _linear_cuda(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    from shadowc.kernels.cuda.batch import project_rows
    from shadowc.kernels.cuda.project import project

    flat = x.reshape(-1, weight.shape[1])
    out = x.new_empty(*x.shape[:-1], weight.shape[0], dtype=torch.float32)
    if len(flat) == 1:
        project(flat[0], None, "none", 0.0, weight, None, bias, out)
    else:
        project_rows(flat, None, "none", 0.0, weight, None, bias, out)
    return out


def _linear_fake(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    _linear,
    _linear_fake,
    cuda=_linear_cuda,
)
