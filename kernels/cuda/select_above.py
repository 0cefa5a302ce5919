"""Keep sets from thresholds: scores [B, L, N] float32 -> index int32 [L, B, N], count [L, B].

Kept units go to the front of a layer's, the others to its end, last ones first, so that a program
needs to know of what comes before its chunk alone how many are kept. It counts that itself, as the
scores are in L2 and a launch would take longer; so there is nothing between programs to wait for,
and no order that could differ.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from shadowc.cuda import launch
from shadowc.kernels.cuda.select import fence, ordered
from shadowc.kernels.select import keep_sets

CHUNK = 1024  # units of one program; a power of two

_WARPS = 4


@triton.jit
def above_kernel(
    scores_ptr, threshold_ptr, index_ptr, count_ptr,
    L: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One chunk of a layer; grid (chunks, L, B)."""
    chunk, layer, row = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    scores_ptr += (row * L + layer).to(tl.int64) * N
    least = ordered(tl.load(threshold_ptr + layer))
    lane = tl.arange(0, CHUNK)
    earlier = tl.zeros([CHUNK], tl.int32)
    for other in range(chunk):  # whole chunks: only the last one may end early
        earlier += (ordered(tl.load(scores_ptr + other * CHUNK + lane)) > least).to(tl.int32)
    before = tl.sum(earlier, axis=0)
    unit = chunk * CHUNK + lane
    live = unit < N
    kept = live & (ordered(tl.load(scores_ptr + unit, mask=live, other=0.0)) > least)
    place = before + tl.cumsum(kept.to(tl.int32), axis=0)  # units kept up to here
    out = (layer * tl.num_programs(2) + row).to(tl.int64)
    place = tl.where(kept, place - 1, N - 1 - (unit - place))
    tl.store(index_ptr + out * N + place, unit, mask=live)
    if chunk == tl.num_programs(0) - 1:
        tl.store(count_ptr + out, before + tl.sum(kept.to(tl.int32), axis=0))


def select_above(scores: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """Keep sets of all layers; the caller has checked the arguments.

    Args:
        scores: [B, L, N] float32, contiguous.
        threshold: [L] float32.
    """
    batch, layers, units = scores.shape
    index, count = keep_sets(scores)
    chunk = max(32 * _WARPS, min(CHUNK, triton.next_power_of_2(units)))  # no fewer than threads
    launch(
        above_kernel, (triton.cdiv(units, chunk), layers, batch), scores, threshold, index, count,
        L=layers, N=units, CHUNK=chunk, warps=_WARPS,
    )  # fmt: skip
    fence(count)
    return index, count
