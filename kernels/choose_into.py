"""A whole predictor and its selection in one call: what a tap reads -> keep sets, written in place.

    code = x first^T + first_bias, or x itself       [B, 1, R]
    scores_k = code weights_k^T + biases_k           [B, L_k, N_k], k: heads, neurons, or one alone
    index_k[at_k : at_k + L_k], count_k[...] = select_above(scores_k, thresholds_k)

The same as `linear` and `select_above` for each kind; scores are never stored, and the keep sets of
all taps are one tensor that nobody has to join. For CPUs, where each small call costs more than the
work in it.
x [B, 1, C] or [B, 1, R] float32; first [R, C] and first_bias [R], or both None; weight
[L_k N_k, R]; matrices of one dtype; bias [L_k N_k], threshold [L_k] float32; sets: of each kind
index int32 [L, B, N_k] and count int32 [L, B], one after the other; at: the place of the tap's
first layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shadowc.errors import KernelError

# The reference is made of theirs.
from shadowc.kernels import linear, select_above
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


def choose_into_reference(
    x: Tensor,
    first: Tensor | None,
    first_bias: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    sets: Sequence[Tensor],
    at: Sequence[int],
) -> None:
    """The op by the ops that it is made of."""
    code = x if first is None else torch.ops.shadowc.linear(x, first, first_bias)
    for k, (weight, bias, threshold) in enumerate(zip(weights, biases, thresholds, strict=True)):
        layers = threshold.shape[0]
        scores = torch.ops.shadowc.linear(code, weight, bias).view(len(x), layers, -1)
        found = torch.ops.shadowc.select_above(scores, threshold)
        for whole, part in zip(sets[2 * k : 2 * k + 2], found, strict=True):
            whole[at[k] : at[k] + layers] = part


def _choose_into(
    x: Tensor,
    first: Tensor | None,
    first_bias: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    sets: Sequence[Tensor],
    at: Sequence[int],
) -> None:
    kinds = len(weights)
    sizes = [len(one) for one in (weights, biases, thresholds, at, sets)]
    if kinds not in (1, 2) or sizes != [kinds] * 4 + [2 * kinds]:
        raise KernelError(
            "the arguments of choose_into do not fit: a tap chooses heads, neurons or both",
            expected="1 or 2 weights; a bias, thresholds, a place and two sets for each",
            got=sizes,
        )
    check_rank("x", x, 3)
    check_rank("weight", weights[0], 2)
    batch, _, width = x.shape
    rank, matrix = weights[0].shape[1], weights[0].dtype
    dtype = weight_dtype("weight", weights[0])
    check("x", x, torch.float32, batch, 1, rank if first is None else width)
    check_optional("first", first, matrix, rank, width)
    check_optional("first_bias", first_bias, torch.float32, rank)
    fields: list[int] = []
    for k, threshold in enumerate(thresholds):
        weight, bias, index, count = weights[k], biases[k], sets[2 * k], sets[2 * k + 1]
        check_rank("index", index, 3)
        check_rank("threshold", threshold, 1)
        whole, _, units = index.shape
        layers, place = threshold.shape[0], at[k]
        check("weight", weight, matrix, layers * units, rank)
        check("bias", bias, torch.float32, layers * units)
        check("threshold", threshold, torch.float32, layers)
        check("index", index, torch.int32, whole, batch, units)
        check("count", count, torch.int32, whole, batch)
        if not 0 <= place <= whole - layers:
            raise KernelError(
                "argument 'at' does not fit", expected=f"0 to {whole - layers}", got=place
            )
        skipped = 4 * place * batch  # bytes of a count
        fields += (weight.data_ptr(), bias.data_ptr(), threshold.data_ptr(),
                   index.data_ptr() + skipped * units, count.data_ptr() + skipped,
                   layers, units)  # fmt: skip
    _native(
        x.data_ptr(),
        pointer(first),
        pointer(first_bias),
        *(fields if kinds == 2 else (*fields, *_NO_KIND)),
        batch,
        width,
        rank,
        torch.get_num_threads(),
        dtype,
    )


def _choose_into_fake(
    x: Tensor,
    first: Tensor | None,
    first_bias: Tensor | None,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    sets: Sequence[Tensor],
    at: Sequence[int],
) -> None:
    return None


register(
    "choose_into(Tensor x, Tensor? first, Tensor? first_bias, Tensor[] weights, Tensor[] biases, "
    "Tensor[] thresholds, Tensor(a!)[] sets, int[] at) -> ()",
    _choose_into,
    _choose_into_fake,
)
