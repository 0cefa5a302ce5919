"""Queries of kept heads, and keys and values of the heads that need them: `lazy_qkv` in one launch.

A head that lacks the current token alone (the common case) runs as in `project`: many short
programs of vector products. A head that comes back runs in fewer and wider ones, which read a tile
of its rows once and multiply it with all the tokens it lacks, on tensor cores. Those take longest,
so keys and values stand first in the grid. Programs of heads that are not needed leave at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from shadowc.cuda import launch, profile
from shadowc.kernels.cuda.blocks import ask_row, dots, follow, moments, normalise
from shadowc.kernels.cuda.project import ask_first, stretch, tile_width
from shadowc.kernels.lazy_qkv import WINDOW, Lazy, LazyQkv, Matrix

ROWS = 8
"""Rows of a program that catches up: the fewest that tensor cores take, for these end last."""

COLUMNS, STAGES = 256, 4
"""Columns that it multiplies at a time, a quarter by each of its warps; how far it reads ahead."""


@triton.jit
def rows_in_head(part, N: tl.constexpr, D: tl.constexpr, TURNED: tl.constexpr):
    """The N rows of a head's part, and which there are; with rotary, rows beside their partners."""
    i = tl.arange(0, N)
    if TURNED:
        d = part * (N // 2) + i % (N // 2)
        return d + i // (N // 2) * (D // 2), d < D // 2
    else:
        d = part * N + i
        return d, d < D


@triton.jit
def partners(y, N: tl.constexpr, T: tl.constexpr):
    """What rotary adds to y [T, N], times sin: minus the second half, then the first."""
    first, second = tl.split(tl.permute(tl.reshape(y, [T, 2, N // 2]), [0, 2, 1]))
    return tl.reshape(tl.permute(tl.join(-second, first), [0, 2, 1]), [T, N])


@triton.jit
def one_token(
    part, head, position, x_ptr, w_ptr, gain_ptr, shift_ptr, cache_ptr, cos_ptr, sin_ptr,
    mean, scale, slots,
    D: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A part of a head's key or value of the current token."""
    d, live = rows_in_head(part, BN, D, cos_ptr is not None)
    row = head * D + d
    y = dots(w_ptr, row, live, x_ptr, C, BK)
    y = normalise(y, row, live, gain_ptr, shift_ptr, mean, scale, NORM)
    y = y.to(cache_ptr.dtype.element_ty)
    if cos_ptr is not None:
        y = y.to(tl.float32)
        other = tl.reshape(partners(y[None, :], BN, 1), [BN])
        y = y * tl.load(cos_ptr + d, mask=live, other=0.0)
        y += other * tl.load(sin_ptr + d, mask=live, other=0.0)
    where = cache_ptr + (head * slots + position).to(tl.int64) * D + d
    tl.store(where, y.to(cache_ptr.dtype.element_ty), mask=live)


@triton.jit
def many_tokens(
    part, head, first, position, x_ptr, w_ptr, gain_ptr, shift_ptr, cache_ptr, window_ptr,
    moments_ptr, turns_ptr, cos_ptr, sin_ptr, mean, scale, slots,
    D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, BK: tl.constexpr, STAGES: tl.constexpr,
    W: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A part of a head's keys or values of tokens first to position.

    The current token comes from x, because others are putting it in the window; without x (nobody
    is) all come from the window.
    """
    d, live = rows_in_head(part, N, D, turns_ptr is not None)
    row = head * D + d
    slot = tl.arange(0, W)
    age = (position - slot) & (W - 1)
    token = position - age
    wanted = token >= first
    there = window_ptr + slot * C  # [W]
    if x_ptr is not None:
        there = tl.where(age == 0, x_ptr, there)
    # Every warp multiplies columns of its own: none reads what another one has read.
    warp, lane = tl.arange(0, 4), tl.arange(0, BK // 4)
    acc = tl.zeros([4, W, N], tl.float32)
    for k in tl.range(0, C, BK, num_stages=STAGES):
        col = k + warp[:, None] * (BK // 4) + lane[None, :]  # [4, BK / 4]
        inside = col < C
        where = w_ptr + row.to(tl.int64)[None, None, :] * C + col[:, :, None]
        w = tl.load(where, mask=live[None, None, :] & inside[:, :, None], other=0.0)
        mask = wanted[None, :, None] & inside[:, None, :]
        x = tl.load(there[None, :, None] + col[:, None, :], mask=mask, other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    y = tl.sum(acc, axis=0)  # [W, N]
    old = wanted
    if x_ptr is not None:
        old = wanted & (age > 0)
    means = tl.load(moments_ptr + 2 * slot, mask=old, other=0.0)
    scales = tl.load(moments_ptr + 2 * slot + 1, mask=old, other=0.0)
    if x_ptr is not None:
        means = tl.where(age == 0, mean, means)
        scales = tl.where(age == 0, scale, scales)
    if NORM == "layer":
        y -= means[:, None] * tl.load(gain_ptr + row, mask=live, other=0.0)[None, :]
    y *= scales[:, None]
    if shift_ptr is not None:
        y += tl.load(shift_ptr + row, mask=live, other=0.0).to(tl.float32)[None, :]
    y = y.to(cache_ptr.dtype.element_ty)
    if turns_ptr is not None:
        y = y.to(tl.float32)
        other = partners(y, N, W)
        at = slot * D
        cos_at, sin_at = turns_ptr + at, turns_ptr + W * D + at  # [W]
        if x_ptr is not None:
            cos_at = tl.where(age == 0, cos_ptr, cos_at)
            sin_at = tl.where(age == 0, sin_ptr, sin_at)
        mask = wanted[:, None] & live[None, :]
        y *= tl.load(cos_at[:, None] + d[None, :], mask=mask, other=0.0)
        y += other * tl.load(sin_at[:, None] + d[None, :], mask=mask, other=0.0)
    out = cache_ptr + (head * slots + token).to(tl.int64)[:, None] * D + d[None, :]
    tl.store(out, y.to(cache_ptr.dtype.element_ty), mask=wanted[:, None] & live[None, :])


@triton.jit
def keys_or_values(
    part, head, first, position, x_ptr, w_ptr, gain_ptr, shift_ptr, cache_ptr, window_ptr,
    moments_ptr, turns_ptr, cos_ptr, sin_ptr, mean, scale, slots,
    D: tl.constexpr, C: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, N: tl.constexpr,
    BM: tl.constexpr, STAGES: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """A part of a head's keys or values: D / BN parts of one token, or fewer and wider ones."""
    if first == position:
        one_token(part, head, position, x_ptr, w_ptr, gain_ptr, shift_ptr, cache_ptr, cos_ptr,
                  sin_ptr, mean, scale, slots, D, C, BN, BK, NORM)  # fmt: skip
    elif part < tl.cdiv(D, N):
        many_tokens(part, head, first, position, x_ptr, w_ptr, gain_ptr, shift_ptr, cache_ptr,
                    window_ptr, moments_ptr, turns_ptr, cos_ptr, sin_ptr, mean, scale, slots,
                    D, C, N, BM, STAGES, W, NORM)  # fmt: skip


@triton.jit
def ask_part(
    part, head, values, wk_ptr, wv_ptr, cos_ptr, C: tl.constexpr, D: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Ask for the first row of a part of a head's keys or values."""
    LINES: tl.constexpr = triton.next_power_of_2(C) // 64
    if values == 0:
        step: tl.constexpr = BN // (1 if cos_ptr is None else 2)
        ask_row(wk_ptr, head * D + part * step, C, LINES)
    else:
        ask_row(wv_ptr, head * D + part * BN, C, LINES)


@triton.jit
def is_kept(head, index_ptr, count_ptr, H: tl.constexpr, G: tl.constexpr):
    """Whether one of the query heads of a key/value head is kept: 1 or 0."""
    place = tl.arange(0, triton.next_power_of_2(H))
    unit = tl.load(index_ptr + place, mask=place < H, other=0)
    mine = (unit // (H // G) == head) & (place < tl.load(count_ptr))
    return tl.max(mine.to(tl.int32), axis=0)


@triton.jit
def lazy_qkv_kernel(
    x_ptr, stats_ptr, wq_ptr, gq_ptr, sq_ptr, wk_ptr, gk_ptr, sk_ptr, wv_ptr, gv_ptr, sv_ptr,
    q_ptr, computed_ptr, index_ptr, count_ptr, position_ptr, cos_ptr, sin_ptr, window_ptr,
    moments_ptr, filled_ptr, turns_ptr, k_cache_ptr, v_cache_ptr, eps, slots,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, STAGES: tl.constexpr, W: tl.constexpr,
    NORM: tl.constexpr, PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Keys and values, queries, and who remembers; grid ((2 G + H) D / BN + 1).

    What is read before `follow` is older than one kernel: the state was written a step ago.
    """
    SHORT: tl.constexpr = D // BN
    place = tl.program_id(0)
    position = tl.load(position_ptr).to(tl.int32)
    if place < 2 * G * SHORT:
        head, values, part = place // (2 * SHORT), place // SHORT % 2, place % SHORT
        first = tl.minimum(tl.load(filled_ptr + (position & 1) * G + head), position)
        due = position + 1 - first
        needed = 1
        if index_ptr is not None:
            needed = tl.maximum(is_kept(head, index_ptr, count_ptr, H, G), (due >= W).to(tl.int32))
        notes = (values == 0) & (part == 0)
        if (needed == 0) & (notes == 0):
            return
        if PDL:
            if C >= 1024:
                if needed != 0:
                    ask_part(part, head, values, wk_ptr, wv_ptr, cos_ptr, C, D, BN)
            follow()
        if notes:
            after = tl.where(needed != 0, position + 1, first)
            tl.store(filled_ptr + ((position + 1) & 1) * G + head, after)
            tl.store(computed_ptr + head, tl.where(needed != 0, due, 0))
        if needed != 0:
            mean, scale = moments(stats_ptr, eps, C, NORM, PARTS)
            if values == 0:
                keys_or_values(
                    part, head, first, position, x_ptr, wk_ptr, gk_ptr, sk_ptr, k_cache_ptr,
                    window_ptr, moments_ptr, turns_ptr, cos_ptr, sin_ptr, mean, scale, slots,
                    D, C, BN, BK, N, BM, STAGES, W, NORM,
                )  # fmt: skip
            else:
                keys_or_values(
                    part, head, first, position, x_ptr, wv_ptr, gv_ptr, sv_ptr, v_cache_ptr,
                    window_ptr, moments_ptr, None, None, None, mean, scale, slots,
                    D, C, BN, BK, N, BM, STAGES, W, NORM,
                )  # fmt: skip
        return
    place -= 2 * G * SHORT
    queries = H * D
    if index_ptr is not None:
        queries = tl.load(count_ptr) * D
    start = place * BN
    stop = tl.minimum(start + BN, queries)
    if PDL:
        if C >= 1024:
            ask_first(start, stop, wq_ptr, index_ptr, D, C)
        follow()
    mean, scale = moments(stats_ptr, eps, C, NORM, PARTS)
    stretch(start, stop, x_ptr, wq_ptr, gq_ptr, sq_ptr, q_ptr, index_ptr, mean, scale,
            D, C, BN, BK, NORM)  # fmt: skip
    if place == H * SHORT:
        remember(x_ptr, window_ptr, moments_ptr, turns_ptr, cos_ptr, sin_ptr, mean, scale,
                 position & (W - 1), C, D, W)  # fmt: skip


@triton.jit
def remember(
    x_ptr, window_ptr, moments_ptr, turns_ptr, cos_ptr, sin_ptr, mean, scale, slot,
    C: tl.constexpr, D: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """Put the current token in the window."""
    col = tl.arange(0, triton.next_power_of_2(C))
    x = tl.load(x_ptr + col, mask=col < C, other=0.0)
    tl.store(window_ptr + slot * C + col, x, mask=col < C)
    tl.store(moments_ptr + 2 * slot, mean)
    tl.store(moments_ptr + 2 * slot + 1, scale)
    if turns_ptr is not None:
        d = tl.arange(0, triton.next_power_of_2(D))
        cos = tl.load(cos_ptr + d, mask=d < D, other=0.0)
        sin = tl.load(sin_ptr + d, mask=d < D, other=0.0)
        tl.store(turns_ptr + slot * D + d, cos, mask=d < D)
        tl.store(turns_ptr + (W + slot) * D + d, sin, mask=d < D)


@triton.jit
def catch_up_kernel(
    wk_ptr, gk_ptr, sk_ptr, wv_ptr, gv_ptr, sv_ptr, position_ptr, window_ptr, moments_ptr,
    filled_ptr, turns_ptr, k_cache_ptr, v_cache_ptr, slots,
    G: tl.constexpr, D: tl.constexpr, C: tl.constexpr, N: tl.constexpr, BM: tl.constexpr,
    STAGES: tl.constexpr, W: tl.constexpr, NORM: tl.constexpr,
):  # fmt: skip
    """Grid (D / N, G, 2): keys, values."""
    part, head = tl.program_id(0), tl.program_id(1)
    position = tl.load(position_ptr).to(tl.int32)
    first = tl.load(filled_ptr + ((position + 1) & 1) * G + head)
    if first > position:
        return
    if tl.program_id(2) == 0:
        many_tokens(
            part, head, first, position, None, wk_ptr, gk_ptr, sk_ptr, k_cache_ptr, window_ptr,
            moments_ptr, turns_ptr, None, None, 0.0, 1.0, slots, D, C, N, BM, STAGES, W, NORM,
        )  # fmt: skip
    else:
        many_tokens(
            part, head, first, position, None, wv_ptr, gv_ptr, sv_ptr, v_cache_ptr, window_ptr,
            moments_ptr, None, None, None, 0.0, 1.0, slots, D, C, N, BM, STAGES, W, NORM,
        )  # fmt: skip


def lazy_qkv(a: LazyQkv, q: Tensor, computed: Tensor) -> None:
    """Write q [H*D] of kept heads, computed [G], the caches' row 0 and what waits."""
    lazy, columns, block = a.lazy, a.wq.shape[1], profile().project_rows
    heads, groups, short = a.wq.shape[0] // a.head_dim, lazy.groups, a.head_dim // block
    launch(
        lazy_qkv_kernel, ((2 * groups + heads) * short + 1,),
        a.scaled, a.stats, *(part for matrix in a.matrices for part in matrix), q, computed,
        a.index, a.count, lazy.position, a.cos, a.sin, lazy.window, lazy.moments, lazy.filled,
        lazy.turns, lazy.k_cache, lazy.v_cache, a.eps, lazy.k_cache.shape[2],
        H=heads, G=groups, D=a.head_dim, C=columns, BN=block, BK=tile_width(columns), N=ROWS,
        BM=COLUMNS, STAGES=STAGES, W=WINDOW, NORM=a.norm, PARTS=a.stats.shape[-2], warps=4,
        pdl=True,
    )  # fmt: skip


def catch_up(matrices: Sequence[Matrix], lazy: Lazy) -> None:
    """Write what the caches' row 0 lacks of the tokens in the window."""
    gain = matrices[0][1]
    launch(
        catch_up_kernel, (triton.cdiv(lazy.head_dim, ROWS), lazy.groups, 2),
        *(part for matrix in matrices for part in matrix), lazy.position, lazy.window,
        lazy.moments, lazy.filled, lazy.turns, lazy.k_cache, lazy.v_cache, lazy.k_cache.shape[2],
        G=lazy.groups, D=lazy.head_dim, C=lazy.window.shape[1], N=ROWS, BM=COLUMNS,
        STAGES=STAGES, W=WINDOW, NORM="rms" if gain is None else "layer", warps=4,
    )  # fmt: skip
