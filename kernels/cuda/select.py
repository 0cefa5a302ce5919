"""Keep sets of the whole model: scores [B, L, N] float32 -> index int32 [L, B, N], count [L, B].

A layer keeps its best units, so all that matters is how many. With n(t) the units of a layer that
score at least t, and g the highest score at which the budget is used up,

    sum_l max(floor, n_l(g)) >= keep,

layer l keeps its units above min(g, f_l), f_l being its floor-th best score, and of those that
equal it so many that the sum is exactly `keep`, lowest layers first. g and all f_l are found
together. A score becomes an integer of the same order, which is read in three passes over all
units, each with many programs a layer (a launch is the only barrier between programs):

    bins:    256 bins of 1/4 octave (8 octaves below 2^-15 and from 2^9 on): 21 or 26 bits are left
    refine:  8192 bins within one of these, another one for each layer:       8 or 13 bits are left
    refine:  8192 bins within one of these: one bin is one score

Every program reads the counts of the pass before and draws the conclusions itself, which takes
less time than a launch. The last pass has counted the units above and at the threshold of each
layer, so ties need no pass of their own. Counts are integers: any order of adding gives the same.

The first pass counts by votes of a warp, as its bins are few and crowded. The others count by
atomics, as few units are left: about 1 in 20 after the first pass, a handful after the second.
What equals the best one in a program is added up before, because atomics that meet at one address
queue up, and many equal scores (zeros) would be slow.

A model of few units (heads) is one program a row, with a search bit by bit in place of the passes.
`local` is the same with floors of keep // L or one more, and without g.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowc.cuda import launch, profile
from shadowc.kernels.select import keep_sets

CHUNK = 8192  # units of one program; a power of two, and its counts fit 16 bits
TILE = 16384  # units of all layers, padded to powers of two, that one program handles alone

_WARPS = 16
_TABLE = tl.constexpr(64 + 8192)  # counters of a layer and pass: 64 sums of 128, then all of them


@triton.jit
def ordered(score):
    """Integers in the order of the scores: NaN as +infinity, and -0.0 as 0.0."""
    bits = score.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    nan = size > 0x7F800000
    size = tl.where(nan, 0x7F800000, size)
    return tl.where((bits < 0) & (nan == 0), -size, size)


@triton.jit
def bin_of(key):
    """Bins of the first pass, 3 to 252: those of the exponents 112 to 135 are 1/4 octave wide."""
    size = tl.where(key < 0, ~key, key)
    octaves = size >> 26
    code = tl.minimum(tl.maximum((size >> 21) - 448, 0), 96)
    code += tl.minimum(octaves, 14) + tl.maximum(octaves - 17, 0)
    return tl.where(key < 0, 127 - code, 128 + code)


@triton.jit
def range_of(bin):
    """Lowest key in a bin of the first pass, and how many bits tell the keys in it apart."""
    code = tl.where(bin < 128, 127 - bin, bin - 128)
    fine = (code >= 14) & (code < 110)
    bits = tl.where(fine, 21, 26)
    outer = tl.where(code < 14, code, code - 93) << 26
    low = tl.where(fine, (code + 434) << 21, outer)
    return tl.where(bin < 128, -low - (1 << bits), low), bits


@triton.jit
def wanted(layer, keep, floor, L: tl.constexpr, LOCAL: tl.constexpr):
    """How many units a layer keeps at least; in local mode, exactly."""
    least = layer * 0 + floor
    if LOCAL:
        least = keep // L + (layer < keep % L).to(tl.int32)
    return tl.where(layer < L, least, 0)


@triton.jit
def of_layer(values, layer, LP: tl.constexpr):
    """One of LP values."""
    return tl.sum(tl.where(tl.arange(0, LP) == layer, values, 0), axis=0)


@triton.jit
def pick(counts, above, within, least, keep, W: tl.constexpr, LOCAL: tl.constexpr):
    """The digit of each layer's threshold. Digits are told by slots, the highest digit first.

    Args:
        counts: Units by slot [LP, W].
        above: Units above all of them [LP].
        within: Whether the layer's threshold is g as far as is known [LP].
        least: Units to keep at least [LP].
        keep: Budget of all layers.
        W: Number of slots.
        LOCAL: Whether there is no g.

    Returns:
        Slot, units above it, units at it, and whether it is that of g [LP].
    """
    upward = above[:, None] + tl.cumsum(counts, axis=1)  # [LP, W]
    slot = tl.sum((upward < least[:, None]).to(tl.int32), axis=1)
    if not LOCAL:
        kept = tl.where(within[:, None], tl.maximum(upward, least[:, None]), least[:, None])
        best = tl.sum((tl.sum(kept, axis=0) < keep).to(tl.int32), axis=0)
        slot = tl.where(within, tl.maximum(slot, best), slot)
        within = within & (slot == best)
    slots = tl.arange(0, W)[None, :]
    at = tl.sum(tl.where(slots == slot[:, None], counts, 0), axis=1)
    above += tl.sum(tl.where(slots < slot[:, None], counts, 0), axis=1)
    return slot, above, at, within


@triton.jit
def descend(
    table_ptr,
    state_ptr,
    row,
    keep,
    floor,
    STEP: tl.constexpr,
    L: tl.constexpr,
    LP: tl.constexpr,
    LOCAL: tl.constexpr,
):
    """What a pass of `refine` tells of all layers: digit, above, at and within as in `pick`.

    The state before it, `code` and `above`, is in memory: a code is the bin of the first pass, and
    after STEP 0 its digit below.
    """
    layer = tl.arange(0, LP)
    live = layer < L
    least = wanted(layer, keep, floor, L, LOCAL)
    place = (row * L + layer).to(tl.int64)
    state = state_ptr + place * 4 + STEP * 2
    code = tl.load(state, mask=live, other=-1)
    above = tl.load(state + 1, mask=live, other=0)
    # Thresholds are at most g. If all are below it, floors are the whole budget, and g is anything.
    within = live & (code == tl.max(code, axis=0))
    table = table_ptr + place * (2 * _TABLE) + STEP * _TABLE  # [LP]
    where = table[:, None] + tl.arange(0, 64)[None, :]
    counts = tl.load(where, mask=live[:, None], other=0)
    high, above, at, within = pick(counts, above, within, least, keep, 64, LOCAL)
    where = (table + 64 + high * 128)[:, None] + tl.arange(0, 128)[None, :]
    counts = tl.load(where, mask=live[:, None], other=0)
    low, above, at, within = pick(counts, above, within, least, keep, 128, LOCAL)
    return 8191 - high * 128 - low, above, at, within


@triton.jit
def sizes(above, at, within, least, keep, LOCAL: tl.constexpr):
    """How many units each layer keeps [LP]: ties with g go to the lowest layers."""
    size = least
    if not LOCAL:
        size = tl.where(within, tl.maximum(above, least), least)
        ties = tl.where(within, tl.maximum(above + at, least), least) - size
        left = keep - tl.sum(size, axis=0) - (tl.cumsum(ties, axis=0) - ties)
        size += tl.minimum(tl.maximum(left, 0), ties)
    return size


@triton.jit
def bins_kernel(
    scores_ptr, first_ptr, table_ptr,
    L: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr
):  # fmt: skip
    """First pass: units of a chunk down to each bin, the highest first. Clears the other passes."""
    chunk, layer, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (row * L + layer).to(tl.int64)
    lane = tl.arange(0, CHUNK)
    unit = chunk * CHUNK + lane
    live = unit < N
    key = ordered(tl.load(scores_ptr + place * N + unit, mask=live, other=0.0))
    SHARE: tl.constexpr = (2 * _TABLE + CHUNKS - 1) // CHUNKS
    for start in tl.static_range(0, SHARE, CHUNK):
        counter = chunk * SHARE + start + lane
        mine = (start + lane < SHARE) & (counter < 2 * _TABLE)
        tl.store(table_ptr + place * (2 * _TABLE) + counter, lane * 0, mask=mine)
    upward = tl.cumsum(tl.histogram(255 - bin_of(key), 256, mask=live), axis=0)
    tl.store(first_ptr + (place * CHUNKS + chunk) * 256 + tl.arange(0, 256), upward.to(tl.int16))


@triton.jit
def first_bin(
    first_ptr, row, layer, keep, floor,
    L: tl.constexpr, LP: tl.constexpr, CHUNKS: tl.constexpr, LOCAL: tl.constexpr
):  # fmt: skip
    """Bin of one layer's threshold in the first pass, and the layer's units above it."""
    slots = tl.arange(0, 256)
    first_ptr += row.to(tl.int64) * (L * CHUNKS * 256)
    own = tl.zeros([256], tl.int32)
    for chunk in range(CHUNKS):
        own += tl.load(first_ptr + (layer * CHUNKS + chunk) * 256 + slots).to(tl.int32)
    least = wanted(layer, keep, floor, L, LOCAL)
    slot = tl.sum((own < least).to(tl.int32), axis=0)
    if not LOCAL:
        layers = tl.arange(0, LP)
        where = first_ptr + (layers * (CHUNKS * 256))[:, None] + slots[None, :]
        upward = tl.zeros([LP, 256], tl.int32)
        for chunk in range(CHUNKS):
            counts = tl.load(where + chunk * 256, mask=(layers < L)[:, None], other=0)
            upward += counts.to(tl.int32)
        kept = tl.maximum(upward, wanted(layers, keep, floor, L, LOCAL)[:, None])
        slot = tl.maximum(slot, tl.sum((tl.sum(kept, axis=0) < keep).to(tl.int32), axis=0))
    slot = tl.maximum(slot, 3)  # that of +infinity
    return 255 - slot, tl.sum(tl.where(slots == slot - 1, own, 0), axis=0)


@triton.jit
def refine_kernel(
    scores_ptr, first_ptr, table_ptr, state_ptr, keep, floor,
    STEP: tl.constexpr, L: tl.constexpr, LP: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr, LOCAL: tl.constexpr
):  # fmt: skip
    """Second (STEP 0) and third pass: units by 13 bits more, of those in the bin found so far."""
    chunk, layer, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    place = (row * L + layer).to(tl.int64)
    unit = chunk * CHUNK + tl.arange(0, CHUNK)
    key = ordered(tl.load(scores_ptr + place * N + unit, mask=unit < N, other=0.0))
    if STEP == 0:
        code, above = first_bin(first_ptr, row, layer, keep, floor, L, LP, CHUNKS, LOCAL)
        low, bits = range_of(code)
        shift = bits - 13
    else:
        code = tl.load(state_ptr + place * 4)
        digits, aboves, _, _ = descend(table_ptr, state_ptr, row, keep, floor, 0, L, LP, LOCAL)
        digit, above = of_layer(digits, layer, LP), of_layer(aboves, layer, LP)
        low, bits = range_of(code)
        bits -= 13
        low += digit << bits
        code = code * 8192 + digit
        shift = 0
    if chunk == 0:
        tl.store(state_ptr + place * 4 + STEP * 2, code)
        tl.store(state_ptr + place * 4 + STEP * 2 + 1, above)
    found = (unit < N) & (key >= low) & (key <= low + ((1 << bits) - 1))
    slot = 8191 - ((key - low) >> shift)
    best = tl.min(tl.where(found, slot, 8191), axis=0)
    equal = tl.sum((found & (slot == best)).to(tl.int32), axis=0)
    other = found & (slot != best)
    table_ptr += place * (2 * _TABLE) + STEP * _TABLE
    tl.atomic_add(table_ptr + (best >> 7), equal, mask=equal > 0, sem="relaxed")
    tl.atomic_add(table_ptr + 64 + best, equal, mask=equal > 0, sem="relaxed")
    tl.atomic_add(table_ptr + (slot >> 7), 1, mask=other, sem="relaxed")
    tl.atomic_add(table_ptr + 64 + slot, 1, mask=other, sem="relaxed")


@triton.jit
def emit_kernel(
    scores_ptr, table_ptr, state_ptr, index_ptr, count_ptr, keep, floor,
    L: tl.constexpr, LP: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, LOCAL: tl.constexpr
):  # fmt: skip
    """Thresholds and sizes, then the units of a chunk: kept ones to the front of the layer's."""
    chunk, layer, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    here = (row * L + layer).to(tl.int64)
    scores_ptr += here * N
    lane = tl.arange(0, CHUNK)
    unit = chunk * CHUNK + lane
    live = unit < N
    key = ordered(tl.load(scores_ptr + unit, mask=live, other=0.0))
    code = tl.load(state_ptr + here * 4 + 2)
    digits, aboves, ats, within = descend(table_ptr, state_ptr, row, keep, floor, 1, L, LP, LOCAL)
    least = wanted(tl.arange(0, LP), keep, floor, L, LOCAL)
    size = of_layer(sizes(aboves, ats, within, least, keep, LOCAL), layer, LP)
    spare = size - of_layer(aboves, layer, LP)  # units at the threshold that are kept
    threshold, bits = range_of(code >> 13)
    threshold += ((code & 8191) << (bits - 13)) + of_layer(digits, layer, LP)
    better = tl.zeros([CHUNK], tl.int32)
    equal = tl.zeros([CHUNK], tl.int32)
    for earlier in range(chunk):
        their = ordered(tl.load(scores_ptr + earlier * CHUNK + lane))
        better += (their > threshold).to(tl.int32)
        equal += (their == threshold).to(tl.int32)
    before, ties = tl.sum(better, axis=0), tl.sum(equal, axis=0)
    # Both counts in one scan: a chunk has fewer than 1 << 15 units.
    both = (live & (key > threshold)).to(tl.int32)
    both += (live & (key == threshold)).to(tl.int32) << 16
    both = tl.cumsum(both, axis=0)
    ties += both >> 16
    place = before + (both & 0xFFFF) + tl.minimum(ties, spare)  # units kept up to here
    kept = (key > threshold) | ((key == threshold) & (ties <= spare))
    place = tl.where(kept, place - 1, size + unit - place)
    out = (layer * tl.num_programs(2) + row).to(tl.int64)
    tl.store(index_ptr + out * N + place, unit, mask=live)
    if chunk == 0:
        tl.store(count_ptr + out, size)


@triton.jit
def small_kernel(
    scores_ptr, index_ptr, count_ptr, keep, floor,
    L: tl.constexpr, LP: tl.constexpr, N: tl.constexpr, NP: tl.constexpr, LOCAL: tl.constexpr
):  # fmt: skip
    """All of it for one row, if its units fit one program."""
    row = tl.program_id(0)
    layer, unit = tl.arange(0, LP), tl.arange(0, NP)
    live = (layer < L)[:, None] & (unit < N)[None, :]  # [LP, NP]
    at = row.to(tl.int64) * (L * N) + layer[:, None] * N + unit[None, :]
    key = ordered(tl.load(scores_ptr + at, mask=live, other=0.0))
    key = tl.where(live, key, -0x80000000)
    least = wanted(layer, keep, floor, L, LOCAL)
    own = tl.full([LP], -0x80000000, tl.int32)  # the highest key that `least` units reach
    best = tl.min(own, axis=0)  # g
    bit = best  # the sign first: 0 is the greater one of it
    for _ in range(32):
        try_own, try_best = own ^ bit, best ^ bit
        both = (key >= try_own[:, None]).to(tl.int32)
        if not LOCAL:
            both += (key >= try_best).to(tl.int32) << 16
        upward = tl.sum(both, axis=1)
        own = tl.where((upward & 0xFFFF) >= least, try_own, own)
        if not LOCAL:
            total = tl.sum(tl.maximum(upward >> 16, least), axis=0)
            best = tl.where(total >= keep, try_best, best)
        bit = (bit >> 1) & 0x7FFFFFFF
    threshold = own
    if not LOCAL:
        threshold = tl.minimum(own, best)
    both = (key > threshold[:, None]).to(tl.int32)
    both += (key == threshold[:, None]).to(tl.int32) << 16
    counts = tl.sum(both, axis=1)
    above, equal = counts & 0xFFFF, counts >> 16
    size = sizes(above, equal, threshold == best, least, keep, LOCAL)
    both = tl.cumsum(both, axis=1)
    ties = both >> 16
    spare = (size - above)[:, None]
    place = (both & 0xFFFF) + tl.minimum(ties, spare)
    kept = (key > threshold[:, None]) | ((key == threshold[:, None]) & (ties <= spare))
    place = tl.where(kept, place - 1, size[:, None] + unit[None, :] - place)
    out = layer.to(tl.int64) * tl.num_programs(0) + row
    tl.store(index_ptr + out[:, None] * N + place, unit[None, :], mask=live)
    tl.store(count_ptr + out, size, mask=layer < L)


@triton.jit
def fence_kernel(count_ptr):
    """Nothing: a kernel between keep sets and whoever reads them before it waits (`follow`)."""


def fence(count: Tensor) -> None:
    """Let what comes next read keep sets before it waits for the kernel in front of it."""
    if profile().pdl:
        launch(fence_kernel, (1,), count, warps=1)


def select(scores: Tensor, keep: int, floor: int, local: bool) -> tuple[Tensor, Tensor]:
    """Keep sets of all layers; the caller has checked the arguments.

    Args:
        scores: [B, L, N] float32, contiguous.
        keep: Units to keep in all, 0 to L * N.
        floor: Units that each layer keeps at least; of no meaning if `local`.
        local: Whether each layer keeps keep // L units, one more in the first keep % L.

    Returns:
        index int32 [L, B, N]: the kept units ascending, then the others ascending; and how many
        are kept, count int32 [L, B].
    """
    batch, layers, units = scores.shape
    index, count = keep_sets(scores)
    shape = {"L": layers, "LP": triton.next_power_of_2(layers), "N": units, "LOCAL": local}
    padded = triton.next_power_of_2(units)
    if shape["LP"] * padded <= TILE:
        launch(
            small_kernel, (batch,), scores, index, count, keep, floor,
            warps=_WARPS, NP=padded, **shape
        )  # fmt: skip
        fence(count)
        return index, count
    # Short layers give few programs: smaller ones are faster then (24 x 8192: 24 instead of 40 us).
    size, warps = (CHUNK, _WARPS) if padded > CHUNK else (CHUNK // 4, _WARPS // 2)
    chunk = max(32 * warps, min(size, padded))  # no fewer than threads
    chunks = triton.cdiv(units, chunk)
    first = scores.new_empty((batch, layers, chunks, 256), dtype=torch.int16)
    table = scores.new_empty((batch, layers, 2, _TABLE.value), dtype=torch.int32)
    state = scores.new_empty((batch, layers, 2, 2), dtype=torch.int32)
    grid = (chunks, layers, batch)
    launch(
        bins_kernel, grid, scores, first, table,
        warps=warps, L=layers, N=units, CHUNK=chunk, CHUNKS=chunks
    )  # fmt: skip
    for step in range(2):
        launch(
            refine_kernel, grid, scores, first, table, state, keep, floor,
            warps=warps, STEP=step, CHUNK=chunk, CHUNKS=chunks, **shape
        )  # fmt: skip
    launch(
        emit_kernel, grid, scores, table, state, index, count, keep, floor,
        warps=warps, CHUNK=chunk, **shape
    )  # fmt: skip
    fence(count)
    return index, count
