"""A tap's keep sets from its code, or from what it reads: outputs, thresholds and compaction.

    code = x first^T + first_bias, or x itself         [B, 1, R]
    scores_k = code weights_k^T + biases_k             [B, L_k, N_k],  k: heads, neurons, or one alone
    index_k, count_k = select_above(scores_k, thresholds_k)

The same as `linear` and `select_above` for each kind, in one call on a CPU and in two launches on a
GPU, which takes the code alone; scores are never stored.
x [B, 1, C] or [B, 1, R] float32, first [R, C] and first_bias [R] or both None, weight [L_k N_k, R],
matrices of one dtype, bias [L_k N_k], threshold [L_k] float32
-> index int32 [L_k, B, N_k], count int32 [L_k, B] of each kind, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shadowc.errors import KernelError

# The reference is made of theirs.
from shadowc.kernels import linear, select_above
from shadowc.kernels.select import keep_sets
from shadowc.native import (
    check,
    check_optional,
    check_rank,
    function,
    pointer,
    register,
    weight_dtype,
)

_ = linear, select_above
_native = function("choose", "3P 5P2q 5P2q 3q 2i")
_NO_KIND = (0,) * 7


def _check(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    first: Tensor | None = None,
    first_bias: Tensor | None = None,
) -> None:
    check_rank("x", x, 3)
    dtype, rank, width = weights[0].dtype, weights[0].shape[1], x.shape[2]
    check("x", x, torch.float32, x.shape[0], 1, rank if first is None else width)
    check_optional("first", first, dtype, rank, width)
    check_optional("first_bias", first_bias, torch.float32, rank)
    for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
        layers = threshold.shape[0]
        units = weight.shape[0] // layers
        check("weight", weight, dtype, layers * units, rank)
        check("bias", bias, bias.dtype, layers * units)
        check("threshold", threshold, torch.float32, layers)


def choose_above_reference(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    first: Tensor | None = None,
    first_bias: Tensor | None = None,
) -> list[Tensor]:
    """The op by the ops that it is made of."""
    code = x if first is None else torch.ops.shadowc.linear(x, first, first_bias)
    found: list[Tensor] = []
    for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
        scores = torch.ops.shadowc.linear(code, weight, bias)
        scores = scores.view(code.shape[0], threshold.shape[0], -1)
        found += torch.ops.shadowc.select_above(scores, threshold)
    return found


def _choose_above(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    soon: bool,
    first: Tensor | None = None,
    first_bias: Tensor | None = None,
) -> list[Tensor]:
    _check(x, weights, biases, thresholds, first, first_bias)
    if len(weights) > 2:
        raise KernelError("a tap chooses heads and neurons", expected="1 or 2", got=len(weights))
    batch, _, width = x.shape
    biases = [bias.float() for bias in biases]  # those of a GPU's programs are in half precision
    found: list[Tensor] = []
    fields: list[int] = []
    for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
        layers = threshold.shape[0]
        units = weight.shape[0] // layers
        index = threshold.new_empty((layers, batch, units), dtype=torch.int32)
        count = threshold.new_empty((layers, batch), dtype=torch.int32)
        found += index, count
        fields += (weight.data_ptr(), bias.data_ptr(), threshold.data_ptr(), index.data_ptr(),
                   count.data_ptr(), layers, units)  # fmt: skip
    _native(
        x.data_ptr(),
        pointer(first),
        pointer(first_bias),
        *(fields if len(weights) == 2 else (*fields, *_NO_KIND)),
        batch,
        width,
        weights[0].shape[1],
        torch.get_num_threads(),
        weight_dtype("weight", weights[0]),
    )
    return found


def _choose_above_cuda(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    soon: bool,
    first: Tensor | None = None,
    first_bias: Tensor | None = None,
) -> list[Tensor]:
    from shadowc.kernels.cuda.choose_above import choose_above

    if first is not None:
        raise KernelError("on a GPU the code is made before", expected="first=None", got="a matrix")
    _check(x, weights, biases, thresholds)
    return choose_above(x, weights, biases, thresholds, soon)


def _choose_above_fake(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    soon: bool,
    first: Tensor | None = None,
    first_bias: Tensor | None = None,
) -> list[Tensor]:
    found: list[Tensor] = []
    for weight, threshold in zip(weights, thresholds, strict=True):
        layers = threshold.shape[0]
        found += keep_sets(x.new_empty(x.shape[0], layers, weight.shape[0] // layers))
    return found


register(
    "choose_above(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] thresholds, bool soon, "
    "Tensor? first=None, Tensor? first_bias=None) -> Tensor[]",
    _choose_above,
    _choose_above_fake,
    cuda=_choose_above_cuda,
)
