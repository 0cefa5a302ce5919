"""Attention of one token a row over a static cache, for kept heads, split over the slots.

    q', k' = rotary(q), rotary(k)                        (none without cos and sin)
    cache[b, g, position] = k'[b, g], v[b, g]            for every head g, kept or not
    ctx[b, h] = sum_s softmax_s(scale q'[b, h] . K[b, g, s]) V[b, g, s],  start[b] <= s <= position

Each program takes a stretch of slots of one head of one row. The last one to arrive merges the
parts in a fixed order. The new key and value are used from registers, so nobody waits for a store.

Source: split softmax, Dao et al., "Flash-Decoding" (2023); Milakov and Gimelshein 2018.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowc.cuda import counters, launch, profile
from shadowc.kernels.cuda.blocks import follow

MOST_SPLITS = 64
SLOTS_A_SPLIT = 256


@triton.jit
def turned(pointer, d, inside, cos_ptr, sin_ptr, D: tl.constexpr):
    """fp32 [BD]: a head's vector, after rotary embedding if there is one."""
    x = tl.load(pointer + d, mask=inside, other=0.0).to(tl.float32)
    if cos_ptr is not None:
        half: tl.constexpr = D // 2
        other = tl.load(pointer + (d + half) % D, mask=inside, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + d, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + d, mask=inside, other=0.0)
        x = x * cos + tl.where(d < half, -other, other) * sin
    return x


@triton.jit
def exp2_of(x, top):
    """2^(x - top), 0 where both are -infinity."""
    return tl.exp2(x - tl.where(top == -float("inf"), 0.0, top))


@triton.jit
def attention_kernel(
    q_ptr, k_ptr, v_ptr, cos_ptr, sin_ptr, k_cache_ptr, v_cache_ptr, start_ptr, position_ptr,
    ctx_ptr, partial_ptr, arrived_ptr, index_ptr, count_ptr, scale, slots,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, SPLITS: tl.constexpr,
    BS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (SPLITS, H, B); partial [B, H, SPLITS, BD + 2], arrived [B, H] zero before and after."""
    split, place, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    head, kept = place, H
    if index_ptr is not None:
        head = tl.load(index_ptr + row * H + place)
        kept = tl.load(count_ptr + row)
    group = head // (H // G)
    position = tl.load(position_ptr).to(tl.int32)
    begin = tl.load(start_ptr + row).to(tl.int32)
    length = position + 1
    chunk = tl.cdiv(tl.cdiv(length, SPLITS), BS) * BS
    active = tl.cdiv(length, chunk)
    if split >= active:
        return
    if PDL:
        follow()  # keep sets and the position are older than the kernel in front
    d = tl.arange(0, BD)
    inside = d < D
    if cos_ptr is not None:
        cos_ptr += row * D
        sin_ptr += row * D
    cache = (row * G + group).to(tl.int64) * slots * D
    if k_ptr is not None:
        new = (row * G + group) * D
        key = turned(k_ptr + new, d, inside, cos_ptr, sin_ptr, D).to(k_cache_ptr.dtype.element_ty)
        value = tl.load(v_ptr + new + d, mask=inside, other=0.0).to(v_cache_ptr.dtype.element_ty)
        if (split == active - 1) & (head % (H // G) == 0):
            slot = cache + position.to(tl.int64) * D + d
            tl.store(k_cache_ptr + slot, key, mask=inside)
            tl.store(v_cache_ptr + slot, value, mask=inside)
    out = ctx_ptr + (row * H + head) * D + d
    if place >= kept:
        if split == 0:
            tl.store(out, tl.zeros([BD], ctx_ptr.dtype.element_ty), mask=inside)
        return
    q = turned(q_ptr + (row * H + head) * D, d, inside, cos_ptr, sin_ptr, D)
    q *= scale * 1.4426950408889634  # log2(e): the softmax is in powers of two
    top, total = -float("inf"), 0.0
    acc = tl.zeros([BD], tl.float32)
    for first in range(split * chunk, tl.minimum(split * chunk + chunk, length), BS):
        s = first + tl.arange(0, BS)
        where = cache + s.to(tl.int64)[:, None] * D + d[None, :]
        if k_ptr is not None:
            seen = (s < position) & (s >= begin)
        else:
            seen = (s <= position) & (s >= begin)
        mask = seen[:, None] & inside[None, :]
        k = tl.load(k_cache_ptr + where, mask=mask, other=0.0)
        v = tl.load(v_cache_ptr + where, mask=mask, other=0.0)
        if k_ptr is not None:
            fresh = (s == position)[:, None]
            k = tl.where(fresh, key[None, :], k)
            v = tl.where(fresh, value[None, :], v)
        k, v = k.to(tl.float32), v.to(tl.float32)
        logit = tl.sum(k * q[None, :], axis=1)
        logit = tl.where((s <= position) & (s >= begin), logit, -float("inf"))
        higher = tl.maximum(top, tl.max(logit))
        p = exp2_of(logit, higher)
        shrink = exp2_of(top, higher)
        total = total * shrink + tl.sum(p)
        acc = acc * shrink + tl.sum(v * p[:, None], axis=0)
        top = higher
    if active > 1:
        mine = partial_ptr + ((row * H + head) * SPLITS + split).to(tl.int64) * (BD + 2)
        tl.store(mine + d, acc)
        tl.store(mine + BD, top)
        tl.store(mine + BD + 1, total)
        tl.debug_barrier()
        arrived = tl.atomic_add(arrived_ptr + row * H + head, 1, sem="acq_rel")
        if arrived != active - 1:
            return
        POWER: tl.constexpr = triton.next_power_of_2(SPLITS)
        part = tl.arange(0, POWER)
        there = partial_ptr + ((row * H + head) * SPLITS + part).to(tl.int64) * (BD + 2)
        live = part < active
        tops = tl.load(there + BD, mask=live, other=-float("inf"), cache_modifier=".cg")
        totals = tl.load(there + BD + 1, mask=live, other=0.0, cache_modifier=".cg")
        accs = tl.load(there[:, None] + d[None, :], mask=live[:, None], other=0.0,
                       cache_modifier=".cg")  # fmt: skip
        weight = exp2_of(tops, tl.max(tops))
        total = tl.sum(totals * weight)
        acc = tl.sum(accs * weight[:, None], axis=0)
        tl.store(arrived_ptr + row * H + head, 0)
    acc = acc / tl.where(total == 0.0, 1.0, total)
    tl.store(out, acc.to(ctx_ptr.dtype.element_ty), mask=inside)


def attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    position: Tensor,
    scale: float,
    index: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    """ctx [B, H*D] in q's type, for q [B, H*D], k and v [B, G*D]; writes slot `position`.

    Without k and v the slot has been written.
    """
    batch, width = q.shape
    groups, slots, head_dim = k_cache.shape[1:]
    heads = width // head_dim
    power = triton.next_power_of_2(head_dim)
    settings = profile()
    splits = min(MOST_SPLITS, max(settings.attention_splits, slots // SLOTS_A_SPLIT))
    ctx = q.new_empty(batch, width)
    partial = q.new_empty(batch, heads, splits, power + 2, dtype=torch.float32)
    launch(
        attention_kernel, (splits, heads, batch),
        q, k, v, cos, sin, k_cache, v_cache, start, position, ctx, partial,
        counters(q.device, batch * heads), index, count, scale, slots,
        H=heads, G=groups, D=head_dim, BD=power, SPLITS=splits, BS=settings.attention_slots,
        warps=4, pdl=True,
    )  # fmt: skip
    return ctx
