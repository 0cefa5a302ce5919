"""Budgets become thresholds: what they keep of the scores whose quantiles they come from."""

import dataclasses

import pytest
import torch

from shadowc.calibration.quantiles import QUANTILES, histogram, quantiles
from shadowc.config import Policy, taps_of
from shadowc.errors import OptionError
from shadowc.selection import TopK, default_selection, selections, thresholds

UNITS, TOKENS = 500, 400


def scores(seed: int = 0) -> torch.Tensor:
    """[L, N, tokens]: layers of different spread and level, one with many equal scores."""
    generator = torch.Generator().manual_seed(seed)
    found = (
        torch.randn(4, UNITS, TOKENS, generator=generator)
        * torch.tensor([1, 3, 0.2, 1])[:, None, None]
    )
    found += torch.tensor([0.0, 0.5, -3.0, 0.1])[:, None, None]
    found[3, : UNITS // 4] = 0.0  # units that never matter
    return found


def quantiles_of(values: torch.Tensor) -> torch.Tensor:
    """As calibration makes them, a batch after the other."""
    rows = []
    for layer in values:
        counts = sum(histogram(batch.contiguous()) for batch in layer.split(33, dim=1))
        rows.append(quantiles(counts))
    return torch.stack(rows)


def kept(values: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """Mean number of units above, [L]."""
    return (values > threshold[:, None, None]).sum((1, 2)) / values.shape[2]


def test_quantiles_are_quantiles():
    values = scores()
    found = quantiles_of(values)
    assert found.shape == (4, QUANTILES) and (found.diff(dim=1) >= 0).all()
    steps = torch.linspace(0, 1, QUANTILES)
    for layer, row in zip(values, found, strict=True):
        below = (layer.flatten() <= row[:, None]).float().mean(1)
        strictly = (layer.flatten() < row[:, None] - 1e-30).float().mean(1)
        assert (strictly - 0.003 <= steps).all() and (steps <= below + 0.003).all()


def test_quantiles_of_one_value_and_of_all_signs():
    one = quantiles(histogram(torch.full((10,), -2.5)))
    assert (one + 2.5).abs().max() < 2.5 / 128
    found = quantiles(histogram(torch.tensor([-1.0, -0.0, 0.0, 1.0])))
    assert found[0] == pytest.approx(-1.0, abs=0.01) and found[-1] == pytest.approx(1.0, abs=0.01)
    assert found[QUANTILES // 2].abs() < 1e-30


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_local_thresholds_keep_each_layers_budget(share):
    values, keep = scores(), int(share * 4 * UNITS)
    found = kept(values, thresholds(quantiles_of(values), UNITS, keep, 0, local=True))
    at_most = torch.tensor([UNITS, UNITS, UNITS, 0.75 * UNITS])
    expected = torch.full((4,), share * UNITS).minimum(at_most)
    assert (found[:3] - expected[:3]).abs().max() < 0.005 * UNITS
    assert found[3] <= share * UNITS + 0.005 * UNITS  # equal scores are all in or all out


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("floor", [0, 20])
def test_global_thresholds_keep_the_models_budget_and_the_floors(share, floor):
    values, keep = scores(), int(share * 4 * UNITS)
    found = thresholds(quantiles_of(values), UNITS, keep, floor, local=False)
    units = kept(values, found)
    assert units.sum() == pytest.approx(keep, abs=0.005 * 4 * UNITS)
    assert (units >= floor - 0.005 * UNITS).all()
    if share == 0.3:  # layer 2 is below all others: its floor is all it gets
        assert units[2] == pytest.approx(floor, abs=0.005 * UNITS)
        others = found[torch.tensor([0, 1, 3])]
        assert (others == others[0]).all()


@pytest.mark.parametrize("local", [False, True])
def test_a_budget_of_everything_and_no_layers(local):
    values = scores()
    found = thresholds(quantiles_of(values), UNITS, 4 * UNITS, 0, local)
    assert (found == -torch.inf).all()
    assert thresholds(torch.empty(0, QUANTILES), 4, 0, 1, local).shape == (0,)


def test_each_tap_gets_the_thresholds_of_its_layers(tiny_opt):
    policy = Policy(0.4, 0.5, min_neurons=2, selection="threshold")
    one, several = (tiny_opt.with_taps(taps).calibration for taps in ((0,), (0, 1, 2)))
    several = dataclasses.replace(
        several, head_quantiles=one.head_quantiles, neuron_quantiles=one.neuron_quantiles
    )
    ((_, heads, neurons),) = selections(one, policy)
    assert heads.shape == (2,) and neurons.shape == (3,)
    found = selections(several, policy)
    assert [tap for tap, *_ in found] == list(taps_of(3, (0, 1, 2)))
    assert torch.equal(torch.cat([part[1] for part in found]), heads)
    assert torch.equal(torch.cat([part[2] for part in found]), neurons)


def test_defaults_and_refusals(tiny_opt):
    assert [default_selection(n) for n in (0, 1, 2, 10)] == [
        "topk",
        "topk",
        "threshold",
        "threshold",
    ]
    several = tiny_opt.with_taps((0, 2)).calibration
    with pytest.raises(OptionError, match=r"(?s)later layers have no scores yet.*threshold"):
        selections(several, Policy(0.5, 0.5, min_neurons=2))
    local = selections(several, Policy(0.5, 0.5, min_neurons=2, scope="local"))
    assert local[0][2] == TopK(96, 2, True) and local[1][1] == TopK(0, 1, True)
    static = dataclasses.replace(several, predictor="static", taps=())
    with pytest.raises(OptionError, match="fixed scores need no threshold"):
        selections(static, Policy(0.5, 0.5, selection="threshold"))
    with pytest.raises(OptionError, match="unknown selection 'best'"):
        Policy(0.5, 0.5, selection="best")


@pytest.mark.parametrize("taps", [(), (1,), (0, 3), (0, 2, 1), (0, 0)])
def test_taps_begin_with_0_and_ascend(taps):
    with pytest.raises(OptionError, match="taps are out of order"):
        taps_of(3, taps)


@pytest.mark.parametrize("taps", [(0,), (0, 2), (0, 1, 4), tuple(range(5))])
def test_taps_share_out_all_units(taps):
    found = taps_of(5, taps)
    assert [tap.layer for tap in found] == list(taps)
    assert [layer for tap in found for layer in tap.neurons] == [0, 1, 2, 3, 4]
    assert [layer for tap in found for layer in tap.heads] == [1, 2, 3, 4]
    for tap in found:  # nothing is scored before the tap has read
        assert all(layer >= tap.layer for layer in tap.neurons)
        assert all(layer > tap.layer for layer in tap.heads)
