"""Quantiles of values that are never stored: counts in 65536 bins, and lines between their edges.

A bin is all floats with the same upper 16 bits (as many as bfloat16 has values): 128 an octave.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTILES = 257
_HALF = 1 << 15


class Histogram:
    """Counts of fp32 values; any order of adding gives the same."""

    def __init__(self) -> None:
        """Start from nothing."""
        self.counts = torch.zeros(2 * _HALF, dtype=torch.int64)

    def add(self, values: Tensor) -> None:
        """Count the values of a tensor of any shape."""
        bins = (_turned(values.flatten().view(torch.int32)) >> 16) + _HALF
        self.counts += torch.bincount(bins, minlength=2 * _HALF).cpu()

    def quantiles(self) -> Tensor:
        """Quantiles 0/256, 1/256, ..., 256/256 of the values, fp32 [QUANTILES], ascending."""
        reached = self.counts.cumsum(0)
        wanted = torch.linspace(0, 1, QUANTILES, dtype=torch.float64) * reached[-1]
        bins = torch.searchsorted(reached.double(), wanted.clamp(min=0.5))
        counts = self.counts[bins]
        share = (wanted - (reached[bins] - counts)) / counts
        low, high = (_turned((edge << 16).int()).view(torch.float32) for edge in
                     (bins - _HALF, bins + 1 - _HALF))  # fmt: skip
        return torch.lerp(low.double(), high.double(), share).float()


def _turned(bits: Tensor) -> Tensor:
    """Integers in the order of the floats that they are the bits of; and back."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
