"""The kernels of choose_above, interpreted on the CPU; see test_select.py for how it is run."""

import os
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import pytest
import torch

from shadowc.cuda import recording, using
from shadowc.kernels.choose_above import choose_above_reference

tl = pytest.importorskip("triton.language")
from shadowc.kernels.cuda import choose_above as module  # noqa: E402

INTERPRETED = type(tl.sum).__name__ == "InterpretedFunction"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")

ONE, BOTH = [(1, 300)], [(2, 12), (3, 130)]


@pytest.mark.skipif(INTERPRETED, reason="the tests run right here")
def test_all_of_this_interpreted(interpreted_alone):
    interpreted_alone()


def arguments(kinds, batch: int, rank: int, device: str = "cpu"):
    """Small integers, whose products and sums are exact in any order: ties too must agree."""
    draw = torch.Generator().manual_seed(len(kinds) + batch + rank)

    def integers(*size):
        return torch.randint(-3, 4, size, generator=draw)

    weights = [integers(layers * units, rank).half() for layers, units in kinds]
    biases = [integers(layers * units).half() for layers, units in kinds]
    thresholds = [integers(layers).float() for layers, _ in kinds]
    code = integers(batch, 1, rank).float()
    lists = [[t.to(device) for t in many] for many in (weights, biases, thresholds)]
    return code.to(device), *lists


@interpreted
@pytest.mark.parametrize("chunk", [128, 1024])
@pytest.mark.parametrize("kinds", [ONE, BOTH, [(1, 1)], [(1, 64), (1, 1024)]], ids=str)
@pytest.mark.parametrize(("batch", "rank"), [(1, 64), (2, 5)])
def test_it_gives_what_its_parts_give(monkeypatch, kinds, chunk, batch, rank):
    """Every index, also of the units that are not kept; thresholds at both ends too."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    code, weights, biases, thresholds = arguments(kinds, batch, rank)
    for least in (0.0, torch.inf, -torch.inf):
        given = [t + least for t in thresholds]
        got = module.choose_above(code, weights, biases, given, True)
        want = choose_above_reference(code, weights, [b.float() for b in biases], given)
        assert len(got) == len(want) == 2 * len(kinds)
        for ours, reference in zip(got, want, strict=True):
            assert ours.dtype == reference.dtype and torch.equal(ours, reference)


@interpreted
@pytest.mark.parametrize(
    ("gpu", "soon", "kernels"), [("a100", True, 2), ("h100", True, 3), ("h100", False, 2)]
)
def test_meta_tensors_note_two_kernels(gpu, soon, kernels):
    """And a fence, where the next kernel would read ahead."""
    with using(gpu, None), recording() as noted:
        found = module.choose_above(*arguments(BOTH, 1, 64, "meta"), soon)
    assert len(noted) == kernels
    assert [f.shape for f in found] == [(2, 1, 12), (2, 1), (3, 1, 130), (3, 1)]
