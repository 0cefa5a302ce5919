"""choose_into against its definition, and against the ops that it is made of."""

import pytest
import torch

from shadowc.errors import KernelError
from shadowc.kernels.choose_into import choose_into_reference

choose_into = torch.ops.shadowc.choose_into
ONE, BOTH = [(3, 130)], [(1, 12), (2, 257)]  # layers and units of each kind


def integers(*size: int) -> torch.Tensor:
    """Small ones, whose products and sums are exact in any order: ties too must agree."""
    return torch.randint(-3, 4, size).float()


def matrices(kinds, rank, width, dtype, make=integers):
    """first, its bias, and weights, biases and thresholds of each kind."""
    first = (None, None) if width is None else (make(rank, width).to(dtype), make(rank))
    weights = [make(layers * units, rank).to(dtype) for layers, units in kinds]
    biases = [make(layers * units) for layers, units in kinds]
    return (*first, weights, biases, [make(layers) for layers, _ in kinds])


def room(kinds, batch, more=2):
    """Sets of two layers more than the tap chooses, none of them written yet."""
    return [
        torch.full(size, -7, dtype=torch.int32)
        for layers, units in kinds
        for size in ((layers + more, batch, units), (layers + more, batch))
    ]


@pytest.mark.parametrize("least", [None, torch.inf, -torch.inf], ids=["ties", "none", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kinds", [ONE, BOTH, [(1, 1)], [(1, 9), (1, 1536)]], ids=str)
@pytest.mark.parametrize(
    ("batch", "width", "rank"), [(1, 48, 64), (1, None, 17), (3, 17, 5), (70, 1, 1)]
)
def test_definition(each_isa, batch, width, rank, kinds, dtype, least):
    first, first_bias, weights, biases, thresholds = matrices(kinds, rank, width, dtype)
    x = integers(batch, 1, width or rank)
    code = x[:, 0] if first is None else x[:, 0] @ first.float().T + first_bias
    sets = room(kinds, batch)
    scores = [
        (code @ w.float().T + b).view(batch, *kind)
        for w, b, kind in zip(weights, biases, kinds, strict=True)
    ]
    # Each threshold is one of the scores that it parts, so that there is a tie.
    thresholds = [
        s[0, :, 0].clone() if least is None else torch.full_like(t, least)
        for s, t in zip(scores, thresholds, strict=True)
    ]
    at = [1] * len(kinds)
    assert choose_into(x, first, first_bias, weights, biases, thresholds, sets, at) is None
    for k, (_, units) in enumerate(kinds):
        index, count = sets[2 * k : 2 * k + 2]
        kept = (scores[k] > thresholds[k][:, None]).transpose(0, 1)
        assert torch.equal(count[1:-1], kept.sum(-1, dtype=torch.int32))
        ascending = torch.arange(units)
        ranked = ascending.where(kept, 2 * units - ascending).argsort(-1).int()
        assert torch.equal(index[1:-1], ranked)
        for whole in (index, count):  # the layers of other taps
            assert (whole[[0, -1]] == -7).all()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_what_it_is_made_of_for_any_number_of_threads(each_isa, batch, dtype):
    kinds = [(1, 32), (2, 3000)]  # so many that threads share the work
    arguments = torch.randn(batch, 1, 300), *matrices(kinds, 64, 300, dtype, make=torch.randn)
    want, threads = room(kinds, batch, 0), torch.get_num_threads()
    choose_into_reference(*arguments, want, [0, 0])
    assert 0 < int(want[3].sum()) < want[2].numel()
    try:
        for some in (1, 2, 5):
            torch.set_num_threads(some)
            got = room(kinds, batch, 0)
            choose_into(*arguments, got, [0, 0])
            assert all(torch.equal(*pair) for pair in zip(got, want, strict=True)), some
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("'x'", 0, torch.zeros(1, 2, 16)),
        ("'x'", 0, torch.zeros(1, 1, 32)[..., ::2]),
        ("'first'", 1, torch.zeros(8, 15)),
        ("'first_bias'", 2, torch.zeros(9)),
        ("'weight'", 3, [torch.zeros(11, 8)]),
        ("'weight'", 3, [torch.zeros(12, 8, dtype=torch.float64)]),
        ("'bias'", 4, [torch.zeros(12).half()]),
        ("'threshold'", 5, [torch.zeros(2).half()]),
        ("'index'", 6, [torch.zeros(4, 1, 6), torch.zeros(4, 1, dtype=torch.int32)]),
        ("'count'", 6, [torch.zeros(4, 1, 6, dtype=torch.int32)] * 2),
        ("'at'", 7, [3]),
        ("'at'", 7, [-1]),
        ("heads, neurons or both", 6, []),
        ("heads, neurons or both", 7, [0, 0]),
    ],
)
def test_refuses(name, place, value):
    arguments = [
        torch.zeros(1, 1, 16), *matrices([(2, 6)], 8, 16, torch.float32), room([(2, 6)], 1), [2]
    ]  # fmt: skip
    choose_into(*arguments)
    arguments[place] = value
    with pytest.raises(KernelError, match=name):
        choose_into(*arguments)
