"""The kernels of select, interpreted on the CPU.

Triton decides while it is imported whether kernels are compiled or interpreted, and a process can
do only one of the two. Where Triton was imported before (transformers does), the tests run in a
process of their own.
"""

import os
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import pytest
import torch
from torch import Tensor

from shadowc.cuda import recording, using
from shadowc.kernels.select import select_reference

tl = pytest.importorskip("triton.language")
from shadowc.kernels.cuda import select as module  # noqa: E402

INTERPRETED = type(tl.sum).__name__ == "InterpretedFunction"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")

SPREADS = {
    "normal": lambda x: x,
    "exponential": lambda x: (20 * x).exp(),  # 1e-35 to infinity: all octaves
    "small": lambda x: x * 1e-41,  # subnormal
    "relu": lambda x: x.relu(),
    "few": lambda x: x.round(),
    "equal": torch.zeros_like,
}


@pytest.mark.skipif(INTERPRETED, reason="the tests run right here")
def test_all_of_this_interpreted(interpreted_alone):
    interpreted_alone()


@pytest.fixture(params=["one program", "passes"])
def path(request, monkeypatch):
    """Both ways to the result, the second one with chunks that small models fill as well."""
    if request.param == "passes":
        monkeypatch.setattr(module, "TILE", 0)
        monkeypatch.setattr(module, "CHUNK", 1024)


def check(scores: Tensor, keep: int, floor: int, local: bool) -> None:
    """Against the reference: kept units ascending, then the others ascending."""
    index, count = module.select(scores, keep, floor, local)
    mask = select_reference(scores, keep, floor, local).transpose(0, 1)  # [L, B, N]
    assert index.dtype == count.dtype == torch.int32
    assert torch.equal(count, mask.sum(-1, dtype=torch.int32))
    assert torch.equal(index, (~mask).int().argsort(dim=-1, stable=True).int())


def spoiled(scores: Tensor) -> Tensor:
    """With some values that are not numbers, infinite, or negative zeros."""
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 0.0):
        scores[torch.rand_like(scores) < 0.02] = value
    return scores


def check_keep_counts(*shape: int) -> None:
    _, layers, units = shape
    total = layers * units
    half = (total + 1) // 2
    scores = spoiled(torch.randn(shape))
    for keep, floor in (
        (0, 0),
        (1, 0),
        (half, 0),
        (half, half // layers // 2),
        (half // layers * layers, half // layers),
        (total, 0),
        (total, units),
    ):
        check(scores, keep, floor, False)
    for keep in (0, 1, half, total):
        check(scores, keep, 0, True)


@interpreted
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 2, 17), (1, 2, 127), (1, 2, 1100)], ids=str)
def test_keep_counts(path, shape):
    check_keep_counts(*shape)


@interpreted
def test_keep_counts_of_heads():
    check_keep_counts(1, 40, 128)


@interpreted
@pytest.mark.parametrize("spread", SPREADS)
def test_spreads(path, spread):
    layers, units = 4, 1500
    scores = torch.randn(1, layers, units)
    scores[:, 1] += 2  # a layer above the others, whose floors then decide
    scores[:, 2] -= 1
    scores = SPREADS[spread](scores)
    keep = layers * units // 3
    check(scores, keep, 0, False)
    check(scores, keep, units // 6, False)
    check(scores, keep, 0, True)


@interpreted
def test_ties_go_to_the_lowest_layer_then_unit(path):
    scores = torch.tensor([[[1.0, 0.0, -0.0], [0.0, 2.0, 0.0], [-0.0, 0.0, 3.0]]])
    index, count = module.select(scores, 6, 0, False)
    assert index.squeeze(1).tolist() == [[0, 1, 2], [0, 1, 2], [2, 0, 1]]
    assert count.flatten().tolist() == [3, 2, 1]


@interpreted
@pytest.mark.parametrize("seed", range(5))
def test_many_small_ones(path, seed):
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    batch, layers, units = draw(1, 2), draw(1, 4), draw(1, 40)
    floor = draw(0, units)
    keep = draw(layers * floor, layers * units)
    few = (1, 3, 1000)[draw(0, 2)]  # few distinct values make many ties
    scores = torch.randint(-few, few + 1, (batch, layers, units), generator=generator)
    scores = spoiled(scores.float() * 1e-3)
    check(scores, keep, floor, False)
    check(scores, keep, floor, True)


@interpreted
@pytest.mark.parametrize("pattern", ["random", "neighbours"])
def test_all_floats(path, pattern):
    """Every bin of the first pass, and scores that only the last bits tell apart."""
    bits = torch.randint(-(1 << 31), 1 << 31, (1, 3, 1100))
    if pattern == "neighbours":
        bits = bits % 300 + torch.tensor([0x3F800000, 0, -0x40800000])[:, None]
    scores = bits.to(torch.int32).view(torch.float32)
    for keep in (700, 2300):
        check(scores, keep, keep // 4, False)
        check(scores, keep, 0, True)


@interpreted
def test_a_last_chunk_that_is_not_full():
    """With the sizes as they are, and enough equal scores to be added up."""
    check(torch.randn(1, 2, 17001).relu(), 20000, 300, False)


@interpreted
@pytest.mark.parametrize("shape, kernels", [((2, 3, 17), 1), ((1, 2, 20480), 4)], ids=str)
def test_meta_tensors(shape, kernels):
    for gpu, fences in (("a100", 0), ("h100", 1)):
        with using(gpu, None), recording() as noted:
            index, count = module.select(torch.empty(shape, device="meta"), 9, 1, False)
        assert len(noted) == kernels + fences
    assert index.shape == (shape[1], shape[0], shape[2]) and count.shape == (shape[1], shape[0])
