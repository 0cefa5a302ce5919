"""Keep sets of the whole model from the scores of its units, in one go.

global: each layer's `floor` best units are kept, and the remaining budget goes to the best of the
        rest over all layers: exactly `keep` units in all.
local:  layer l keeps its keep // L best units, one more in the first keep % L layers.

Ties go to the lowest layer, then to the lowest unit. NaN counts as +infinity. scores [B, L, N]
float32 -> index int32 [L, B, N] ascending, of which the first count (int32 [L, B]) count.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shadowc.errors import KernelError
from shadowc.native import check, check_layout, check_rank, function, register

_native = function("select", "3P 5q 2i")


def _best(scores: Tensor, free: Tensor, keep: int) -> Tensor:
    """Mask of the `keep` best of the last dimension among `free` ones, ties to the lowest."""
    if keep == 0:
        return torch.zeros_like(free)
    scores = scores.masked_fill(~free, -torch.inf)
    threshold = scores.topk(keep, sorted=False).values.amin(-1, keepdim=True)
    above = scores > threshold
    ties = (scores == threshold) & free
    return above | (ties & (ties.cumsum(-1) <= keep - above.sum(-1, keepdim=True)))


def select_reference(scores: Tensor, keep: int, floor: int, local: bool) -> Tensor:
    """The kept units as a mask: scores [..., L, N] -> bool [..., L, N]."""
    layers = scores.shape[-2]
    scores = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    free = torch.ones_like(scores, dtype=torch.bool)
    if local:
        each, more = divmod(keep, max(1, layers))
        first = _best(scores[..., :more, :], free[..., :more, :], each + 1) if more else None
        rest = _best(scores[..., more:, :], free[..., more:, :], each)
        return rest if first is None else torch.cat((first, rest), -2)
    own = _best(scores, free, floor)
    rest = _best(scores.flatten(-2), ~own.flatten(-2), keep - layers * floor)
    return own | rest.view_as(own)


def keep_sets(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Room for index int32 [L, B, N] and count int32 [L, B] of scores [B, L, N]."""
    batch, layers, units = scores.shape
    return (
        scores.new_empty((layers, batch, units), dtype=torch.int32),
        scores.new_empty((layers, batch), dtype=torch.int32),
    )


def _check(
    scores: Tensor, keep: int, floor: int, local: bool, check: Callable[..., None] = check
) -> None:
    check_rank("scores", scores, 3)
    check("scores", scores, torch.float32, *scores.shape)
    batch, layers, units = scores.shape
    if not 0 <= keep <= layers * units:
        raise KernelError(
            "argument 'keep' does not fit", expected=f"0 to {layers * units} units", got=keep
        )
    if not local and not (0 <= floor <= units and layers * floor <= keep):
        raise KernelError(
            "argument 'floor' does not fit",
            expected=f"0 to {min(units, keep // max(1, layers))} units a layer",
            got=floor,
        )


def _select(scores: Tensor, keep: int, floor: int, local: bool) -> tuple[Tensor, Tensor]:
    _check(scores, keep, floor, local)
    batch, layers, units = scores.shape
    index, count = keep_sets(scores)
    _native(
        scores.data_ptr(),
        index.data_ptr(),
        count.data_ptr(),
        batch,
        layers,
        units,
        keep,
        floor,
        local,
        torch.get_num_threads(),
    )
    return index, count


def _select_cuda(scores: Tensor, keep: int, floor: int, local: bool) -> tuple[Tensor, Tensor]:
    from shadowc.kernels.cuda.select import select

    _check(scores, keep, floor, local, check_layout)
    return select(scores, keep, floor, local)


def _select_fake(scores: Tensor, keep: int, floor: int, local: bool) -> tuple[Tensor, Tensor]:
    return keep_sets(scores)


register(
    "select(Tensor scores, int keep, int floor, bool local) -> (Tensor index, Tensor count)",
    _select,
    _select_fake,
    cuda=_select_cuda,
)
