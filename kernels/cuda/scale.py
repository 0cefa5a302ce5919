"""What the next norm needs of x: gamma x in the type of the weights, and the sums of x and x^2."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowc.cuda import launch


@triton.jit
def scale_kernel(
    x_ptr, gamma_ptr, scaled_ptr, stats_ptr,
    C: tl.constexpr, POWER: tl.constexpr,
):  # fmt: skip
    """Grid (rows)."""
    row = tl.program_id(0)
    cols = tl.arange(0, POWER)
    inside = cols < C
    x = tl.load(x_ptr + row * C + cols, mask=inside, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    scaled = (x * gamma).to(scaled_ptr.dtype.element_ty)
    tl.store(scaled_ptr + row * C + cols, scaled, mask=inside)
    tl.store(stats_ptr + 2 * row, tl.sum(x))
    tl.store(stats_ptr + 2 * row + 1, tl.sum(x * x))


def scale(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """scaled [B, C] and stats fp32 [B, 1, 2] of x [B, C]."""
    batch, columns = x.shape
    scaled = gamma.new_empty(batch, columns)
    stats = x.new_empty(batch, 1, 2, dtype=torch.float32)
    launch(
        scale_kernel, (batch,), x, gamma, scaled, stats,
        C=columns, POWER=triton.next_power_of_2(columns), warps=8,
    )  # fmt: skip
    return scaled, stats
