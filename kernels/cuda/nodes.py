"""The nodes of an ONNX model for one token (see `shadowc/onnx/bodies.py`), on the decode kernels.

Activations are fp32 and normalised already, a keep set is a mask bool [N], and what a node makes is
its outputs alone: so kernels run without a norm and leave none, masks become lists of units first,
and the output projection reads its weight as the other ONNX targets store it, a row a value of a
head:

    y[c] = residual[c] + bias[c] + sum over kept heads h, d of ctx[h*D + d] * weight_t[h*D + d, c]

Functions here run on meta tensors, and what they launch is written down (`shadowc/onnx/plan.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shadowc.cuda import launch, profile
from shadowc.kernels.cuda import attention as attention_kernels
from shadowc.kernels.cuda import mlp as mlp_kernels
from shadowc.kernels.cuda import project as project_kernels
from shadowc.kernels.cuda import select as select_kernels
from shadowc.kernels.cuda.project import qkv_kernel, tile_width
from shadowc.kernels.norm_mlp import NormMlp

CHUNK = 1024
"""Units or slots that a program handles at a time."""
PARTS = 16
"""Programs that share the heads of a column of the output projection."""
COLUMNS = 64


@triton.jit
def compact_kernel(mask_ptr, index_ptr, count_ptr, N: tl.constexpr, CHUNK: tl.constexpr):
    """Keep set of a mask bool [N]: kept units ascending, then the others; grid (N / CHUNK)."""
    chunk, lane = tl.program_id(0), tl.arange(0, CHUNK)
    before, count = 0, 0
    for start in range(0, N, CHUNK):
        here = tl.load(mask_ptr + start + lane, mask=start + lane < N, other=0).to(tl.int32)
        here = tl.sum(here)
        before += tl.where(start < chunk * CHUNK, here, 0)
        count += here
    unit = chunk * CHUNK + lane
    kept = tl.load(mask_ptr + unit, mask=unit < N, other=0).to(tl.int32)
    place = before + tl.cumsum(kept, axis=0) - kept
    place = tl.where(kept != 0, place, count + unit - place)
    tl.store(index_ptr + place, unit, mask=unit < N)
    if chunk == 0:
        tl.store(count_ptr, count)


@triton.jit
def slots_kernel(allowed_ptr, start_ptr, position_ptr, filled, CHUNK: tl.constexpr):
    """First slot that a token sees of allowed bool [filled + 1], and its own; one program.

    The slots seen are one run that ends with the last; where they are not, the first is -1.
    """
    lane = tl.arange(0, CHUNK)
    first, seen = filled + 1, 0
    for begin in range(0, filled + 1, CHUNK):
        slot = begin + lane
        may = tl.load(allowed_ptr + slot, mask=slot <= filled, other=0).to(tl.int32)
        first = tl.minimum(first, tl.min(tl.where(may != 0, slot, filled + 1)))
        seen += tl.sum(may)
    first = tl.where(filled + 1 - first == seen, first, -1)
    tl.store(start_ptr, first.to(tl.int64))
    tl.store(position_ptr, tl.cast(filled, tl.int64))


@triton.jit
def heads_kernel(
    ctx_ptr, w_ptr, start_ptr, partial_ptr, index_ptr, count_ptr,
    C: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """Partial sums [P, C] of ctx times w [H*D, C] over kept heads; grid (C / BC, P)."""
    part, parts = tl.program_id(1), tl.num_programs(1)
    cols = tl.program_id(0) * BC + tl.arange(0, BC)
    d, count = tl.arange(0, BD), tl.load(count_ptr)
    mask = (d < D)[:, None] & (cols < C)[None, :]
    acc = tl.zeros([BD, BC], tl.float32)
    for place in range(part, count, parts):
        row = tl.load(index_ptr + place) * D + d
        x = tl.load(ctx_ptr + row, mask=d < D, other=0.0)
        where = w_ptr + row.to(tl.int64)[:, None] * C + cols[None, :]
        w = tl.load(where, mask=mask, other=0.0, eviction_policy="evict_first")
        acc += w.to(tl.float32) * x[:, None]
    y = tl.sum(acc, axis=0)
    # No answer is better than one of slots that padding to the right would leave in between.
    y = tl.where(tl.load(start_ptr) < 0, float("nan"), y)
    tl.store(partial_ptr + part * C + cols, y, mask=cols < C)


@triton.jit
def mask_kernel(index_ptr, count_ptr, mask_ptr, N: tl.constexpr, CHUNK: tl.constexpr):
    """Masks bool [L, N] of keep sets, lists that go on with the others; grid (N / CHUNK, L)."""
    layer = tl.program_id(1)
    slot = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    unit = tl.load(index_ptr + layer * N + slot, mask=slot < N, other=0)
    tl.store(mask_ptr + layer * N + unit, slot < tl.load(count_ptr + layer), mask=slot < N)


def compact(mask: Tensor) -> tuple[Tensor, Tensor]:
    """index int32 [1, N] and count int32 [1] of a mask bool [1, N]."""
    units = mask.shape[-1]
    index, count = (mask.new_empty(size, dtype=torch.int32) for size in ((1, units), 1))
    launch(compact_kernel, (triton.cdiv(units, CHUNK),), mask, index, count, N=units, CHUNK=CHUNK)
    return index, count


def add_up(
    partial: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    read: Tensor | None = None,
    rows: Tensor | None = None,
) -> Tensor:
    """y [1, 1, C] of partial sums [P, 1, C]; into `rows` int32 [1, 1] the sum of read [P, 1]."""
    programs, _, columns = partial.shape
    y, block = partial.new_empty(1, 1, columns), profile().finish_columns
    launch(
        mlp_kernels.finish_kernel, (triton.cdiv(columns, block), 1),
        partial, read, bias, residual, None, y, None, None, rows, 1,
        P=programs, C=columns, R=min(128, triton.next_power_of_2(programs)), BC=block,
    )  # fmt: skip
    return y


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y [1, 1, O] of x [1, 1, C]."""
    y = x.new_empty(1, 1, weight.shape[0])
    project_kernels.project(x, None, "none", 0.0, weight, None, bias, y)
    return y


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2t: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    keep: Tensor,
    *,
    activation: str,
    skip_zeros: bool,
    up: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y [1, 1, C] of x [1, 1, C], and rows int32 [1, 1]."""
    index, count = compact(keep)
    stats = x.new_empty(1, 1, 2)
    partial, read = mlp_kernels.sums(
        NormMlp(x, stats, "none", 0.0, w1, None, b1, up, w2t, b2, x, x, activation, skip_zeros,
                index, count)
    )  # fmt: skip
    rows = read.new_empty(1, 1)
    return add_up(partial, b2, residual, read, rows), rows


def gated_mlp(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    downt: Tensor,
    residual: Tensor | None,
    keep: Tensor,
    *,
    activation: str,
    skip_zeros: bool,
) -> tuple[Tensor, Tensor]:
    """As `mlp`."""
    return mlp(
        x, gate, None, downt, None, residual, keep,
        activation=activation, skip_zeros=skip_zeros, up=up,
    )  # fmt: skip


def attention(
    x: Tensor,
    wq: Tensor,
    bq: Tensor | None,
    wk: Tensor,
    bk: Tensor | None,
    wv: Tensor,
    bv: Tensor | None,
    wot: Tensor,
    bo: Tensor | None,
    residual: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    present_key: Tensor,
    present_value: Tensor,
    filled: int,
    allowed: Tensor,
    keep: Tensor,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
) -> Tensor:
    """y [1, 1, C] of x [1, 1, C]; writes slot `filled` of the cache [1, G, S, D]."""
    columns = wot.shape[1]
    index, count = compact(keep)
    start, position = (x.new_empty(1, dtype=torch.int64) for _ in range(2))
    launch(slots_kernel, (1,), allowed, start, position, filled, CHUNK=CHUNK)
    q = x.new_empty(1, heads * head_dim)
    k, v = (x.new_empty(1, kv_heads * head_dim) for _ in range(2))
    rows, block = (heads + 2 * kv_heads) * head_dim, profile().project_rows
    launch(
        qkv_kernel, (triton.cdiv(rows, block),),
        x, None, wq, None, bq, wk, None, bk, wv, None, bv, q, k, v, index, count, 0.0,
        H=heads, G=kv_heads, D=head_dim, C=columns, BN=block, BK=tile_width(columns), NORM="none",
        PARTS=1,
    )  # fmt: skip
    ctx = attention_kernels.attention(
        q, k, v, cos, sin, present_key, present_value, start, position, scale, index, count
    )
    parts = min(PARTS, heads)
    partial = x.new_empty(parts, 1, columns)
    launch(
        heads_kernel, (triton.cdiv(columns, COLUMNS), parts),
        ctx, wot, start, partial, index, count,
        C=columns, D=head_dim, BD=triton.next_power_of_2(head_dim), BC=COLUMNS,
    )  # fmt: skip
    return add_up(partial, bo, residual)


def select(scores: Tensor, *, keep: int, floor: int, local: bool) -> Tensor:
    """mask bool [L, 1, N] of scores [1, L, N]."""
    _, layers, units = scores.shape
    index, count = select_kernels.select(scores, keep, floor, local)
    mask = scores.new_empty(layers, 1, units, dtype=torch.bool)
    grid = triton.cdiv(units, CHUNK), layers
    launch(mask_kernel, grid, index, count, mask, N=units, CHUNK=CHUNK)
    return mask
