"""The kernel of select_above, interpreted on the CPU; see test_select.py for how it is run."""

import os
import sys

if "triton" not in sys.modules:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton

import pytest
import torch

import shadowc.kernels.select_above  # noqa: F401
from shadowc.cuda import recording, using

tl = pytest.importorskip("triton.language")
from shadowc.kernels.cuda import select_above as module  # noqa: E402

INTERPRETED = type(tl.sum).__name__ == "InterpretedFunction"
interpreted = pytest.mark.skipif(not INTERPRETED, reason="runs in a process of its own")


@pytest.mark.skipif(INTERPRETED, reason="the tests run right here")
def test_all_of_this_interpreted(interpreted_alone):
    interpreted_alone()


@interpreted
@pytest.mark.parametrize("chunk", [128, 1024])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 17), (1, 2, 128), (2, 1, 4097)], ids=str)
def test_it_gives_what_the_native_one_gives(monkeypatch, shape, chunk):
    """Every index, also of the units that are not kept."""
    monkeypatch.setattr(module, "CHUNK", chunk)
    torch.manual_seed(0)
    scores = torch.randn(shape)
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0, 0.0):
        scores[torch.rand_like(scores) < 0.02] = value
    for least in (0.0, -0.0, 0.7, -torch.inf, torch.inf):
        threshold = torch.full((shape[1],), least)
        threshold[1:] += torch.arange(1.0, shape[1]) * 0.1
        got = module.select_above(scores, threshold)
        want = torch.ops.shadowc.select_above(scores, threshold)
        for ours, native in zip(got, want, strict=True):
            assert ours.dtype == native.dtype and torch.equal(ours, native)


@interpreted
@pytest.mark.parametrize(("gpu", "kernels"), [("a100", 1), ("h100", 2)])  # the second: a fence
def test_meta_tensors_note_one_kernel(gpu, kernels):
    with using(gpu, None), recording() as noted:
        scores, threshold = (torch.empty(s, device="meta") for s in ((1, 2, 20480), (2,)))
        index, count = module.select_above(scores, threshold)
    assert len(noted) == kernels and index.shape == (2, 1, 20480) and count.shape == (2, 1)
