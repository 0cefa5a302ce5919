"""Output projection of attention for one token over kept heads, with bias and residual.

    y[c] = residual[c] + bias[c] + sum over kept heads h, d of ctx[h*D + d] * weight[c, h*D + d]

Here the weight keeps its rows: a head is D values side by side in each of them, long enough to be
read or skipped well, and a program has the whole sum of its rows without talking to others.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowc.cuda import launch, profile
from shadowc.kernels.cuda.blocks import follow, leave
from shadowc.kernels.scaled_out_proj import ScaledOutProj

WIDTH = 512


@triton.jit
def out_proj_kernel(
    ctx_ptr, w_ptr, bias_ptr, residual_ptr, gamma_ptr, out_ptr, scaled_ptr, stats_ptr,
    index_ptr, count_ptr,
    H: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """BN rows a program; grid (C / BN)."""
    pid = tl.program_id(0)
    width = H * D
    if index_ptr is not None:
        width = tl.load(count_ptr) * D
    row = pid * BN + tl.arange(0, BN)
    live = row < C
    group, eight = tl.arange(0, BK // 8), tl.arange(0, 8)
    base = w_ptr + row.to(tl.int64)[:, None, None] * (H * D)
    if PDL:
        follow()
    acc = tl.zeros([BN, BK // 8, 8], tl.float32)
    for k in range(0, width, BK):
        at = k + group * 8
        within = at < width
        if index_ptr is not None:
            at = tl.load(index_ptr + at // D, mask=within, other=0) * D + at % D
        # Eight columns never leave a head, whose width is a multiple of 8.
        cols = tl.max_contiguous(tl.multiple_of(at[:, None] + eight[None, :], (1, 8)), (1, 8))
        mask = live[:, None, None] & within[None, :, None]
        w = tl.load(base + cols[None, :, :], mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(ctx_ptr + cols, mask=within[:, None], other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :, :]
    y = tl.sum(tl.sum(acc, axis=2), axis=1)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=live, other=0.0).to(tl.float32)
    y += tl.load(residual_ptr + row, mask=live, other=0.0).to(tl.float32)
    leave(y, row, live, pid, gamma_ptr, out_ptr, scaled_ptr, stats_ptr)


def out_proj(a: ScaledOutProj) -> tuple[Tensor, Tensor, Tensor]:
    """y fp32 [1, C], scaled [1, C] and stats fp32 [1, parts, 2] of one token."""
    columns, width = a.weight.shape
    block = profile().project_rows
    parts = triton.cdiv(columns, block)
    sizes = (1, columns), (1, parts, 2)
    y, stats = (a.gamma.new_empty(size, dtype=torch.float32) for size in sizes)
    scaled = a.gamma.new_empty(1, columns)
    launch(
        out_proj_kernel, (parts,),
        a.ctx, a.weight, a.bias, a.residual, a.gamma, y, scaled, stats, a.index, a.count,
        H=width // a.head_dim, D=a.head_dim, C=columns, BN=block,
        BK=min(WIDTH, triton.next_power_of_2(width)), warps=4, pdl=True,
    )  # fmt: skip
    return y, scaled, stats
