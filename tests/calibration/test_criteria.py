import dataclasses

import pytest
import torch

from shadowc.calibration import criteria
from shadowc.calibration.criteria import CRITERIA, Moments, Units, find_criterion
from shadowc.errors import OptionError


@pytest.fixture
def units() -> Units:
    generator = torch.Generator().manual_seed(0)
    a, g = torch.randn(2, 2, 3, 5, 4, generator=generator)
    return Units("heads", 0, a, g, generator)


def test_formulas(units):
    a, g = units.a.double(), units.g.double()
    expected = {"plainact": (a * g).sum(-1).abs(), "l2norm": (a**2).sum(-1).sqrt()}
    expected["sens"] = expected["l2norm"]
    for name, scores in expected.items():
        torch.testing.assert_close(CRITERIA[name].score(units).double(), scores, rtol=1e-5, atol=0)


def test_the_factor_of_sens_is_the_rms_gradient():
    square = torch.tensor([4.0, 9.0])
    assert CRITERIA["sens"].factor(Moments(square)).tolist() == [2.0, 3.0]
    assert CRITERIA["plainact"].factor is None


def test_neurons_are_heads_of_width_one(units):
    a, g = units.a[..., :1], units.g[..., :1]
    scores = CRITERIA["l2norm"].score(dataclasses.replace(units, a=a, g=g))
    torch.testing.assert_close(scores, a[..., 0].abs())


def test_random_is_seeded_and_not_constant(units):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return CRITERIA["random"].score(dataclasses.replace(units, generator=generator))

    assert draw(1).shape == (2, 3, 5) and draw(1).unique().numel() == 30
    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_is_described_and_scores_every_token(units, name):
    criterion = CRITERIA[name]
    assert criterion.name == name and criterion.formula and criterion.source
    assert criterion.score.__doc__
    scores = criterion.score(units)
    assert scores.shape == (2, 3, 5) and (scores >= 0).all()


def test_unknown_criterion_lists_the_known_ones():
    with pytest.raises(OptionError, match="plainact, l2norm, sens, random"):
        find_criterion("plainactt")


def test_a_predictor_cannot_learn_an_aggregate_criterion(monkeypatch):
    whole = dataclasses.replace(CRITERIA["random"], name="whole", per_token=False)
    monkeypatch.setitem(criteria.CRITERIA, "whole", whole)
    assert find_criterion("whole", predictor="static") is whole
    with pytest.raises(OptionError, match="--predictor static"):
        find_criterion("whole", predictor="shadow")
