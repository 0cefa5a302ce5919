"""What compile compares, and how much may differ."""

from __future__ import annotations

import pytest

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
