import pytest
import torch

from shadowc.errors import KernelError
from shadowc.kernels.decode_attention import decode_attention_reference

SHAPES = [(1, 1, 1, 8), (2, 4, 4, 24), (3, 9, 3, 64), (5, 4, 2, 256)]


def tensors(batch, tokens, heads, groups, width, slots, rotary=True):
    cos, sin = torch.randn(2, batch, tokens, width)
    return {
        "q": torch.randn(batch, tokens, heads * width),
        "k": torch.randn(batch, tokens, groups * width),
        "v": torch.randn(batch, tokens, groups * width),
        "cos": cos if rotary else None,
        "sin": sin if rotary else None,
        "k_cache": torch.full((batch + 1, groups, slots, width), torch.nan),
        "v_cache": torch.full((batch + 1, groups, slots, width), torch.nan),
    }


@pytest.mark.parametrize("share", ["None", "zero", "one", "half", "all"])
@pytest.mark.parametrize("batch, heads, groups, width", SHAPES)
@pytest.mark.parametrize("position", [0, 17, 300])
def test_decode_attention(each_isa, agree, keep_set, share, batch, heads, groups, width, position):
    """Slots before the start and after the position are NaN."""
    slots = position + 3
    given = tensors(batch, 1, heads, groups, width, slots, rotary=bool(position % 2))
    start = torch.randint(0, position + 1, (batch,))
    for b in range(batch):
        for name in ("k_cache", "v_cache"):
            old = slice(start[b], position)
            given[name][b, :, old] = torch.randn_like(given[name][b, :, old])
    keep = keep_set(share, batch, heads)
    rest = (start, torch.tensor([position]), width**-0.5, *keep)
    copy = {name: None if t is None else t.clone() for name, t in given.items()}
    want = decode_attention_reference(*copy.values(), *rest)
    got = torch.ops.shadowc.decode_attention(*given.values(), *rest)
    agree("decode_attention", got, want)
    for name in ("k_cache", "v_cache"):
        torch.testing.assert_close(given[name], copy[name], equal_nan=True)
        assert given[name][batch].isnan().all()


@pytest.mark.parametrize("rotary", [True, False])
def test_prefill_equals_token_by_token(agree, rotary):
    """Also with left padding: tokens before the start give zeros and are never seen."""
    tokens, slots = 12, 16
    given = tensors(3, tokens, 4, 2, 16, slots, rotary)
    start = torch.tensor([0, 5, 2])
    stepwise = {name: None if t is None else t.clone() for name, t in given.items()}
    whole = torch.ops.shadowc.decode_attention(
        *given.values(), start, torch.tensor([0]), 0.25, None, None
    )
    parts = []
    for t in range(tokens):
        new = [
            None if stepwise[n] is None else stepwise[n][:, t : t + 1].contiguous()
            for n in ("q", "k", "v", "cos", "sin")
        ]
        caches = stepwise["k_cache"], stepwise["v_cache"]
        position = torch.tensor([t])
        parts.append(
            torch.ops.shadowc.decode_attention(*new, *caches, start, position, 0.25, None, None)
        )
    agree("decode_attention", torch.cat(parts, 1), whole)
    assert not whole[1, :5].any() and whole[1, 5:].any()
    torch.testing.assert_close(given["k_cache"], stepwise["k_cache"], equal_nan=True)


def test_same_result_for_any_number_of_threads():
    given = tensors(2, 1, 6, 2, 64, 600)
    given["k_cache"].normal_()
    given["v_cache"].normal_()
    rest = (torch.zeros(2, dtype=torch.int64), torch.tensor([599]), 0.125, None, None)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        results.append(torch.ops.shadowc.decode_attention(*given.values(), *rest))
    torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize(
    "name, change",
    [
        ("position", {"position": torch.tensor([10])}),
        ("position", {"position": torch.tensor([-1])}),
        ("position", {"position": torch.tensor(3)}),
        ("start", {"start": torch.zeros(3, dtype=torch.int64)}),
        ("k_cache", {"k_cache": torch.randn(2, 2, 10, 16).double()}),
        ("v_cache", {"v_cache": torch.randn(2, 2, 9, 16)}),
        ("k_cache", {"k_cache": torch.randn(2, 2, 10, 12)}),
        ("q", {"k_cache": torch.randn(1, 2, 10, 16), "v_cache": torch.randn(1, 2, 10, 16)}),
        ("q", {"q": torch.randn(2, 1, 40)}),
        ("k", {"k": torch.randn(2, 1, 16)}),
        ("cos", {"cos": torch.randn(2, 1, 8)}),
        ("rotary", {"cos": None}),
        ("index", {"index": torch.zeros(2, 3, dtype=torch.int32)}),
    ],
)
def test_refuses(name, change):
    arguments = tensors(2, 1, 4, 2, 16, 10) | {
        "start": torch.zeros(2, dtype=torch.int64),
        "position": torch.tensor([9]),
        "scale": 0.25,
        "index": torch.zeros(2, 4, dtype=torch.int32),
        "count": torch.zeros(2, dtype=torch.int32),
    }
    torch.ops.shadowc.decode_attention(**arguments)
    with pytest.raises(KernelError, match=name):
        torch.ops.shadowc.decode_attention(**(arguments | change))


def test_prefill_beyond_the_cache_is_refused():
    given = tensors(1, 4, 2, 2, 16, 10)
    with pytest.raises(KernelError, match="'position'"):
        torch.ops.shadowc.decode_attention(
            *given.values(), torch.tensor([0]), torch.tensor([7]), 0.25, None, None
        )
