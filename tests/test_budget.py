"""Byte budgets: they are met, cost least by the calibration's own table, and run as they say."""

import dataclasses
import itertools

import pytest
import torch

from shadowc.budget import allot, elements_read
from shadowc.calibration.damage import LEVELS, damage, damage_table
from shadowc.compiler import build_programs
from shadowc.config import Policy
from shadowc.errors import OptionError
from shadowc.evaluation.masks import teacher_forced
from shadowc.evaluation.within import largest_budget
from shadowc.passes.manager import copy_module
from shadowc.runtime.session import Session
from shadowc.targets import load_target

POLICY = Policy(0.5, 0.5, min_neurons=2)


def whole(calibration) -> int:
    return calibration.shape.layers * calibration.shape.layer_elements


def total_damage(calibration, policy) -> float:
    """What a policy costs by the table, between its levels by lines."""
    total = 0.0
    for kind in ("head", "neuron"):
        table = getattr(calibration, f"{kind}_damage").double()
        shares = torch.tensor(getattr(policy, f"{kind}_shares"), dtype=torch.float64)
        place = (1 - shares) * (LEVELS - 1)
        low = place.floor().long().clamp(max=LEVELS - 2)[:, None]
        ends = table.gather(1, low), table.gather(1, low + 1)
        total += float(torch.lerp(*ends, place[:, None] - low).sum())
    return total


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.45])
def test_a_budget_is_met_exactly_and_keeps_the_floors(tiny, fraction):
    calibration = tiny.with_taps((0, 1, 2), "entry").calibration
    policy = allot(calibration, fraction, POLICY)
    read = elements_read(calibration, policy) / whole(calibration)
    assert read == pytest.approx(1 - fraction, abs=1e-4)
    assert policy.selection == "threshold" and policy.head_shares[0] == 1.0
    assert min(policy.head_shares) * tiny.shape.heads >= policy.min_heads - 1e-9
    assert min(policy.neuron_shares) * tiny.shape.ffn >= policy.min_neurons - 1e-9
    assert policy.neuron_sparsity == pytest.approx(1 - sum(policy.neuron_shares) / 3)
    assert policy.heads_kept(tiny.shape) >= 2 and policy.neurons_kept(tiny.shape) > 0


def test_no_other_levels_cost_less(tiny_opt):
    """Against every choice of levels of a model with two layers that differ."""
    calibration = tiny_opt.with_taps((0, 1, 2), "entry").calibration
    steep, flat = torch.linspace(0, 9, LEVELS) ** 3, torch.linspace(0, 0.1, LEVELS) ** 3
    dear = torch.full((3, LEVELS), 1e6).scatter(1, torch.zeros(3, 1, dtype=torch.int64), 0.0)
    calibration = dataclasses.replace(
        calibration, head_damage=dear, neuron_damage=torch.stack((steep, flat, steep))
    )
    policy = allot(calibration, 0.3, POLICY)
    assert policy.head_sparsity == 0 and policy.neuron_shares[1] < min(policy.neuron_shares[::2])
    found = total_damage(calibration, policy)
    levels = [1 - i / (LEVELS - 1) for i in range(LEVELS)]
    for shares in itertools.product(levels, repeat=3):
        other = dataclasses.replace(policy, neuron_shares=shares)
        if elements_read(calibration, other) <= 0.7 * whole(calibration):
            assert total_damage(calibration, other) >= found * (1 - 0.02)


def test_zero_rows_are_free_and_too_much_is_refused(tiny_opt):
    calibration = tiny_opt.calibration
    zeros = dataclasses.replace(calibration, zero_rate=torch.full_like(calibration.zero_rate, 0.9))
    policy = allot(zeros, 0.15, POLICY)
    assert policy.neuron_sparsity == policy.head_sparsity == 0 and policy.neuron_shares == ()
    with pytest.raises(OptionError, match="more than this model") as refused:
        allot(calibration, 0.99, POLICY)
    assert "--rank" in str(refused.value)


@pytest.mark.parametrize("predictor", ["shadow", "layerwise", "static"])
def test_shares_of_layers_run_as_they_are_allotted(tiny, predictor):
    """Lowered and masked agree; `static` keeps exactly its shares."""
    taps = {"shadow": (0,), "layerwise": (0, 1, 2), "static": (0,)}[predictor]
    calibration = tiny.with_taps(taps).calibration
    if predictor == "static":
        calibration = calibration.static()
    policy = allot(calibration, 0.4, POLICY)
    built = build_programs(
        copy_module(tiny.traced), tiny.loaded, calibration, policy, load_target("cpu"),
        torch.float32,
    )  # fmt: skip
    session = Session(tiny.shape, policy, built.programs, built.packed, built.keep, 32)
    ids = tiny.ids()
    masked = teacher_forced(session, ids, prompt=4)
    cache = session.new_cache(2)
    session.step(ids[:, :4], cache)
    for place in range(4, ids.shape[1]):
        logits = session.step(ids[:, place : place + 1], cache)["logits"]
        torch.testing.assert_close(logits[:, 0], masked["logits"][:, place], atol=1e-4, rtol=1e-4)
    if predictor == "static":
        kept = masked["neuron_mask"][0, -1].float().mean(-1)
        expected = torch.tensor(policy.neuron_shares)
        torch.testing.assert_close(kept, expected, atol=0.51 / tiny.shape.ffn, rtol=0)


def test_damage_squares_what_is_skipped_together():
    """Units are skipped lowest score first; effects that cancel cost nothing together."""
    scores = torch.arange(32.0).flip(0).expand(2, -1)  # the last unit goes first
    effects = torch.zeros(2, 32)
    effects[0, 31], effects[0, 30], effects[1, 0] = 2.0, -2.0, 1.0
    table = damage_table(damage(scores, effects), 2)
    assert table[0] == 0
    # One unit alone: 2^2 / 2 over two tokens. With the next one nothing, but a table never falls.
    assert table[1:32].tolist() == [1.0] * 31 and table[32] == 1.0


def test_the_largest_budget_within_a_bound(tiny_opt):
    """On text that the model itself finds likely, so that skipping makes it less so."""
    tiny = tiny_opt.with_taps((0, 1, 2), "entry")
    with torch.no_grad():
        ids = torch.arange(4, 8)[:, None]
        for _ in range(23):
            ids = torch.cat((ids, tiny.loaded.model(ids).logits[:, -1:].argmax(-1)), dim=1)
    windows, bound, seen = ids.tolist(), 0.4, []
    found = largest_budget(
        tiny.loaded, tiny.calibration, POLICY, bound, windows,
        report=lambda *one: seen.append(one),
    )  # fmt: skip
    assert sorted(seen) == [*found.tried] and len(seen) == 7
    within = [fraction for fraction, increase in found.tried if increase <= bound]
    assert within and found.fraction == max(within) and found.increase <= bound
    assert [increase for fraction, increase in found.tried if fraction > found.fraction]
    read = elements_read(tiny.calibration, found.policy) / whole(tiny.calibration)
    assert read == pytest.approx(1 - found.fraction, abs=1e-3)
    with pytest.raises(OptionError, match="above 0"):
        largest_budget(tiny.loaded, tiny.calibration, POLICY, 0.0, windows)
    with pytest.raises(OptionError, match="fixed scores"):
        largest_budget(tiny.loaded, tiny.calibration.static(), POLICY, 0.1, windows)
