"""What the decode kernels are built from: prefetch, norms that cost nothing, rows, activations.

The norm of a layer costs no pass of its own, because it is linear but for two numbers:

    w . layer_norm(x) + b  =  (w . gamma x - mean * gain) / std + shift
    gain = w . gamma,  shift = w . beta + b                                 (constants of a row)

Whoever makes x also leaves `scaled` = gamma x in the type of the weights and `stats`, the sums of x
and x^2 in parts; the next projection reads its rows once and applies both numbers at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def follow():
    """Wait for the kernel in front, then let the one behind start its own preparations.

    In this order everything before the kernel in front is complete when the one behind starts,
    so that what is older than one kernel (weights, keep sets) may be read before `follow`.
    """
    gdc_wait()
    gdc_launch_dependents()


@triton.jit
def ask_row(w_ptr, row, C: tl.constexpr, LINES: tl.constexpr):
    """Ask for row `row` of w [., C] to be brought to the L2 cache; LINES is a power of two."""
    ask(w_ptr + row.to(tl.int64) * C, C - 1, LINES)


@triton.jit
def ask(w_ptr, last, LINES: tl.constexpr):
    """Ask for the elements up to `last` to be brought to the L2 cache; LINES is a power of two."""
    size: tl.constexpr = w_ptr.dtype.element_ty.primitive_bitwidth // 8
    each: tl.constexpr = 128 // size
    line = tl.minimum(tl.arange(0, LINES) * each, last)
    where = (w_ptr + line).to(tl.int64)
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [where], tl.int32, False, 1
    )


@triton.jit
def rows_of(slot, live, index_ptr, UNIT: tl.constexpr):
    """Rows of the kept slots: a unit is UNIT rows; without an index every row is kept."""
    row = slot
    if index_ptr is not None:
        row = tl.load(index_ptr + slot // UNIT, mask=live, other=0) * UNIT + slot % UNIT
    return row


@triton.jit
def tile(w_ptr, row, live, k, lane, C: tl.constexpr, BK: tl.constexpr):
    """fp32 [BN, BK]: columns k.. of rows [BN]; rows that are not live are not read."""
    where = w_ptr + row.to(tl.int64)[:, None] * C + (k + lane)[None, :]
    mask = live[:, None]
    if k + BK > C:
        mask = mask & (k + lane < C)[None, :]
    return tl.load(where, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)


@triton.jit
def vector(x_ptr, k, lane, C: tl.constexpr, BK: tl.constexpr):
    """fp32 [BK]: x[k:k + BK]."""
    if k + BK > C:
        return tl.load(x_ptr + k + lane, mask=k + lane < C, other=0.0).to(tl.float32)
    else:
        return tl.load(x_ptr + k + lane).to(tl.float32)


@triton.jit
def dots(w_ptr, row, live, x_ptr, C: tl.constexpr, BK: tl.constexpr):
    """fp32 [BN]: rows [BN] of w times x."""
    lane = tl.arange(0, BK)
    acc = tl.zeros([row.shape[0], BK], tl.float32)
    for k in tl.static_range(0, C, BK):
        acc += tile(w_ptr, row, live, k, lane, C, BK) * vector(x_ptr, k, lane, C, BK)[None, :]
    return tl.sum(acc, axis=1)


@triton.jit
def moments(stats_ptr, eps, C: tl.constexpr, NORM: tl.constexpr, PARTS: tl.constexpr):
    """Mean and 1/std of x [C] from `stats` [PARTS, 2]; (0, 1) without a norm."""
    mean, scale = 0.0, 1.0
    if NORM != "none":
        POWER: tl.constexpr = triton.next_power_of_2(PARTS)
        part = tl.arange(0, POWER)
        squares = tl.load(stats_ptr + 2 * part + 1, mask=part < PARTS, other=0.0)
        if NORM == "layer":
            mean = tl.sum(tl.load(stats_ptr + 2 * part, mask=part < PARTS, other=0.0)) / C
        scale = tl.rsqrt(tl.sum(squares) / C - mean * mean + eps)
    return mean, scale


@triton.jit
def normalise(y, row, live, gain_ptr, shift_ptr, mean, scale, NORM: tl.constexpr):
    """What norm and bias make of y = w . gamma x, for rows [BN]."""
    if NORM == "layer":
        y -= mean * tl.load(gain_ptr + row, mask=live, other=0.0)
    if NORM != "none":
        y *= scale
    if shift_ptr is not None:
        y += tl.load(shift_ptr + row, mask=live, other=0.0).to(tl.float32)
    return y


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation by its name; `none` leaves x as it is."""
    if ACT == "relu":
        x = tl.maximum(x, 0.0)
    if ACT == "silu":
        x = x * tl.sigmoid(x)
    if ACT == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    return x


@triton.jit
def leave(y, cols, inside, part, gamma_ptr, out_ptr, scaled_ptr, stats_ptr):
    """Store y of columns `cols`, and what the next norm needs of it."""
    tl.store(out_ptr + cols, y, mask=inside)
    gamma = tl.load(gamma_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    tl.store(scaled_ptr + cols, (y * gamma).to(scaled_ptr.dtype.element_ty), mask=inside)
    y = tl.where(inside, y, 0.0)
    tl.store(stats_ptr + 2 * part, tl.sum(y))
    tl.store(stats_ptr + 2 * part + 1, tl.sum(y * y))
