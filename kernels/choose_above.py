"""A tap's keep sets from its code, in two launches on a GPU: outputs, thresholds and compaction.

    scores_k = code weights_k^T + biases_k           [B, L_k, N_k],  k: heads, neurons, or one alone
    index_k, count_k = select_above(scores_k, thresholds_k)

The same as `linear` and `select_above` for each kind; scores are never stored.
code [B, 1, R] float32, weight [L_k N_k, R], bias [L_k N_k], threshold [L_k] float32
-> index int32 [L_k, B, N_k], count int32 [L_k, B] of each kind, one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# The op is made of theirs.
from shadowc.kernels import linear, select_above
from shadowc.kernels.select import keep_sets
from shadowc.native import check_layout, check_rank, register, weight_dtype

_ = linear, select_above


def _check(
    code: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], thresholds: Sequence[Tensor]
) -> None:
    check_rank("code", code, 3)
    check_layout("code", code, torch.float32, code.shape[0], 1, code.shape[2])
    for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
        layers = threshold.shape[0]
        units = weight.shape[0] // layers
        weight_dtype("weight", weight)
        check_layout("weight", weight, weight.dtype, layers * units, code.shape[2])
        check_layout("bias", bias, bias.dtype, layers * units)
        check_layout("threshold", threshold, torch.float32, layers)


def choose_above_reference(
    code: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], thresholds: Sequence[Tensor]
) -> list[Tensor]:
    """The op by the ops that it is made of."""
    found: list[Tensor] = []
    for weight, bias, threshold in zip(weights, biases, thresholds, strict=True):
        scores = torch.ops.shadowc.linear(code, weight, bias)
        scores = scores.view(code.shape[0], threshold.shape[0], -1)
        found += torch.ops.shadowc.select_above(scores, threshold)
    return found


def _choose_above(
    code: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    soon: bool,
) -> list[Tensor]:
    _check(code, weights, biases, thresholds)
    return choose_above_reference(code, weights, [b.float() for b in biases], thresholds)


def _choose_above_cuda(
    code: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    soon: bool,
) -> list[Tensor]:
    from shadowc.kernels.cuda.choose_above import choose_above

    _check(code, weights, biases, thresholds)
    return choose_above(code, weights, biases, thresholds, soon)


def _choose_above_fake(
    code: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    soon: bool,
) -> list[Tensor]:
    found: list[Tensor] = []
    for weight, threshold in zip(weights, thresholds, strict=True):
        layers = threshold.shape[0]
        found += keep_sets(code.new_empty(code.shape[0], layers, weight.shape[0] // layers))
    return found


register(
    "choose_above(Tensor code, Tensor[] weights, Tensor[] biases, Tensor[] thresholds, bool soon)"
    " -> Tensor[]",
    _choose_above,
    _choose_above_fake,
    cuda=_choose_above_cuda,
)
