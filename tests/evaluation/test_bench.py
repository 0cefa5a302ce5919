"""The benchmark counts what it says it counts."""

from __future__ import annotations

import copy
import itertools
import signal
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from shadowc.config import Policy
from shadowc.errors import ModelError, OptionError
from shadowc.evaluation import bench
from shadowc.evaluation.bench import Generated, Variant, _take_turns, read_bandwidth, selection_ms

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


@pytest.mark.parametrize("taps", [(0,), (0, 2), (0, 1, 2)])
def test_selection_is_the_predictors_and_what_chooses(tiny_opt, taps):
    """Not what runs by an earlier tap's choice, though a later tap's follows from it."""
    policy = HALF if taps == (0,) else replace(HALF, selection="threshold")
    program = tiny_opt.with_taps(taps).session(policy).programs["decode"]
    timer = bench._SelectionTimer(program.inputs, program.outputs, program.weights, program.graph)
    names = [str(node.target) for node in timer._choosing()]
    products, selects, choices = (
        sum(part in name for name in names) for part in ("linear", "shadowc.select", "choose_into")
    )
    if taps == (0,):  # exact ranks
        assert (products, selects, choices) == (4, 2, 0)
    else:  # what makes the code of random features, and the rest of a predictor
        assert (products, selects, choices) == (2 * len(taps), 0, len(taps))
    assert not any("sparse" in name or "attention" in name for name in names)


def test_the_bandwidth_is_plausible():
    assert 1e8 < read_bandwidth(1 << 24, repeats=1) < 1e13


def test_a_generation_is_timed_by_what_the_longer_one_takes_longer(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: clock.now))

    def generate(tokens):  # a prompt takes 2 s, the first call compiles
        clock.now += 2.0 + 0.25 * tokens + (100.0 if clock.now == 0 else 0.0)

    variant = Generated(generate, (8, 24))
    variant.warm_up()
    assert variant.compile_seconds == 108.0 and not variant.times and variant.spent == 0
    _take_turns([variant], torch.zeros(1, 80, dtype=torch.int64), lambda share: None)
    assert set(variant.times) == {0.25} and variant.ms == 250.0
    assert variant.spent == 24.0 and len(variant.times) == 2  # 12 s a turn: then it sits out
    assert bench.PATIENCE == 15.0


def test_transformers_really_compiles(tiny_opt):
    model = copy.deepcopy(tiny_opt.loaded.model)
    torch._dynamo.utils.counters.clear()
    variant = bench._compiled(model, tiny_opt.ids(1, 8), 16)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1
    frames = torch._dynamo.utils.counters["frames"]["ok"]
    variant.decode(tiny_opt.ids(1, 8), measured=True)
    assert len(variant.times) == 1 and variant.compile_seconds > 0
    assert torch._dynamo.utils.counters["frames"]["ok"] == frames  # not in a turn


def test_a_compile_that_fails_or_never_ends_is_one_error(monkeypatch):
    def fails(tokens):
        raise RuntimeError("no compiler\nand much more")

    with pytest.raises(ModelError, match=r"(?s)could not compile.*got: no compiler$"):
        Generated(fails, (8, 16)).warm_up()
    monkeypatch.setattr(bench, "COMPILE_PATIENCE", 0.05)
    before = signal.getsignal(signal.SIGALRM)
    with pytest.raises(ModelError, match="transformers' compile takes too long"):
        Generated(lambda tokens: time.sleep(5), (8, 16)).warm_up()
    assert signal.getsignal(signal.SIGALRM) is before
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_dejavu_needs_memory_for_its_predictors(tiny_opt, monkeypatch):
    monkeypatch.setattr(bench, "free_memory", lambda session: 1000)
    with pytest.raises(ModelError, match=r"(?s)dejavu's predictors.*[\d,]{7} bytes.*1,000 free"):
        bench._dejavu(tiny_opt.session(HALF), tiny_opt.ids(1, 4), 16, False)


def test_names_are_known_and_in_order():
    with pytest.raises(OptionError, match=r"(?s)'magic'.*dense, exact, static, dejavu, hf"):
        bench._check_names(("dense", "magic"), True)
    with pytest.raises(OptionError, match="--no-hugging-face excludes --against hf-compiled"):
        bench._check_names(("hf-compiled",), False)
    artifact = SimpleNamespace(manifest={"dtype": "float16", "target": "cpu"})
    names = list(bench._variants(artifact, ("hf-compiled", "hf", "static", "dense")))
    assert names == ["static", "hugging_face", "hugging_face_fp32", "hugging_face_compiled"]
    artifact.manifest["target"] = "h100"
    assert list(bench._variants(artifact, bench.DEFAULT)) == ["exact", "hugging_face"]
