"""Rows of matrices times one vector, for one token: qkv, the output head, the predictor.

    y[i] = norm(x) . w[row(i)] + bias[row(i)],   row(i) = index[i], or i

One token reads every weight once, so a step is as fast as memory. Many short programs of a few
rows each saturate it; a program asks for its first row before it waits for the kernel in front.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shadowc.cuda import launch, profile
from shadowc.kernels.cuda.blocks import ask_row, dots, follow, moments, normalise, rows_of
from shadowc.kernels.norm_qkv import NormQkv

WIDEST = 1024
"""Columns of a tile: four warps of 16 bytes a thread."""


def tile_width(columns: int) -> int:
    """BK: a power of two, at least 16."""
    return int(min(WIDEST, max(16, triton.next_power_of_2(columns))))


@triton.jit
def stretch(
    first, last, x_ptr, w_ptr, gain_ptr, shift_ptr, out_ptr, index_ptr, mean, scale,
    UNIT: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr,
):  # fmt: skip
    """Slots first to last of one matrix, each stored at its row's place."""
    for start in range(first, last, BN):
        slot = start + tl.arange(0, BN)
        live = slot < last
        row = rows_of(slot, live, index_ptr, UNIT)
        y = dots(w_ptr, row, live, x_ptr, C, BK)
        y = normalise(y, row, live, gain_ptr, shift_ptr, mean, scale, NORM)
        tl.store(out_ptr + row, y.to(out_ptr.dtype.element_ty), mask=live)


@triton.jit
def ask_first(first, last, w_ptr, index_ptr, UNIT: tl.constexpr, C: tl.constexpr):
    """Ask for the first row of a stretch, if it has one."""
    if first < last:
        ask_row(w_ptr, rows_of(first, True, index_ptr, UNIT), C, triton.next_power_of_2(C) // 64)


@triton.jit
def project_kernel(
    x_ptr, stats_ptr, w_ptr, gain_ptr, shift_ptr, out_ptr, eps,
    ROWS: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One matrix [ROWS, C], all rows; grid (ROWS / BN)."""
    first = tl.program_id(0) * BN
    last = tl.minimum(first + BN, ROWS)
    if PDL:
        if C >= 1024:
            ask_first(first, last, w_ptr, None, 1, C)
        follow()
    mean, scale = moments(stats_ptr, eps, C, NORM, PARTS)
    stretch(first, last, x_ptr, w_ptr, gain_ptr, shift_ptr, out_ptr, None, mean, scale,
            1, C, BN, BK, NORM)  # fmt: skip


@triton.jit
def qkv_kernel(
    x_ptr, stats_ptr, wq_ptr, gq_ptr, sq_ptr, wk_ptr, gk_ptr, sk_ptr, wv_ptr, gv_ptr, sv_ptr,
    q_ptr, k_ptr, v_ptr, index_ptr, count_ptr, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Queries of kept heads, then all keys, then all values; grid ((H + 2 G) D / BN)."""
    queries = H * D
    if index_ptr is not None:
        queries = tl.load(count_ptr) * D
    first = tl.program_id(0) * BN
    last = tl.minimum(first + BN, queries + 2 * G * D)
    q_last = tl.minimum(last, queries)
    k_first = tl.maximum(first - queries, 0)
    k_last = tl.minimum(last - queries, G * D)
    v_first = tl.maximum(first - queries - G * D, 0)
    v_last = last - queries - G * D
    if PDL:
        if C >= 1024:
            ask_first(first, q_last, wq_ptr, index_ptr, D, C)
            ask_first(k_first, k_last, wk_ptr, None, 1, C)
            ask_first(v_first, v_last, wv_ptr, None, 1, C)
        follow()
    mean, scale = moments(stats_ptr, eps, C, NORM, PARTS)
    stretch(first, q_last, x_ptr, wq_ptr, gq_ptr, sq_ptr, q_ptr, index_ptr, mean, scale,
            D, C, BN, BK, NORM)  # fmt: skip
    stretch(k_first, k_last, x_ptr, wk_ptr, gk_ptr, sk_ptr, k_ptr, None, mean, scale,
            1, C, BN, BK, NORM)  # fmt: skip
    stretch(v_first, v_last, x_ptr, wv_ptr, gv_ptr, sv_ptr, v_ptr, None, mean, scale,
            1, C, BN, BK, NORM)  # fmt: skip


def project(
    x: Tensor,
    stats: Tensor | None,
    norm: str,
    eps: float,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
) -> None:
    """out [O] = norm(x) weight^T + shift for x [C] and weight [O, C]."""
    rows, columns = weight.shape
    width = tile_width(columns)
    # Short rows: more of them, so that a program still has a tile's worth of loads in flight.
    block = profile().project_rows * WIDEST // width
    launch(
        project_kernel, (triton.cdiv(rows, block),),
        x, stats, weight, gain, shift, out, eps,
        ROWS=rows, C=columns, BN=block, BK=width, NORM=norm,
        PARTS=1 if stats is None else stats.shape[-2], warps=4, pdl=True,
    )  # fmt: skip


def qkv(a: NormQkv, q: Tensor, k: Tensor, v: Tensor) -> None:
    """Write q [H*D], k and v [G*D] of one token; q of skipped heads stays as it is."""
    columns, block = a.wq.shape[1], profile().project_rows
    rows = sum(weight.shape[0] for weight, _, _ in a.matrices)
    launch(
        qkv_kernel, (triton.cdiv(rows, block),),
        a.scaled, a.stats, *(part for matrix in a.matrices for part in matrix), q, k, v,
        a.index, a.count, a.eps,
        H=a.wq.shape[0] // a.head_dim, G=a.wk.shape[0] // a.head_dim, D=a.head_dim, C=columns,
        BN=block, BK=tile_width(columns), NORM=a.norm, PARTS=a.stats.shape[-2], warps=4, pdl=True,
    )  # fmt: skip
