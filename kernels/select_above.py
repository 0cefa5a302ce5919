"""Keep sets from thresholds: the units whose score is above that of their layer.

Nothing is ranked, so one pass over the scores is enough, and a layer may keep any number of units,
none included. NaN counts as +infinity. scores [B, L, N] float32, threshold [L] float32 -> index
int32 [L, B, N], the kept units ascending, then the others descending; count int32 [L, B]: how many
are kept.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shadowc.kernels.select import keep_sets
from shadowc.native import check, check_layout, check_rank, function, register

_native = function("select_above", "4P 3q i")


def select_above_reference(scores: Tensor, threshold: Tensor) -> Tensor:
    """The kept units as a mask: scores [..., L, N], threshold [L] -> bool [..., L, N]."""
    return (
        scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf) > threshold[:, None]
    )


def _check(scores: Tensor, threshold: Tensor, check: Callable[..., None] = check) -> None:
    check_rank("scores", scores, 3)
    check("scores", scores, torch.float32, *scores.shape)
    check("threshold", threshold, torch.float32, scores.shape[1])


def _select_above(scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    _check(scores, threshold)
    index, count = keep_sets(scores)
    _native(
        scores.data_ptr(),
        threshold.data_ptr(),
        index.data_ptr(),
        count.data_ptr(),
        *scores.shape,
        torch.get_num_threads(),
    )
    return index, count


def _select_above_cuda(scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    from shadowc.kernels.cuda.select_above import select_above

    _check(scores, threshold, check_layout)
    return select_above(scores, threshold)


def _select_above_fake(scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    return keep_sets(scores)


register(
    "select_above(Tensor scores, Tensor threshold) -> (Tensor index, Tensor count)",
    _select_above,
    _select_above_fake,
    cuda=_select_above_cuda,
)
