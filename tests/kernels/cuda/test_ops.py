"""The CUDA launchers of the decode ops, interpreted on the CPU, against the ops' references.

Triton decides while it is imported whether kernels are compiled or interpreted, and a process can
do only one of the two. Where Triton was imported before (transformers does), the tests of kernels
run in a process of their own.
"""

import os
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shadowc import cuda, native
from shadowc.errors import KernelError
from shadowc.kernels import (
    decode_attention,
    lazy_qkv,
    linear,
    norm_linear,
    norm_mlp,
    norm_qkv,
    rms_norm,
    scale,
    scaled_out_proj,
)

tl = pytest.importorskip("triton.language")
from shadowc.kernels.cuda import batch as batch_kernels  # noqa: E402

INTERPRETED = type(tl.sum).__name__ == "InterpretedFunction"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")

HALF, BF16, FULL = torch.float16, torch.bfloat16, torch.float32
EPS = 1e-5
# Largest RMS error over RMS value. Kernel and reference read the same rounded weights and add in
# float32, so what stays in float32 differs by the order of addition alone. What passes through half
# precision (a result of that type, keys and values, activations of several rows on their way to
# tensor cores) may be rounded to either neighbour: half a unit in its last place. A whole one in
# bfloat16, to which the interpreter does not round, but truncates.
TOLERANCES = {FULL: 3e-6, HALF: 2.0**-11, BF16: 2.0**-7}
ACTIVATIONS = [("relu", True), ("relu", False), ("silu", False), ("gelu", False)]


@pytest.mark.skipif(INTERPRETED, reason="the tests run right here")
def test_all_of_this_interpreted(interpreted_alone):
    interpreted_alone()


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """A GPU of few programs, each with a short stretch of the cache: the interpreter is slow."""
    known = replace(cuda.PROFILES["h100"], multiprocessors=2, attention_slots=16)
    monkeypatch.setattr(cuda, "_active", known)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What a launcher allocates holds NaN, or a number that no mask or count may have."""
    allocate = Tensor.new_empty

    def poisoned(self, *size, **options):
        made = allocate(self, *size, **options)
        return made.fill_(torch.nan if made.is_floating_point() else 77)

    monkeypatch.setattr(Tensor, "new_empty", poisoned)


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """The interpreter keeps bfloat16 as its 16 bits, which its `tl.dot` takes for integers."""
    if not INTERPRETED:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    dot = InterpreterBuilder.create_dot

    def wide(handle):
        if handle.dtype != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype("uint32") << 16).view("float32"), tl.float32)

    def fixed(self, a, b, *rest):
        return dot(self, wide(a), wide(b), *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", fixed)


def agree(got: Tensor, want: Tensor, through: torch.dtype = FULL) -> None:
    """Whether all was written, and well; `through` is the type that values passed on their way."""
    assert got.shape == want.shape and got.dtype == want.dtype
    assert torch.isfinite(got).all()
    allowed = max(TOLERANCES[got.dtype], TOLERANCES[through])
    error = (got.double() - want.double()).square().mean().sqrt()
    assert error <= allowed * want.double().square().mean().sqrt() + 1e-30


def agree_stats(got: Tensor, want: Tensor, width: int, through: torch.dtype = FULL) -> None:
    """Sums over the parts: their errors are measured by the values that were added up."""
    assert got.dtype == want.dtype == FULL and got.shape[::2] == want.shape[::2]
    (total, square), (other, wanted) = (s.double().sum(1).unbind(-1) for s in (got, want))
    assert ((total - other).abs() <= TOLERANCES[through] * (width * wanted).sqrt()).all()
    assert ((square - wanted).abs() <= 2 * TOLERANCES[through] * wanted).all()


def keep_set(share: str, batch: int, units: int) -> tuple[Tensor | None, Tensor | None]:
    """A keep set as `select` gives it: the kept units, then the others; rows differ."""
    if share == "None":
        return None, None
    size = {"zero": 0, "one": 1, "half": (units + 1) // 2, "all": units}[share]
    mask = torch.zeros(batch, units, dtype=torch.bool)
    for row in mask:
        row[torch.randperm(units)[:size]] = True
    return torch.ops.shadowc.compact(mask)


def unkept(keep, units: int) -> Tensor:
    """Mask [N] of the units that no row keeps: their weights may hold anything."""
    mask = native.keep_mask(*keep, units)
    return torch.zeros(units, dtype=torch.bool) if mask is None else ~mask.any(0)


def given(batch: int, width: int, dtype: torch.dtype, norm: str, parts: int = 1):
    """gamma, and what `scale` makes of some x with it: scaled, stats in parts, and norm, eps."""
    x = torch.randn(batch, 1, width) + 0.5
    gamma = (1 + 0.1 * torch.randn(width)).to(dtype)
    pieces = x.split(-(-width // parts), 2)
    stats = torch.cat([scale.scale_reference(p, gamma[: p.shape[2]])[1] for p in pieces], 1)
    return gamma, (scale.scale_reference(x, gamma)[0], stats, norm, EPS)


def matrix(rows: int, width: int, gamma: Tensor, norm: str, *, bias: bool = True):
    """A projection's weight, gain and shift."""
    weight = (torch.randn(rows, width) / width**0.5).to(gamma.dtype)
    gain = weight.float() @ gamma.float() if norm == "layer" else None
    return weight, gain, torch.randn(rows) if bias else None


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# --- Norms ---------------------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("batch, width", [(1, 1), (1, 17), (3, 80), (1, 127), (3, 1030)])
@pytest.mark.parametrize("dtype, source", [(HALF, FULL), (BF16, FULL), (FULL, FULL), (HALF, HALF)])
def test_scale(batch, width, dtype, source):
    x, gamma = torch.randn(batch, 1, width).to(source), torch.randn(width).to(dtype)
    got, want = scale._scale_cuda(x, gamma), scale.scale_reference(x, gamma)
    agree(got[0], want[0])
    agree_stats(got[1], want[1], width)


@interpreted
@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(
    "batch, width, rows, dtype, parts",
    [
        (1, 17, 1, HALF, 1),
        (1, 80, 97, BF16, 3),
        (1, 1030, 13, HALF, 70),  # two tiles of columns, the second one nearly empty
        (1, 127, 70, FULL, 1),
        (2, 80, 97, HALF, 1),
        (3, 127, 33, BF16, 70),  # more parts than `normalised` reads at a time
        (16, 130, 5, FULL, 2),
        (3, 64, 1, HALF, 1),
    ],
)
def test_norm_linear(norm, batch, width, rows, dtype, parts):
    gamma, head = given(batch, width, dtype, norm, parts)
    for bias in (False, True):
        weights = matrix(rows, width, gamma, norm, bias=bias)
        got = norm_linear._norm_linear_cuda(*head, *weights)
        agree(got, norm_linear.norm_linear_reference(*head, *weights))


def test_the_references_are_a_norm_and_a_projection():
    """What the algebra of `scale` and `norm_linear` comes to, in float32."""
    x, gamma, beta = torch.randn(2, 1, 64), torch.randn(64), torch.randn(64)
    weight, bias = torch.randn(48, 64), torch.randn(48)
    made = scale.scale_reference(x, gamma)
    norm = torch.nn.functional.layer_norm(x, (64,), gamma, beta, EPS)
    got = norm_linear.norm_linear_reference(
        *made, "layer", EPS, weight, weight @ gamma, weight @ beta + bias
    )
    # The mean is subtracted after the product: a few digits more are lost than in the order given.
    torch.testing.assert_close(got, norm @ weight.T + bias, atol=1e-4, rtol=1e-4)
    got = norm_linear.norm_linear_reference(*made, "rms", EPS, weight, None, bias)
    want = rms_norm.rms_norm_reference(x, gamma, EPS) @ weight.T + bias
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


# --- Attention and its projections ---------------------------------------------------------------

HEADS = [
    # batch, C, H, G, D, share, dtype
    (1, 80, 4, 4, 16, "None", HALF),
    (1, 97, 4, 2, 80, "half", HALF),
    (1, 64, 4, 1, 64, "one", BF16),
    (1, 80, 3, 3, 96, "zero", FULL),
    (1, 1030, 2, 1, 64, "half", HALF),
    (1, 64, 2, 2, 128, "all", FULL),
    (3, 80, 4, 2, 64, "half", HALF),
    (3, 97, 4, 2, 80, "zero", BF16),
    (2, 127, 2, 1, 96, "None", FULL),
    (3, 64, 2, 2, 128, "one", FULL),
]


@interpreted
@pytest.mark.parametrize("batch, width, heads, groups, dim, share, dtype", HEADS)
def test_norm_qkv(batch, width, heads, groups, dim, share, dtype):
    norm = "rms" if groups < heads else "layer"
    gamma, head = given(batch, width, dtype, norm, 3)
    keep = keep_set(share, batch, heads)
    q, k, v = (matrix(n * dim, width, gamma, norm) for n in (heads, groups, groups))
    v = (*v[:2], None)
    want = norm_qkv.norm_qkv_reference(*head, *q, *k, *v, dim, *keep)
    if batch == 1:  # a batch runs all heads
        q[0][unkept(keep, heads).repeat_interleave(dim)] = torch.nan
    got = norm_qkv._norm_qkv_cuda(*head, *q, *k, *v, dim, *keep)
    mask = native.keep_mask(*keep, heads)
    kept = torch.ones(batch, heads, dtype=torch.bool) if mask is None else mask
    where = kept.repeat_interleave(dim, 1)[:, None]
    agree(got[0].where(where, 0.0), want[0])
    if batch == 1:
        assert got[0][~where].isnan().all()  # nobody computes or writes these
    agree(got[1], want[1])
    agree(got[2], want[2])


@interpreted
@pytest.mark.parametrize("batch, width, heads, groups, dim, share, dtype", HEADS)
def test_scaled_out_proj(batch, width, heads, groups, dim, share, dtype):
    keep = keep_set(share, batch, heads)
    ctx = torch.randn(batch, 1, heads * dim).to(dtype)
    mask = native.keep_mask(*keep, heads)
    if mask is not None:
        ctx = ctx.where(mask.repeat_interleave(dim, 1)[:, None], 0.0)
    weight = (torch.randn(width, heads * dim) / (heads * dim) ** 0.5).to(dtype)
    residual, gamma = torch.randn(batch, 1, width), torch.randn(width).to(dtype)
    for bias in (None, torch.randn(width).to(dtype)):
        rest = (bias, residual, gamma, dim, *keep)
        want = scaled_out_proj.scaled_out_proj_reference(ctx, weight, *rest)
        poisoned = weight.clone()
        if batch == 1:  # a batch reads all heads
            poisoned[:, unkept(keep, heads).repeat_interleave(dim)] = torch.nan
        got = scaled_out_proj._scaled_out_proj_cuda(ctx, poisoned, *rest)
        agree(got[0], want[0])
        agree(got[1], want[1])
        agree_stats(got[2], want[2], width)


def state(batch, heads, groups, dim, slots, position, dtype, start, rotary):
    """Arguments of the op but its keep set; slots that nobody may see hold NaN."""
    q, k, v = (torch.randn(batch, 1, n * dim).to(dtype) for n in (heads, groups, groups))
    caches = [torch.randn(batch, groups, slots, dim).to(dtype) for _ in range(2)]
    starts = {
        "none": torch.zeros(batch, dtype=torch.int64),
        "some": torch.arange(batch) * 5 + 3,
        "last": torch.full((batch,), position),
    }[start].clamp(max=position)
    for cache in caches:
        cache[:, :, position:] = torch.nan
        for row, first in enumerate(starts):
            cache[row, :, :first] = torch.nan
    turn = torch.rand(2, batch, 1, dim) * 6
    cos_sin = (turn[0].cos(), turn[1].sin()) if rotary else (None, None)
    return (q, k, v, *cos_sin, *caches, starts, torch.tensor([position]), dim**-0.5)


@interpreted
@pytest.mark.parametrize(
    "batch, heads, groups, dim, slots, position, start, rotary, share, dtype",
    [
        (1, 2, 2, 64, 20, 0, "none", True, "None", HALF),  # the first token of all
        (1, 4, 2, 64, 70, 69, "none", True, "half", HALF),  # three stretches, the cache full
        (3, 4, 2, 80, 70, 50, "some", True, "half", BF16),
        (3, 2, 2, 96, 70, 66, "some", False, "None", FULL),
        (1, 2, 1, 128, 40, 33, "last", True, "all", HALF),  # only the new token may be seen
        (3, 4, 1, 64, 70, 66, "last", False, "one", FULL),  # stretches without a slot to see
        (1, 4, 4, 16, 40, 17, "none", False, "zero", HALF),
        (3, 4, 2, 8, 70, 40, "some", True, "zero", FULL),
        (1, 2, 1, 64, 2100, 2063, "some", True, "one", HALF),  # eight stretches
    ],
)
def test_attention(batch, heads, groups, dim, slots, position, start, rotary, share, dtype):
    arguments = state(batch, heads, groups, dim, slots, position, dtype, start, rotary)
    keep = keep_set(share, batch, heads)
    before = [cache.clone() for cache in arguments[5:7]]
    wide = [a.float() if a is not None and a.dtype is dtype else a for a in arguments[:7]]
    wide[5], wide[6] = (cache.clone() for cache in wide[5:7])
    want = decode_attention.decode_attention_reference(*wide, *arguments[7:], *keep)
    q = arguments[0].clone()
    mask = native.keep_mask(*keep, heads)
    if mask is not None:  # `norm_qkv` leaves the queries of skipped heads unwritten
        q[~mask.repeat_interleave(dim, 1)[:, None]] = torch.nan
    got = decode_attention._decode_attention_cuda(q, *arguments[1:], *keep)
    agree(got, want.to(dtype))
    if mask is not None:
        assert not got[~mask.repeat_interleave(dim, 1)[:, None]].any()
    for cache, old, expected in zip(arguments[5:7], before, wide[5:7], strict=True):
        agree(cache[:, :, position], expected[:, :, position].to(dtype))
        others = torch.arange(slots) != position
        assert torch.equal(cache[:, :, others].nan_to_num(7), old[:, :, others].nan_to_num(7))
    assert not cuda.counters("cpu", batch * heads).any()  # as they were found


@interpreted
@pytest.mark.parametrize("rotary, position", [(False, 0), (True, 50)])
def test_attention_over_a_cache_that_has_the_token(rotary, position):
    """Without new keys and values: the same context as when they were given before."""
    arguments = state(2, 4, 2, 16, 70, position, HALF, "some", rotary)
    keep = keep_set("half", 2, 4)
    want = decode_attention._decode_attention_cuda(*arguments, *keep)
    q, _, _, *rest = arguments
    before = [cache.clone() for cache in arguments[5:7]]
    got = decode_attention._decode_attention_cuda(q, None, None, *rest, *keep)
    assert torch.equal(got, want)
    for cache, old in zip(arguments[5:7], before, strict=True):
        assert torch.equal(cache.nan_to_num(7), old.nan_to_num(7))


# --- Keys and values that wait -------------------------------------------------------------------

LAZY = [
    # C, H, G, D, parts, dtype, rotary, steps
    (80, 4, 4, 8, 3, HALF, False, 42),
    (97, 4, 2, 24, 3, HALF, True, 42),
    (64, 4, 1, 8, 1, BF16, True, 24),
    (1030, 2, 2, 8, 70, HALF, False, 20),  # two tiles of columns, the last ones nearly empty
    (300, 2, 2, 40, 2, FULL, True, 18),
]


def waiting(width, groups, dim, dtype, rotary, slots, first):
    """State after a prompt of `first` tokens; what nobody may see holds NaN."""
    caches = [torch.full((1, groups, slots, dim), torch.nan, dtype=dtype) for _ in range(2)]
    for cache in caches:
        cache[:, :, :first] = torch.randn(groups, first, dim).to(dtype)
    window = torch.full((lazy_qkv.WINDOW, width), torch.nan, dtype=dtype)
    moments = torch.full((lazy_qkv.WINDOW, 2), torch.nan)
    turns = torch.full((2, lazy_qkv.WINDOW, dim), torch.nan) if rotary else None
    filled = torch.full((2, groups), first, dtype=torch.int32)
    return [window, moments, filled, turns, *caches]


def clones(state):
    return [None if x is None else x.clone() for x in state]


def turns_of(dim, rotary):
    turn = torch.rand(1, 1, dim // 2).repeat(1, 1, 2) * 6
    return (turn.cos(), turn.sin()) if rotary else (None, None)


@interpreted
@pytest.mark.parametrize("width, heads, groups, dim, parts, dtype, rotary, steps", LAZY)
def test_lazy_qkv(width, heads, groups, dim, parts, dtype, rotary, steps):
    """Against keys and values that are computed at once, with masks new at every token."""
    norm, first = "rms" if rotary else "layer", 5
    gamma = given(1, width, dtype, norm)[0]
    q, k, v = (matrix(n * dim, width, gamma, norm) for n in (heads, groups, groups))
    v = (*v[:2], None)
    mine = waiting(width, groups, dim, dtype, rotary, first + steps, first)
    theirs, whole = clones(mine), clones(mine)[-2:]
    seen, longest = set(), 0
    for step in range(steps):
        x = torch.randn(1, 1, width) + 0.5
        pieces = [scale.scale_reference(p, gamma[: p.shape[2]])[1]
                  for p in x.split(-(-width // parts), 2)]  # fmt: skip
        head = (scale.scale_reference(x, gamma)[0], torch.cat(pieces, 1), norm, EPS)
        mask = torch.rand(1, heads) < 0.5
        mask[0, 0] = step % 40 == 39  # away for longer than two windows
        if heads // groups > 1:
            mask[0, 1] = False
        keep = torch.ops.shadowc.compact(mask)
        position, turned = torch.tensor([first + step]), turns_of(dim, rotary)
        keys, values = norm_qkv.norm_qkv_reference(*head, *q, *k, *v, dim, None, None)[1:]
        rest = (torch.zeros(1, dtype=torch.int64), position, 1.0, None, None)
        decode_attention._decode_attention_cuda(
            torch.zeros(1, 1, groups * dim, dtype=dtype), keys, values, *turned, *whole, *rest
        )
        rest = (dim, *keep, position, *turned)
        want = lazy_qkv.lazy_qkv_reference(*head, *q, *k, *v, *rest, *theirs)
        idle = (want[1] == 0).repeat_interleave(dim)
        bad = [(w[0].masked_fill(idle[:, None], torch.nan), *w[1:]) for w in (k, v)]
        for _ in range(1 + (step % 9 == 8)):  # a step may be repeated: graphs are warmed up
            got = lazy_qkv._lazy_qkv_cuda(*head, *q, *bad[0], *bad[1], *rest, *mine)
        where = mask.repeat_interleave(dim, 1)[:, None]
        agree(got[0].where(where, 0.0), want[0])
        assert torch.equal(got[1], want[1]) and torch.equal(mine[2], theirs[2])
        seen |= set(got[1].flatten().tolist())
        longest = max(longest, int(got[1].max()))
        for group in mask[0].view(groups, -1).any(1).nonzero().flatten():
            for cache, other in zip(mine[-2:], whole, strict=True):
                agree(cache[0, group, : first + step + 1], other[0, group, : first + step + 1])
    assert {0, 1} < seen and (longest == lazy_qkv.WINDOW or steps < 40 or heads > groups)
    assert int(mine[2].min()) < first + steps  # somebody still waits
    rest = (torch.tensor([first + steps - 1]), *mine)
    lazy_qkv._catch_up_cuda(*k, *v, *rest)
    lazy_qkv.catch_up_reference(*k, *v, rest[0], *theirs)
    for cache, other, reference in zip(mine[-2:], whole, theirs[-2:], strict=True):
        agree(cache, other)
        agree(cache, reference)


@interpreted
@pytest.mark.parametrize("position, share, rotary", [(40, "None", True), (41, "half", False)])
def test_lazy_qkv_from_any_state(position, share, rotary):
    """Heads that lack 1 to 16 tokens, and heads that have more: tokens were taken back."""
    width, heads, groups, dim = 64, 20, 20, 8
    gamma, head = given(1, width, HALF, "layer", 2)
    matrices = [part for _ in range(3) for part in matrix(heads * dim, width, gamma, "layer")]
    keep = keep_set(share, 1, heads)
    mine = waiting(width, groups, dim, HALF, rotary, 60, 60)
    mine[0].normal_()
    mine[1].uniform_(0.5, 1.5)
    if rotary:
        mine[3].uniform_(-1, 1)
    mine[2][:] = position + 3 - torch.arange(groups).clamp(max=18)
    before, theirs = clones(mine), clones(mine)
    arguments = (*head, *matrices, dim, *keep, torch.tensor([position]), *turns_of(dim, rotary))
    got = lazy_qkv._lazy_qkv_cuda(*arguments, *mine)
    want = lazy_qkv.lazy_qkv_reference(*arguments, *theirs)
    assert torch.equal(got[1], want[1]) and {1, 16} < set(got[1].flatten().tolist())
    assert torch.equal(mine.pop(2), theirs.pop(2))
    for here, there in zip(mine, theirs, strict=True):
        assert (here is None) == (there is None)
        if here is not None:
            agree(here, there)
    for here, old in zip(mine[-2:], before[-2:], strict=True):  # nothing else is written
        first = (position + 3 - torch.arange(groups).clamp(max=18)).clamp(max=position)
        slots = torch.arange(60)
        others = (slots < first[:, None]) | (slots > position) | (got[1][0] == 0)[:, None]
        assert torch.equal(here[0][others], old[0][others])
    if share == "None":
        rest = (*matrices[3:], torch.tensor([position]))
        last, reference = clones(before), clones(before)
        for state_ in (last, reference):  # the copy that a step at `position` leaves
            state_[2][:] = torch.arange(groups) % 19 + position - 15
        lazy_qkv._catch_up_cuda(*rest, *last)
        lazy_qkv.catch_up_reference(*rest, *reference)
        for here, there, old in zip(last[-2:], reference[-2:], before[-2:], strict=True):
            agree(here, there)
            assert not torch.equal(here, old)
            assert torch.equal(here[:, :, position + 1 :], old[:, :, position + 1 :])


@pytest.mark.parametrize("dtype", [HALF, BF16])
@pytest.mark.parametrize("tokens", [1, 5])
def test_attention_of_half_precision_on_a_cpu(dtype, tokens):
    """Queries, keys and values come in half precision; caches are float32 there."""
    q, k, v = (torch.randn(2, tokens, n * 8).to(dtype) for n in (4, 2, 2))
    caches = [torch.randn(2, 2, 12, 8) for _ in range(4)]
    rest = (torch.tensor([0, 2]), torch.tensor([4]), 0.3, None, None)
    got = torch.ops.shadowc.decode_attention(q, k, v, None, None, *caches[:2], *rest)
    wide = (t.float() for t in (q, k, v))
    caches[2:] = [c.clone() for c in caches[:2]]
    want = decode_attention.decode_attention_reference(*wide, None, None, *caches[2:], *rest)
    agree(got, want.to(dtype))
    assert torch.equal(caches[0], caches[2]) and torch.equal(caches[1], caches[3])


@pytest.mark.parametrize("rotary", [False, True])
def test_attention_of_a_prompt_on_cuda(rotary):
    """Several tokens: torch's own attention, over caches in half precision."""
    q, k, v = (torch.randn(2, 5, n * 8).half() for n in (4, 2, 2))
    caches = [torch.randn(2, 2, 12, 8).half() for _ in range(2)]
    wide = [cache.float() for cache in caches]
    cos_sin = (torch.randn(2, 5, 8), torch.randn(2, 5, 8)) if rotary else (None, None)
    rest = (torch.tensor([0, 6]), torch.tensor([4]), 0.3, None, None)
    got = decode_attention._decode_attention_cuda(q, k, v, *cos_sin, *caches, *rest)
    float_qkv = (t.float() for t in (q, k, v))
    want = decode_attention.decode_attention_reference(*float_qkv, *cos_sin, *wide, *rest)
    assert not got[1, :2].any()  # before the row's start
    agree(got, want.half())
    agree(caches[0], wide[0].half())


# --- MLP -----------------------------------------------------------------------------------------


def mlp(batch, width, neurons, gated, share, dtype):
    """Arguments of the op up to the activation, its keep set, and those with poisoned weights."""
    norm = "rms" if gated else "layer"
    gamma, head = given(batch, width, dtype, norm, 3)
    keep = keep_set(share, batch, neurons)
    w1, gain, shift = matrix(neurons, width, gamma, norm, bias=not gated)
    w_up = matrix(neurons, width, gamma, norm)[0] if gated else None
    w2t = torch.randn(neurons, width).to(dtype)
    bias = None if gated else torch.randn(width).to(dtype)
    rest = (bias, torch.randn(batch, 1, width), torch.randn(width).to(dtype))
    clean = (*head, w1, gain, shift, w_up, w2t, *rest)
    free = unkept(keep, neurons)
    bad = [w if w is None else w.masked_fill(free[:, None], torch.nan) for w in (w1, w_up, w2t)]
    return clean, keep, (*head, bad[0], gain, shift, bad[1], bad[2], *rest)


@interpreted
@pytest.mark.parametrize(
    "batch, width, neurons, gated, share, dtype",
    [
        (1, 80, 97, False, "None", HALF),
        (1, 64, 96, True, "half", HALF),
        (1, 1030, 40, False, "half", BF16),
        (1, 127, 50, False, "one", FULL),
        (1, 80, 33, True, "zero", HALF),
        (1, 17, 1, False, "all", FULL),
        (3, 80, 97, False, "half", HALF),
        (3, 64, 96, True, "None", BF16),
        (2, 127, 130, True, "one", FULL),
        (3, 97, 33, False, "zero", HALF),
        (3, 130, 50, False, "all", FULL),
    ],
)
def test_norm_mlp(batch, width, neurons, gated, share, dtype):
    clean, keep, poisoned = mlp(batch, width, neurons, gated, share, dtype)
    through = FULL if batch == 1 else dtype  # tensor cores take activations in the type of weights
    for activation, skip in ACTIVATIONS:
        want = norm_mlp.norm_mlp_reference(*clean, activation, skip, *keep)
        got = norm_mlp._norm_mlp_cuda(*poisoned, activation, skip, *keep)
        agree(got[0], want[0], through)
        agree(got[1], want[1], through)
        agree_stats(got[2], want[2], width, through)
        assert got[3].shape == want[3].shape and got[3].dtype == want[3].dtype
        if skip:  # an activation within rounding of zero may fall on either side
            assert (got[3] - want[3]).abs().max() <= 1
        elif batch == 1:
            assert torch.equal(got[3], want[3])


@interpreted
def test_rows_of_a_batch_that_skips_no_zeros():
    clean, keep, _ = mlp(3, 64, 96, False, "None", HALF)
    got = norm_mlp._norm_mlp_cuda(*clean, "relu", False, *keep)
    assert got[3].tolist() == [96, 96, 96]


@interpreted
@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_zero_activations_are_not_read(batch):
    clean, keep, _ = mlp(batch, 64, 96, False, "None", HALF)
    h = norm_linear.norm_linear_reference(*clean[:7])
    dead = (h <= -1e-3).all(0)[0]
    assert dead.sum() > 5
    second = clean[8].masked_fill(dead[:, None], torch.nan)
    arguments = (*clean[:8], second, *clean[9:])
    y = norm_mlp._norm_mlp_cuda(*arguments, "relu", True, *keep)[0]
    assert torch.isfinite(y).all()
    y = norm_mlp._norm_mlp_cuda(*arguments, "relu", False, *keep)[0]
    assert y.isnan().all()


@interpreted
def test_many_programs_are_added_up(monkeypatch):
    """More partial sums than `finish` reads at a time, most of them of no neuron at all."""
    many = replace(cuda.PROFILES["h100"], multiprocessors=50)
    monkeypatch.setattr(cuda, "_active", many)
    clean, keep, poisoned = mlp(1, 33, 60, False, "half", HALF)
    want = norm_mlp.norm_mlp_reference(*clean, "relu", True, *keep)
    got = norm_mlp._norm_mlp_cuda(*poisoned, "relu", True, *keep)
    agree(got[0], want[0])
    assert (got[3] - want[3]).abs().max() <= 1


@interpreted
def test_rows_get_what_they_would_get_alone():
    """The union of keep sets is read, and each row uses its own part of it."""
    clean, (index, count), _ = mlp(3, 64, 96, False, "half", FULL)
    batch = norm_mlp._norm_mlp_cuda(*clean, "relu", True, index, count)
    for row in range(3):
        part = slice(row, row + 1)
        scaled, stats, *middle, residual, gamma = clean
        alone = (scaled[part], stats[part], *middle, residual[part], gamma)
        got = norm_mlp._norm_mlp_cuda(*alone, "relu", True, index[part], count[part])
        agree(batch[0][part], got[0])
        assert batch[3][row] == got[3][0]


@interpreted
@pytest.mark.parametrize("share", ["None", "half"])
def test_nan_of_one_row_stays_there(share):
    clean, keep, _ = mlp(3, 64, 96, False, share, HALF)
    clean[0][1], clean[1][1] = torch.nan, torch.nan
    y = norm_mlp._norm_mlp_cuda(*clean, "silu", False, *keep)[0]
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2]]).all()


@interpreted
@pytest.mark.parametrize("share", ["zero", "one", "half", "all"])
@pytest.mark.parametrize("units", [1, 17, 1030])
def test_keep_sets_become_masks(share, units):
    keep = keep_set(share, 3, units)
    wanted = native.keep_mask(*keep, units)
    assert torch.equal(batch_kernels.masks(*keep), wanted.to(torch.int8))


@interpreted
def test_mask_of_a_row_that_pads_the_batch():
    """Such a row keeps none; its index names every unit all the same."""
    index, count = keep_set("half", 2, 20)
    index[1], count[1] = torch.arange(20), 0
    mask = batch_kernels.masks(index, count)
    assert torch.equal(mask, native.keep_mask(index, count, 20).to(torch.int8))


# --- Linear and RMS norm -------------------------------------------------------------------------


@interpreted
@pytest.mark.parametrize("dtype", [HALF, BF16, FULL])
@pytest.mark.parametrize(
    "shape, width, rows",
    [((1, 1), 80, 97), ((1, 1), 1030, 5), ((3, 1), 127, 40), ((2, 8), 64, 33)],
)
def test_linear(dtype, shape, width, rows):
    """One token, 2 to 16 of them, and more: those are a product of torch."""
    x, weight = torch.randn(*shape, width).to(dtype).float(), torch.randn(rows, width).to(dtype)
    through = dtype if shape == (17, 1) else FULL
    for bias in (None, torch.randn(rows)):
        got = linear._linear_cuda(x, weight, bias)
        agree(got, linear.linear_reference(x, weight, bias), through)


@interpreted
def test_linear_of_float32_in_half_precision():
    """The predictor's input is not rounded, however many rows there are."""
    weight = torch.randn(33, 64).half()
    for tokens in (1, 3):
        x = torch.randn(tokens, 1, 64)
        x[0, 0, 0] = 9e4  # beyond half precision
        want = linear.linear_reference(x, weight, None)
        agree(linear._linear_cuda(x, weight, None), want, FULL)


@interpreted
def test_linear_refuses_more_rows_than_a_step_has():
    with pytest.raises(KernelError, match="too many rows"):
        linear._linear_cuda(torch.randn(17, 1, 64), torch.randn(33, 64), None)


@pytest.mark.parametrize("dtype", [HALF, BF16])
def test_rms_norm_of_half_precision(dtype):
    x, weight = 300 * torch.randn(2, 5, 127).to(dtype), torch.randn(127).to(dtype)  # x^2: infinite
    want = rms_norm.rms_norm_reference(x.float(), weight.float(), EPS).to(dtype)
    agree(torch.ops.shadowc.rms_norm(x, weight, EPS), want)
    agree(native.CUDA_LAUNCHERS["rms_norm"](x, weight, EPS), want)


# --- What is refused, and what is found without memory -------------------------------------------


def calls(batch: int = 1, tokens: int = 1, device: str = "cpu") -> dict[str, tuple[object, ...]]:
    """Arguments of each op; C = H*D = 16, F = 32."""
    with torch.device(device):
        x, gamma = torch.randn(batch, tokens, 16), torch.randn(16)
        stats, square, tall = torch.randn(batch, 1, 2), torch.randn(16, 16), torch.randn(32, 16)
        wide = torch.randn(32)
        head, three = (x, stats, "layer", EPS), (square, gamma, gamma) * 3
        heads = torch.zeros(batch, 2, dtype=torch.int32), torch.ones(batch, dtype=torch.int32)
        neurons = torch.zeros(batch, 32, dtype=torch.int32), heads[1]
    return {
        "scale": (x, gamma),
        "norm_linear": (*head, tall, wide, wide),
        "norm_qkv": (*head, *three, 8, *heads),
        "scaled_out_proj": (x, square, gamma, x, gamma, 8, *heads),
        "norm_mlp": (*head, tall, wide, wide, None, tall, gamma, x, gamma, "relu", True, *neurons),
    }


OPS = list(calls())


@pytest.mark.parametrize("op", OPS)
def test_one_token_is_what_they_take(op):
    getattr(torch.ops.shadowc, op)(*calls()[op])
    for run in (getattr(torch.ops.shadowc, op), native.CUDA_LAUNCHERS[op]):
        with pytest.raises(KernelError, match=r"(?s)argument '\w+' does not fit.*one token"):
            run(*calls(tokens=2)[op])


@pytest.mark.parametrize("op", ["norm_qkv", "scaled_out_proj", "norm_mlp"])
def test_keep_sets_that_do_not_fit(op):
    *rest, index, count = calls(2)[op]
    for run in (getattr(torch.ops.shadowc, op), native.CUDA_LAUNCHERS[op]):
        with pytest.raises(KernelError, match="index and count together"):
            run(*rest, index, None)
        with pytest.raises(KernelError, match="'index'"):
            run(*rest, index[:, 1:].contiguous(), count)
        with pytest.raises(KernelError, match="'count'"):
            run(*rest, index, count.long())


def test_an_activation_that_is_not_known():
    arguments = list(calls()["norm_mlp"])
    arguments[12] = "tanh"
    for run in (torch.ops.shadowc.norm_mlp, native.CUDA_LAUNCHERS["norm_mlp"]):
        with pytest.raises(KernelError, match=r"(?s)'activation'.*relu.*tanh"):
            run(*arguments)


@pytest.mark.parametrize("op", ["norm_linear", "norm_qkv", "scaled_out_proj", "norm_mlp"])
def test_more_rows_than_a_tile_has(op):
    arguments = calls(17, device="meta")[op]
    with cuda.recording(), pytest.raises(KernelError, match=r"(?s)too many rows.*at most 16"):
        native.CUDA_LAUNCHERS[op](*arguments)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("op", OPS)
def test_meta_tensors(op, batch):
    """Launchers give what the op's fake promises; only the number of parts is their own."""
    arguments = calls(batch, device="meta")[op]
    with cuda.recording() as noted:
        got = native.CUDA_LAUNCHERS[op](*arguments)
    assert noted
    want = getattr(torch.ops.shadowc, op)(*arguments)
    pairs = [(got, want)] if isinstance(got, Tensor) else zip(got, want, strict=True)
    for here, there in pairs:
        assert here.dtype == there.dtype
        if here.shape[-1] == 2:  # stats
            assert (len(here), here.dim()) == (batch, 3)
        else:
            assert here.shape == there.shape
