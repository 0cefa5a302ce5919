"""The benchmark counts what it says it counts."""

from __future__ import annotations

import itertools
import time
from types import SimpleNamespace

import pytest
import torch

from shadowc.config import Policy
from shadowc.evaluation import bench
from shadowc.evaluation.bench import Variant, _take_turns, read_bandwidth, selection_ms

HALF = Policy(0.5, 0.5, min_neurons=2)


def test_variants_take_turns_and_all_decode_the_same_tokens(monkeypatch):
    monkeypatch.setattr(bench, "TURN", 4)
    log = []
    variants = [Variant(lambda token, name=name: log.append((name, int(token)))) for name in "abc"]
    _take_turns(variants, torch.arange(12)[None], lambda share: None)
    for name in "abc":
        assert [token for who, token in log if who == name] == list(range(12))
    firsts = [log[turn * 12][0] for turn in range(3)]
    assert firsts == ["a", "b", "c"]  # another one begins each round
    assert all(len(variant.times) == 12 for variant in variants)


def test_a_slow_variant_sits_out(monkeypatch):
    monkeypatch.setattr(bench, "PATIENCE", 0.2)
    slow = Variant(lambda token: time.sleep(0.03))
    quick = Variant(lambda token: None)
    _take_turns([slow, quick], torch.zeros(1, 80, dtype=torch.int64), lambda share: None)
    assert len(slow.times) == bench.TURN < len(quick.times) == 80


def test_the_median_is_in_milliseconds():
    assert Variant(lambda token: None, times=[0.001, 0.002, 0.5]).ms == pytest.approx(2.0)


def test_a_turn_on_a_device_that_only_starts_work_is_timed_as_a_whole(monkeypatch):
    clock = SimpleNamespace(perf_counter=itertools.count(0, 4).__next__)  # 4 s from call to call
    monkeypatch.setattr(bench, "time", clock)
    log = []
    added = SimpleNamespace(add=lambda results: log.append(f"count {results}"))
    device = Variant(lambda token: int(token), added, wait=lambda: log.append("wait"))
    device.decode(torch.arange(8)[None], measured=False)
    assert log == ["wait", "wait"] and not device.times
    device.decode(torch.arange(8)[None], measured=True)
    assert device.times == [0.5] * 8
    assert log[2:] == ["wait", "wait", "count 7"]


def test_selection_is_timed_inside_the_step_and_is_a_part_of_it(tiny, monkeypatch):
    session, ids = tiny.session(HALF), tiny.ids(1, 24)
    program = session.programs["decode"]
    timer = bench._SelectionTimer(program.inputs, program.outputs, program.weights, program.graph)
    clock = SimpleNamespace(perf_counter=itertools.count().__next__)  # a second from call to call
    monkeypatch.setattr(bench, "time", clock)
    assert selection_ms(session, ids[:, :4], ids[:, 4:]) == 1e3 * len(timer._choosing())
    assert selection_ms(tiny.session(Policy(0.0, 0.0)), ids[:, :4], ids[:, 4:]) is None


def test_selection_is_the_predictor_and_what_ranks(tiny_opt):
    program = tiny_opt.session(HALF).programs["decode"]
    timer = bench._SelectionTimer(program.inputs, program.outputs, program.weights, program.graph)
    names = [str(node.target) for node in timer._choosing()]
    assert sum("shadowc.select" in name for name in names) == 2
    assert not any("sparse" in name or "attention" in name for name in names)
    assert any("linear" in name for name in names)


def test_the_bandwidth_is_plausible():
    assert 1e8 < read_bandwidth(1 << 24, repeats=1) < 1e13
