"""The decode ops for 2 to 16 tokens at once, on tensor cores: every weight is still read once.

Rows keep different units. Of a neuron in anybody's keep set both rows of weights are read, and its
activation counts only for those who keep it, so that each row gets what it would get alone.
Projections of attention run for all heads (the union of a few rows' heads is soon all of them);
attention itself runs for each row's own heads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowc.cuda import launch
from shadowc.errors import KernelError
from shadowc.kernels.cuda.blocks import activate, follow
from shadowc.kernels.cuda.mlp import finish
from shadowc.kernels.norm_mlp import NormMlp
from shadowc.kernels.scaled_out_proj import ScaledOutProj

MOST_ROWS = 16
BLOCK_ROWS, BLOCK_COLUMNS = 32, 128
SPLITS = 8
MARKED = 1024


@triton.jit
def product(w_ptr, row, live, x_ptr, B, N: tl.constexpr, C: tl.constexpr,
            BK: tl.constexpr):  # fmt: skip
    """fp32 [BN, N]: rows [BN] of w [., C] times the rows of x [B, C]."""
    lane, b = tl.arange(0, BK), tl.arange(0, N)
    acc = tl.zeros([row.shape[0], N], tl.float32)
    for k in tl.range(0, C, BK, num_stages=4):
        inside = k + lane < C
        where = w_ptr + row.to(tl.int64)[:, None] * C + (k + lane)[None, :]
        w = tl.load(where, mask=live[:, None] & inside[None, :], other=0.0)
        there = x_ptr + b[None, :] * C + (k + lane)[:, None]
        x = tl.load(there, mask=inside[:, None] & (b < B)[None, :], other=0.0)
        acc = tl.dot(w.to(x.dtype), x, acc, input_precision="ieee")
    return acc


@triton.jit
def normalised(
    y, row, live, stats_ptr, gain_ptr, shift_ptr, eps, B,
    N: tl.constexpr, C: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What the norms of x make of y = w . gamma x, fp32 [BN, N]."""
    b = tl.arange(0, N)
    if NORM != "none":
        total = tl.zeros([N], tl.float32)
        squares = tl.zeros([N], tl.float32)
        for first in range(0, PARTS, 64):
            part = first + tl.arange(0, 64)
            where = stats_ptr + (b[None, :] * PARTS + part[:, None]) * 2
            mask = (part < PARTS)[:, None] & (b < B)[None, :]
            total += tl.sum(tl.load(where, mask=mask, other=0.0), axis=0)
            squares += tl.sum(tl.load(where + 1, mask=mask, other=0.0), axis=0)
        mean = tl.zeros([N], tl.float32)
        if NORM == "layer":
            mean = total / C
            y -= mean[None, :] * tl.load(gain_ptr + row, mask=live, other=0.0)[:, None]
        y *= tl.rsqrt(squares / C - mean * mean + eps)[None, :]
    if shift_ptr is not None:
        y += tl.load(shift_ptr + row, mask=live, other=0.0).to(tl.float32)[:, None]
    return y


@triton.jit
def project_rows_kernel(
    x_ptr, stats_ptr, w_ptr, gain_ptr, shift_ptr, out_ptr, eps, B,
    N: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out [B, ROWS]; grid (ROWS / BN)."""
    row, b = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, N)
    live = row < ROWS
    if PDL:
        follow()
    y = product(w_ptr, row, live, x_ptr, B, N, C, BK)
    y = normalised(y, row, live, stats_ptr, gain_ptr, shift_ptr, eps, B, N, C, NORM, PARTS)
    where = out_ptr + b[None, :] * ROWS + row[:, None]
    tl.store(where, y.to(out_ptr.dtype.element_ty), mask=live[:, None] & (b < B)[None, :])


@triton.jit
def out_proj_rows_kernel(
    ctx_ptr, w_ptr, bias_ptr, residual_ptr, gamma_ptr, out_ptr, scaled_ptr, stats_ptr, B,
    N: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y, scaled [B, ROWS] and stats [B, parts, 2]; grid (parts), parts = ROWS / BN."""
    part, parts = tl.program_id(0), tl.num_programs(0)
    row, b = part * BN + tl.arange(0, BN), tl.arange(0, N)
    live = row < ROWS
    if PDL:
        follow()
    y = product(w_ptr, row, live, ctx_ptr, B, N, C, BK)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + row, mask=live, other=0.0).to(tl.float32)[:, None]
    at, mask = b[None, :] * ROWS + row[:, None], live[:, None] & (b < B)[None, :]
    y += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    gamma = tl.load(gamma_ptr + row, mask=live, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, y, mask=mask)
    scaled = y * gamma[:, None]
    tl.store(scaled_ptr + at, scaled.to(scaled_ptr.dtype.element_ty), mask=mask)
    y = tl.where(mask, y, 0.0)
    where = stats_ptr + (b * parts + part) * 2
    tl.store(where, tl.sum(y, axis=0), mask=b < B)
    tl.store(where + 1, tl.sum(y * y, axis=0), mask=b < B)


@triton.jit
def mark_kernel(
    index_ptr, count_ptr, mask_ptr,
    F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Keep sets as masks int8 [B, F], an index naming every unit; grid (F / BLOCK, B)."""
    row, slot = tl.program_id(1), tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    unit = tl.load(index_ptr + row * F + slot, mask=slot < F, other=0)
    kept = (slot < tl.load(count_ptr + row)).to(tl.int8)
    tl.store(mask_ptr + row * F + unit, kept, mask=slot < F)


@triton.jit
def hidden_kernel(
    x_ptr, stats_ptr, w1_ptr, gain_ptr, shift_ptr, up_ptr, out_ptr, mask_ptr, eps, B,
    N: tl.constexpr, F: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr, ACT: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Activations [B, F], 0 for a row's skipped neurons; grid (F / BN)."""
    if PDL:
        follow()  # first of all: the masks come from the kernel in front
    row, b = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, N)
    live = row < F
    at, inside = b[None, :] * F + row[:, None], live[:, None] & (b < B)[None, :]
    kept = inside
    if mask_ptr is not None:
        kept = tl.load(mask_ptr + at, mask=inside, other=0) != 0
        live = tl.max(kept.to(tl.int32), axis=1) > 0
    h = product(w1_ptr, row, live, x_ptr, B, N, C, BK)
    h = normalised(h, row, live, stats_ptr, gain_ptr, shift_ptr, eps, B, N, C, NORM, PARTS)
    h = activate(h, ACT)
    if up_ptr is not None:
        up = product(up_ptr, row, live, x_ptr, B, N, C, BK)
        h *= normalised(up, row, live, stats_ptr, None, None, eps, B, N, C, "rms", PARTS)
    h = tl.where(kept, h, 0.0)
    tl.store(out_ptr + at, h.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def weigh_kernel(
    h_ptr, w_ptr, partial_ptr, read_ptr, mask_ptr, B,
    N: tl.constexpr, F: tl.constexpr, C: tl.constexpr, R: tl.constexpr,
    BC: tl.constexpr, SKIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rows of w2t weighted by h: partial [S, B, C], rows needed [S, B]; grid (C / BC, S)."""
    block, split, splits = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    tiles: tl.constexpr = (F + R - 1) // R
    first, last = split * tiles // splits * R, (split + 1) * tiles // splits * R
    cols, b = block * BC + tl.arange(0, BC), tl.arange(0, N)
    inside = cols < C
    if PDL:
        follow()
    acc = tl.zeros([N, BC], tl.float32)
    needed = tl.zeros([N], tl.int32)
    for start in tl.range(first, last, R, num_stages=4):
        row = start + tl.arange(0, R)
        at, there = b[:, None] * F + row[None, :], (b < B)[:, None] & (row < F)[None, :]
        h = tl.load(h_ptr + at, mask=there, other=0.0)
        wanted = there
        if SKIP:
            wanted = h != 0
        elif mask_ptr is not None:
            wanted = tl.load(mask_ptr + at, mask=there, other=0) != 0
        live = tl.max(wanted.to(tl.int32), axis=0) > 0
        needed += tl.sum(wanted.to(tl.int32), axis=1)
        where = w_ptr + row.to(tl.int64)[:, None] * C + cols[None, :]
        w = tl.load(where, mask=live[:, None] & inside[None, :], other=0.0)
        acc = tl.dot(h, w, acc, input_precision="ieee")
    at = (split * B + b[:, None]) * C + cols[None, :]
    tl.store(partial_ptr + at, acc, mask=(b < B)[:, None] & inside[None, :])
    if block == 0:
        tl.store(read_ptr + split * B + b, needed, mask=b < B)


def columns_of(batch: int) -> int:
    """N: batch rows of a tensor core's tile.

    Raises:
        KernelError: If there are more rows than these kernels are made for.
    """
    if batch > MOST_ROWS:
        raise KernelError(
            "too many rows for a decode step",
            expected=f"at most {MOST_ROWS}",
            got=batch,
            fix="generate in smaller batches",
        )
    return 16


def project_rows(
    x: Tensor,
    stats: Tensor | None,
    norm: str,
    eps: float,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
    out: Tensor,
) -> None:
    """out [B, O] = norm(x) weight^T + shift for x [B, C] and weight [O, C]."""
    rows, columns = weight.shape
    launch(
        project_rows_kernel, (triton.cdiv(rows, BLOCK_ROWS),),
        x, stats, weight, gain, shift, out, eps, len(x),
        N=columns_of(len(x)), ROWS=rows, C=columns, BN=BLOCK_ROWS, BK=BLOCK_COLUMNS,
        NORM=norm, PARTS=1 if stats is None else stats.shape[-2], warps=4, pdl=True,
    )  # fmt: skip


def out_proj_rows(a: ScaledOutProj) -> tuple[Tensor, Tensor, Tensor]:
    """y fp32 [B, C], scaled [B, C] and stats fp32 [B, parts, 2]; ctx is 0 for skipped heads."""
    batch, (rows, columns) = len(a.ctx), a.weight.shape
    parts = triton.cdiv(rows, BLOCK_ROWS)
    sizes = (batch, rows), (batch, parts, 2)
    y, stats = (a.gamma.new_empty(size, dtype=torch.float32) for size in sizes)
    scaled = a.gamma.new_empty(batch, rows)
    launch(
        out_proj_rows_kernel, (parts,),
        a.ctx, a.weight, a.bias, a.residual, a.gamma, y, scaled, stats, batch,
        N=columns_of(batch), ROWS=rows, C=columns, BN=BLOCK_ROWS, BK=BLOCK_COLUMNS,
        warps=4, pdl=True,
    )  # fmt: skip
    return y, scaled, stats


def masks(index: Tensor, count: Tensor) -> Tensor:
    """int8 [B, F]: which units are in the keep sets index [B, F], count [B]."""
    batch, units = index.shape
    mask = index.new_empty(batch, units, dtype=torch.int8)
    grid = (triton.cdiv(units, MARKED), batch)
    launch(mark_kernel, grid, index, count, mask, F=units, BLOCK=MARKED)
    return mask


def mlp_rows(a: NormMlp) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y fp32 [B, C], scaled [B, C], stats fp32 [B, parts, 2] and rows int32 [B]."""
    batch, (neurons, columns) = len(a.scaled), a.w1.shape
    mask = None
    if a.index is not None and a.count is not None:
        mask = masks(a.index, a.count)
    h = a.scaled.new_empty(batch, neurons)
    launch(
        hidden_kernel, (triton.cdiv(neurons, BLOCK_ROWS),),
        a.scaled, a.stats, a.w1, a.gain, a.shift, a.w_up, h, mask, a.eps, batch,
        N=columns_of(batch), F=neurons, C=columns, BN=BLOCK_ROWS, BK=BLOCK_COLUMNS,
        NORM=a.norm, PARTS=a.stats.shape[-2], ACT=a.activation, warps=4, pdl=True,
    )  # fmt: skip
    partial = a.stats.new_empty(SPLITS, batch, columns)
    read = a.stats.new_empty(SPLITS, batch, dtype=torch.int32)
    launch(
        weigh_kernel, (triton.cdiv(columns, 128), SPLITS),
        h, a.w2t, partial, read, mask, batch,
        N=columns_of(batch), F=neurons, C=columns, R=64, BC=128, SKIP=a.skip_zeros,
        warps=4, pdl=True,
    )  # fmt: skip
    return finish(partial, read, a.b2, a.residual, a.gamma)
