"""An MLP for one token: a neuron's rows of both matrices in one go, then the sum over programs.

    h_u  = act( norm(x) . w1[u] + b1[u] ) [* norm(x) . w_up[u]]        for kept neurons u
    y[c] = residual[c] + b2[c] + sum_u h_u * w2t[u, c]

A program owns a stretch of the kept neurons and works on two at a time. It reads their rows of w1,
and of w2t only those whose h is not exactly zero, which it knows by then; meanwhile the next two
rows of w1 are on their way. Its sum over its own neurons is a row of `partial`, and a second kernel
adds the rows in a fixed order: the result is the same in every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowc.cuda import launch, profile
from shadowc.kernels.cuda.blocks import (
    activate,
    follow,
    leave,
    moments,
    normalise,
    rows_of,
    tile,
)
from shadowc.kernels.norm_mlp import NormMlp

AT_ONCE = 2
"""Neurons that a program works on at a time."""
HELD = 15360
"""Columns of sums and of rows on their way that the registers of four warps hold, twice."""
PROGRAMS = 8192
"""Columns of all programs of a multiprocessor, which are 2 to 4: short rows take more of them."""


@triton.jit
def stored_rows(w_ptr, row, live, C: tl.constexpr, BK: tl.constexpr):
    """Rows [BN] of w [., C] as they are stored: a tuple of tiles [BN, BK]."""
    lane = tl.arange(0, BK)
    tiles = ()
    for k in tl.static_range(0, C, BK):
        where = w_ptr + row.to(tl.int64)[:, None] * C + (k + lane)[None, :]
        mask = live[:, None]
        if k + BK > C:
            mask = mask & (k + lane < C)[None, :]
        tiles = tiles + (tl.load(where, mask=mask, other=0.0, eviction_policy="evict_first"),)
    return tiles


@triton.jit
def stored_vector(x_ptr, C: tl.constexpr, BK: tl.constexpr):
    """x [C] as it is stored: a tuple of [BK]."""
    lane = tl.arange(0, BK)
    parts = ()
    for k in tl.static_range(0, C, BK):
        parts = parts + (tl.load(x_ptr + k + lane, mask=k + lane < C, other=0.0),)
    return parts


@triton.jit
def products(tiles, x, BN: tl.constexpr, C: tl.constexpr, BK: tl.constexpr):
    """fp32 [BN]: rows times x, both in parts."""
    acc = tl.zeros([BN, BK], tl.float32)
    for k in tl.static_range(0, C, BK):
        acc += tiles[k // BK].to(tl.float32) * x[k // BK].to(tl.float32)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def mlp_kernel(
    x_ptr, stats_ptr, w1_ptr, gain_ptr, shift_ptr, up_ptr, w2_ptr, partial_ptr, read_ptr,
    index_ptr, count_ptr, eps,
    F: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
    PARTS: tl.constexpr, ACT: tl.constexpr, SKIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Partial sums [P, C] and rows of w2t read [P]; grid (P)."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    neurons = F
    if index_ptr is not None:
        neurons = tl.load(count_ptr)
    first = (pid.to(tl.int64) * neurons // programs).to(tl.int32)
    last = ((pid + 1).to(tl.int64) * neurons // programs).to(tl.int32)
    lane, next_slot = tl.arange(0, BK), first + tl.arange(0, BN)
    next_live = next_slot < last
    next_row = rows_of(next_slot, next_live, index_ptr, 1)
    next_w1 = stored_rows(w1_ptr, next_row, next_live, C, BK)
    if up_ptr is not None:
        next_up = stored_rows(up_ptr, next_row, next_live, C, BK)
    if PDL:
        follow()  # keep sets and weights are older than the kernel in front
    mean, scale = moments(stats_ptr, eps, C, NORM, PARTS)
    x = stored_vector(x_ptr, C, BK)
    sums = ()
    for _ in tl.static_range(0, C, BK):
        sums = sums + (tl.zeros([BK], tl.float32),)
    read = 0
    for _start in range(first, last, BN):
        row, live = next_row, next_live
        h = products(next_w1, x, BN, C, BK)
        if up_ptr is not None:
            up = products(next_up, x, BN, C, BK)
        next_slot += BN
        next_live = next_slot < last
        next_row = rows_of(next_slot, next_live, index_ptr, 1)
        next_w1 = stored_rows(w1_ptr, next_row, next_live, C, BK)
        if up_ptr is not None:
            next_up = stored_rows(up_ptr, next_row, next_live, C, BK)
        h = activate(normalise(h, row, live, gain_ptr, shift_ptr, mean, scale, NORM), ACT)
        if up_ptr is not None:
            h *= normalise(up, row, live, None, None, mean, scale, "rms")
        h = tl.where(live, h, 0.0)
        if SKIP:
            live = h != 0
        read += tl.sum(live.to(tl.int32))
        new = ()
        for k in tl.static_range(0, C, BK):
            w = tile(w2_ptr, row, live, k, lane, C, BK)
            new = new + (sums[k // BK] + tl.sum(w * h[:, None], axis=0),)
        sums = new
    for k in tl.static_range(0, C, BK):
        tl.store(partial_ptr + pid * C + k + lane, sums[k // BK], mask=k + lane < C)
    tl.store(read_ptr + pid, read)


@triton.jit
def finish_kernel(
    partial_ptr, read_ptr, bias_ptr, residual_ptr, gamma_ptr, out_ptr, scaled_ptr, stats_ptr,
    rows_ptr, B,
    P: tl.constexpr, C: tl.constexpr, R: tl.constexpr, BC: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Sum of partial [P, B, C] over P, with bias and residual; grid (C / BC, B)."""
    block, parts, b = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    cols = block * BC + tl.arange(0, BC)
    inside = cols < C
    if PDL:
        follow()
    acc = tl.zeros([R, BC], tl.float32)
    for start in tl.static_range(0, P, R):
        other = start + tl.arange(0, R)
        where = partial_ptr + (other * B + b)[:, None] * C + cols[None, :]
        acc += tl.load(where, mask=(other < P)[:, None] & inside[None, :], other=0.0)
    y = tl.sum(acc, axis=0)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        y += tl.load(residual_ptr + b * C + cols, mask=inside, other=0.0).to(tl.float32)
    if gamma_ptr is not None:
        leave(y, cols, inside, block, gamma_ptr, out_ptr + b * C, scaled_ptr + b * C,
              stats_ptr + b * parts * 2)  # fmt: skip
    else:
        tl.store(out_ptr + b * C + cols, y, mask=inside)
    if read_ptr is not None:
        if block == 0:
            POWER: tl.constexpr = triton.next_power_of_2(P)
            part = tl.arange(0, POWER)
            read = tl.load(read_ptr + part * B + b, mask=part < P, other=0)
            tl.store(rows_ptr + b, tl.sum(read))


def finish(
    partial: Tensor, read: Tensor, bias: Tensor | None, residual: Tensor, gamma: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y fp32 [B, C], scaled [B, C], stats fp32 [B, parts, 2] and rows int32 [B] of [P, B, C]."""
    programs, batch, columns = partial.shape
    block = profile().finish_columns
    parts = triton.cdiv(columns, block)
    y, stats = (partial.new_empty(size) for size in ((batch, columns), (batch, parts, 2)))
    scaled, rows = gamma.new_empty(batch, columns), read.new_empty(batch)
    launch(
        finish_kernel, (parts, batch),
        partial, read, bias, residual, gamma, y, scaled, stats, rows, batch,
        P=programs, C=columns, R=min(128, triton.next_power_of_2(programs)), BC=block,
        warps=4, pdl=True,
    )  # fmt: skip
    return y, scaled, stats, rows


def mlp(a: NormMlp) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y fp32 [1, C], scaled [1, C], stats fp32 [1, parts, 2], rows int32 [1] of one token."""
    return finish(*sums(a), a.b2, a.residual, a.gamma)


def sums(a: NormMlp) -> tuple[Tensor, Tensor]:
    """Partial sums fp32 [P, 1, C], and rows read int32 [P, 1]: what `finish` adds up."""
    neurons, columns = a.w1.shape
    # As many programs as fit a multiprocessor at once: a second wave of a few would take as long.
    fits = columns + (columns if a.w_up is None else 2 * columns) <= HELD
    warps, each = (4, min(4, max(2, PROGRAMS // columns))) if fits else (8, 1)
    width = min(256 * warps, max(16, triton.next_power_of_2(columns)))
    programs = each * profile().multiprocessors
    partial = a.stats.new_empty(programs, 1, columns)
    read = a.stats.new_empty(programs, 1, dtype=torch.int32)
    launch(
        mlp_kernel, (programs,),
        a.scaled, a.stats, a.w1, a.gain, a.shift, a.w_up, a.w2t, partial, read, a.index, a.count,
        a.eps,
        F=neurons, C=columns, BN=AT_ONCE, BK=width, NORM=a.norm, PARTS=a.stats.shape[-2],
        ACT=a.activation, SKIP=a.skip_zeros, warps=warps, pdl=True,
    )  # fmt: skip
    return partial, read
