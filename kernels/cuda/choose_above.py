"""Keep sets of heads and neurons from a code: code [B, 1, R] -> index [L, B, N], count [L, B].

    kept_kernel:     BLOCK units a program: their scores, one byte each whether it is kept, and how
                     many of the block are
    compact_kernel:  CHUNK units a program: what comes before it is a sum of the blocks' counts

Both kinds run in the same launches, the first one's programs first. As in `select_above` the units
that are not kept go to the end, last ones first, so nothing has to wait for a total.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowc.cuda import launch
from shadowc.kernels.cuda.blocks import ask, dots, follow
from shadowc.kernels.cuda.select import fence, ordered
from shadowc.kernels.select import keep_sets

BLOCK = 64  # units of a program that scores
CHUNK = 1024  # units of a program that compacts; a multiple of BLOCK

_WARPS = 4


@triton.jit
def ask_block(block, w_ptr, N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr):
    """Ask for the weights of a block."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    first = (block % BLOCKS) * BLOCK
    row = (block // BLOCKS * N + first).to(tl.int64)
    last = tl.minimum(N - first, BLOCK) * R - 1
    ask(w_ptr + row * R, last, triton.next_power_of_2(BLOCK * R) // 64)


@triton.jit
def keep_block(
    block, row, blocks, code_ptr, w_ptr, bias_ptr, threshold_ptr, kept_ptr, counts_ptr,
    N: tl.constexpr, R: tl.constexpr, BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Which units of a block are kept: bytes [B, blocks, BLOCK] and counts [B, blocks]."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    layer = block // BLOCKS
    lane = tl.arange(0, BLOCK)
    unit = (block % BLOCKS) * BLOCK + lane
    live = unit < N
    rows = layer * N + unit
    score = dots(w_ptr, rows, live, code_ptr + row * R, R, BK)
    score += tl.load(bias_ptr + rows, mask=live, other=0.0).to(tl.float32)
    kept = (live & (ordered(score) > ordered(tl.load(threshold_ptr + layer)))).to(tl.int32)
    place = row * blocks + block
    tl.store(kept_ptr + place * BLOCK + lane, kept.to(tl.int8))
    tl.store(counts_ptr + place, tl.sum(kept, axis=0))


@triton.jit
def kept_kernel(
    code_ptr, w_ptr, bias_ptr, threshold_ptr, w2_ptr, bias2_ptr, threshold2_ptr,
    kept_ptr, counts_ptr,
    L: tl.constexpr, N: tl.constexpr, L2: tl.constexpr, N2: tl.constexpr, R: tl.constexpr,
    BLOCK: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One block of units of either kind; grid (blocks of both, B)."""
    block, row = tl.program_id(0), tl.program_id(1)
    first: tl.constexpr = L * ((N + BLOCK - 1) // BLOCK)
    blocks = tl.num_programs(0)
    if PDL:
        if block < first:
            ask_block(block, w_ptr, N, R, BLOCK)
        elif L2 > 0:
            ask_block(block - first, w2_ptr, N2, R, BLOCK)
        follow()
    if block < first:
        keep_block(block, row, blocks, code_ptr, w_ptr, bias_ptr, threshold_ptr,
                   kept_ptr, counts_ptr, N, R, BLOCK, BK)  # fmt: skip
    elif L2 > 0:
        keep_block(block - first, row, blocks, code_ptr, w2_ptr, bias2_ptr, threshold2_ptr,
                   kept_ptr + first * BLOCK, counts_ptr + first, N2, R, BLOCK, BK)  # fmt: skip


@triton.jit
def compact_chunk(
    chunk, row, rows, blocks, kept_ptr, counts_ptr, index_ptr, count_ptr,
    N: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Indices of one chunk of a layer, and from its last chunk the layer's count."""
    BLOCKS: tl.constexpr = (N + BLOCK - 1) // BLOCK
    CHUNKS: tl.constexpr = (N + CHUNK - 1) // CHUNK
    layer, place = chunk // CHUNKS, chunk % CHUNKS
    base = row * blocks + layer * BLOCKS
    other = tl.arange(0, triton.next_power_of_2(BLOCKS))
    earlier = (other < BLOCKS) & (other < place * (CHUNK // BLOCK))
    before = tl.sum(tl.load(counts_ptr + base + other, mask=earlier, other=0), axis=0)
    unit = place * CHUNK + tl.arange(0, CHUNK)
    live = unit < N
    kept = tl.load(kept_ptr + base * BLOCK + unit, mask=live, other=0).to(tl.int32)
    slot = before + tl.cumsum(kept, axis=0)  # units kept up to here
    slot = tl.where(kept != 0, slot - 1, N - 1 - (unit - slot))
    out = layer * rows + row
    tl.store(index_ptr + out.to(tl.int64) * N + slot, unit, mask=live)
    if place == CHUNKS - 1:
        tl.store(count_ptr + out, before + tl.sum(kept, axis=0))


@triton.jit
def compact_kernel(
    kept_ptr, counts_ptr, index_ptr, count_ptr, index2_ptr, count2_ptr, blocks,
    L: tl.constexpr, N: tl.constexpr, L2: tl.constexpr, N2: tl.constexpr,
    BLOCK: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One chunk of a layer of either kind; grid (chunks of both, B)."""
    chunk, row, rows = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    first: tl.constexpr = L * ((N + CHUNK - 1) // CHUNK)
    skipped: tl.constexpr = L * ((N + BLOCK - 1) // BLOCK)
    if PDL:
        follow()
    if chunk < first:
        compact_chunk(chunk, row, rows, blocks, kept_ptr, counts_ptr, index_ptr, count_ptr,
                      N, BLOCK, CHUNK)  # fmt: skip
    elif L2 > 0:
        compact_chunk(chunk - first, row, rows, blocks, kept_ptr + skipped * BLOCK,
                      counts_ptr + skipped, index2_ptr, count2_ptr, N2, BLOCK, CHUNK)  # fmt: skip


def choose_above(
    code: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    thresholds: Sequence[Tensor],
    soon: bool,
) -> list[Tensor]:
    """Keep sets of one kind or two; the caller has checked the arguments.

    Args:
        code: [B, 1, R] float32, contiguous.
        weights: [L N, R], of each kind.
        biases: [L N].
        thresholds: [L] float32.
        soon: Whether the next kernel reads what is chosen.
    """
    batch, _, rank = code.shape
    shapes = [
        (t.shape[0], w.shape[0] // t.shape[0]) for w, t in zip(weights, thresholds, strict=True)
    ]
    blocks = sum(layers * triton.cdiv(units, BLOCK) for layers, units in shapes)
    chunks = sum(layers * triton.cdiv(units, CHUNK) for layers, units in shapes)
    sets = [keep_sets(code.new_empty(batch, *shape)) for shape in shapes]
    kept = sets[0][0].new_empty(batch * blocks * BLOCK, dtype=torch.int8)
    counts = sets[0][0].new_empty(batch * blocks)
    two = len(shapes) == 2
    (layers, units), (layers2, units2) = shapes[0], shapes[-1]
    sizes = {
        "L": layers, "N": units, "L2": layers2 if two else 0, "N2": units2 if two else 1,
        "BLOCK": BLOCK,
    }  # fmt: skip
    others = (weights[1], biases[1], thresholds[1]) if two else (None,) * 3
    their_sets = sets[1] if two else (None,) * 2
    launch(
        kept_kernel, (blocks, batch), code, weights[0], biases[0], thresholds[0], *others,
        kept, counts,
        R=rank, BK=triton.next_power_of_2(rank), warps=_WARPS, pdl=True, **sizes,
    )  # fmt: skip
    launch(
        compact_kernel, (chunks, batch), kept, counts, *sets[0], *their_sets,
        blocks, CHUNK=CHUNK, warps=_WARPS, pdl=True, **sizes,
    )  # fmt: skip
    if soon:
        fence(sets[0][1])
    return [part for one in sets for part in one]
