"""Quantiles of values that are never stored: counts in 65536 bins, and lines between their edges.

A bin is all floats with the same upper 16 bits (as many as bfloat16 has values): 128 an octave.
"""

from __future__ import annotations

import torch
from torch import Tensor

QUANTILES = 257
_HALF = 1 << 15


def histogram(values: Tensor) -> Tensor:
    """Counts of fp32 values of any shape, int64 [BINS]; they add up."""
    bins = (_turned(values.flatten().view(torch.int32)) >> 16) + _HALF
    return torch.bincount(bins, minlength=2 * _HALF)


def quantiles(counts: Tensor) -> Tensor:
    """Quantiles 0/256, 1/256, ..., 256/256 of what was counted, fp32 [QUANTILES], ascending."""
    reached = counts.cumsum(0)
    wanted = torch.linspace(0, 1, QUANTILES, dtype=torch.float64) * reached[-1]
    bins = torch.searchsorted(reached.double(), wanted.clamp(min=0.5))
    share = (wanted - (reached[bins] - counts[bins])) / counts[bins]
    low, high = (_turned((edge << 16).int()).view(torch.float32) for edge in
                 (bins - _HALF, bins + 1 - _HALF))  # fmt: skip
    return torch.lerp(low.double(), high.double(), share).float()


def _turned(bits: Tensor) -> Tensor:
    """Integers in the order of the floats that they are the bits of; and back."""
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
