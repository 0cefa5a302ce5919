"""What compile compares, and how much may differ."""

from __future__ import annotations

import copy

import pytest
import torch

from shadowc.config import Policy
from shadowc.errors import NumericsError
from shadowc.evaluation import numerics
from shadowc.targets import Tolerances, load_target


def test_masks_may_differ_more_the_more_predictors_read_what_others_left(tiny):
    policy = Policy(0.5, 0.5, min_neurons=2, selection="threshold")
    some = Tolerances(decode=1e-3, original=0.1, masks=1e-3)
    assert numerics.mask_tolerance(tiny.session(policy), some) == pytest.approx(1e-3)
    layered = tiny.with_taps((0, 1, 2)).session(policy)
    assert numerics.mask_tolerance(layered, some) == pytest.approx(3e-3)
    loose = Tolerances(decode=1e-3, original=0.1, masks=0.04)
    assert numerics.mask_tolerance(layered, loose) == pytest.approx(0.05)


def test_other_units_are_refused(tiny, monkeypatch):
    policy = Policy(0.5, 0.5, min_neurons=2, selection="threshold")
    session, masks_of = tiny.with_taps((0, 1, 2)).session(policy), numerics.masks_of

    def other(*args):
        heads, neurons = masks_of(*args)
        return heads, ~neurons

    tolerances = load_target("cpu").tolerances(tiny.loaded.model.dtype)
    assert numerics.check_numerics(session, tiny.loaded, tolerances)["mask_mismatch"] < 3e-3
    monkeypatch.setattr(numerics, "masks_of", other)
    with pytest.raises(NumericsError, match="selects other units"):
        numerics.check_numerics(session, tiny.loaded, tolerances)


def test_half_precision_weights_compute_in_float32(tiny):
    """As a model in fp32 with the same weights, to the last bit; and then as before."""
    half = copy.deepcopy(tiny.loaded.model).to(torch.bfloat16)
    wide, ids = copy.deepcopy(half).float(), tiny.ids()
    before = half(ids).logits
    with numerics.in_float32(half):
        found = half(ids).logits
    assert torch.equal(found, wide(ids).logits) and not torch.equal(found, before.float())
    assert torch.equal(half(ids).logits, before)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_weights_are_restored_after_an_error(tiny_opt):
    half = copy.deepcopy(tiny_opt.loaded.model).to(torch.bfloat16)
    with pytest.raises(IndexError), numerics.in_float32(half):
        half(torch.tensor([[10**6]]))
    with pytest.raises(RuntimeError), numerics.in_float32(half):
        half.lm_head(torch.zeros(1, 3))  # after its weight is widened
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
