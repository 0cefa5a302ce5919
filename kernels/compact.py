"""A mask as a keep set.

mask bool [B, N] -> index int32 [B, N]: the kept units in ascending order, then the others;
count int32 [B]: how many are kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowc.native import check_layout, check_rank, register


def compact_reference(mask: Tensor) -> tuple[Tensor, Tensor]:
    """The op in plain torch, which is also how it runs."""
    index = torch.sort(~mask, dim=1, stable=True).indices
    return index.to(torch.int32), mask.sum(1, dtype=torch.int32)


def _compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    check_rank("mask", mask, 2)
    check_layout("mask", mask, torch.bool, *mask.shape)
    return compact_reference(mask)


def _compact_fake(mask: Tensor) -> tuple[Tensor, Tensor]:
    batch, units = mask.shape
    return (
        mask.new_empty((batch, units), dtype=torch.int32),
        mask.new_empty(batch, dtype=torch.int32),
    )


register(
    "compact(Tensor mask) -> (Tensor index, Tensor count)", _compact, _compact_fake, cuda=_compact
)
