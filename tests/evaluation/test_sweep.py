"""A sweep measures what compiled artifacts would, goes on where it stopped, and draws it all."""

from __future__ import annotations

import json
from dataclasses import replace
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
import torch

from shadowc.calibration.data import evaluation_windows
from shadowc.calibration.store import JSON_FILE, load_calibration, save_calibration
from shadowc.config import Policy
from shadowc.errors import CalibrationError, OptionError
from shadowc.evaluation import figures, sweep
from shadowc.evaluation.oracle import true_scores
from shadowc.evaluation.perplexity import evaluate
from shadowc.evaluation.report import save_sweep
from shadowc.kernels.select import select_reference

SMALL = sweep.Options(sparsities=(0.0, 0.5), tokens=96, seq_len=32)


def calibration_of(tiny, taps=(0,), **changes):
    """One that the layerwise baseline can be fitted beside."""
    known = dict(criterion="sens", data="pydoc", examples=4, seq_len=32)
    return replace(tiny.with_taps(taps).calibration, **known | changes)


def run(tiny, calibration, directory, options=SMALL, **more):
    file = save_calibration(calibration, directory / "calibration") / JSON_FILE
    output = directory / "eval"
    return sweep.sweep(tiny.loaded, calibration, file, output, options, **more)


@pytest.fixture(scope="module")
def swept(tiny_opt, tmp_path_factory):
    """A whole sweep in batches of one window: its directory and its result."""
    directory = tmp_path_factory.mktemp("sweep")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_BATCH_LOGITS", 1)
        result = run(tiny_opt, calibration_of(tiny_opt), directory)
    return directory, result


def test_nothing_skipped_is_dense(swept):
    methods = swept[1]["methods"]
    assert set(methods) == {"shadow", "dense", "static", "layerwise", "oracle", "random"}
    (dense,) = methods["dense"]
    for name, points in methods.items():
        assert points[0]["perplexity"] == pytest.approx(dense["perplexity"], rel=1e-6), name
        assert points[0]["head_sparsity"] == points[0]["neuron_sparsity"] == 0.0
    at_half = {points[-1]["perplexity"] for points in methods.values()}
    assert len(at_half) == len(methods)


def test_bytes_are_those_of_what_ran(swept, tiny_opt):
    methods, shape = swept[1]["methods"], tiny_opt.shape
    assert methods["dense"][0]["weight_bytes_skipped"] == 0.0
    static = methods["static"][1]
    assert static["head_sparsity"] == static["neuron_sparsity"] == 0.5
    units = 0.5 * (shape.heads * shape.head_elements + shape.ffn * shape.neuron_elements)
    without_zeros = units / shape.layer_elements
    rows = 0.5 * shape.ffn * shape.hidden / shape.layer_elements
    assert without_zeros < static["weight_bytes_skipped"] < without_zeros + rows
    assert methods["shadow"][1]["predictor_bytes_share"] > static["predictor_bytes_share"] == 0


@pytest.mark.parametrize("taps, selection", [((0,), "topk"), ((0, 2), "threshold")])
def test_it_is_the_perplexity_of_artifacts(tiny, tmp_path, taps, selection):
    options = replace(SMALL, sparsities=(0.5,), against=("dense", "static", "oracle", "random"))
    calibration = calibration_of(tiny, taps)
    found = run(tiny, calibration, tmp_path, options)["methods"]
    windows = evaluation_windows(tiny.loaded, "pydoc", 32, 96, calibrated_on="pydoc")
    session = tiny.session(Policy(0.5, 0.5, selection=selection), calibration=calibration)
    oracle = true_scores(tiny.loaded, "sens", windows)
    against = ("dense", "static", "oracle", "random")
    compiled = evaluate(session, windows, against=against, oracle=oracle)
    compiled["shadow"] = compiled.pop("artifact")
    assert found.keys() == compiled.keys()
    for name, value in compiled.items():
        (point,) = found[name]
        assert point["tokens"] == value["tokens"]
        for key in ("perplexity", "head_sparsity", "neuron_sparsity"):
            assert point[key] == pytest.approx(value[key], rel=1e-3), (name, key)


def test_a_layerwise_calibration_is_its_own_baseline(tiny_opt, tmp_path):
    calibration = calibration_of(tiny_opt, (0, 1, 2), predictor="layerwise")
    result = run(tiny_opt, calibration, tmp_path, replace(SMALL, against=("layerwise",)))
    assert list(result["methods"]) == list(result["rank_correlation"]) == ["layerwise"]
    assert not (tmp_path / "eval" / "layerwise").exists()


def test_a_layerwise_baseline_of_something_else_is_refused(tiny_opt, tmp_path):
    options = replace(SMALL, against=("layerwise",), sparsities=(0.5,))
    calibration = calibration_of(tiny_opt)
    before = run(tiny_opt, calibration, tmp_path, options)
    directory = tmp_path / "eval" / "layerwise"
    save_calibration(replace(load_calibration(directory), seed=9), directory)
    with pytest.raises(OptionError, match="layerwise is not what was fitted"):
        run(tiny_opt, calibration, tmp_path, options)
    assert run(tiny_opt, calibration, tmp_path, options, fresh=True) == before


def test_the_whole_sequence_is_measured_and_not_compiled(tiny, tmp_path):
    options = replace(SMALL, against=("fullseq",), sparsities=(0.0, 0.5))
    result = run(tiny, calibration_of(tiny), tmp_path, options)
    fitted = load_calibration(tmp_path / "eval" / "fullseq")
    assert fitted.predictor == "fullseq" and fitted.taps == (0,)
    none, half = result["methods"]["fullseq"]
    assert none["perplexity"] == pytest.approx(result["methods"]["shadow"][0]["perplexity"])
    assert half["neuron_sparsity"] == pytest.approx(0.5, abs=0.01)
    # A token's mask depends on the tokens before it, and on none after it.
    ids = torch.arange(5, 17)[None]
    heads, _ = sweep.predicted(tiny.loaded, fitted, ids)
    shorter, _ = sweep.predicted(tiny.loaded, fitted, ids[:, :6])
    other, _ = sweep.predicted(tiny.loaded, fitted, torch.cat((ids[:, 1:2], ids[:, 1:]), dim=1))
    torch.testing.assert_close(heads[:, :6], shorter, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(heads[:, 5], other[:, 5], atol=1e-4)
    with pytest.raises(CalibrationError, match="measured, not compiled"):
        tiny.session(Policy(0.5, 0.5, min_neurons=2), calibration=fitted)


def test_neurons_only_skips_no_head(tiny_opt, tmp_path):
    options = replace(SMALL, neurons_only=True, against=("static",))
    methods = run(tiny_opt, calibration_of(tiny_opt), tmp_path, options)["methods"]
    for points in methods.values():
        assert points[1]["head_sparsity"] == 0.0
        assert points[1]["neuron_sparsity"] == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("stop", [1, 9])
def test_an_interrupted_sweep_ends_with_the_same_numbers(
    tiny_opt, tmp_path, monkeypatch, swept, stop
):
    monkeypatch.setattr(sweep, "_BATCH_LOGITS", 1)
    calls = []

    def interrupt(done, total):
        calls.append(done)
        if done == stop:
            raise KeyboardInterrupt

    calibration = calibration_of(tiny_opt)
    with pytest.raises(KeyboardInterrupt):
        run(tiny_opt, calibration, tmp_path, progress=interrupt)
    state = tmp_path / "eval" / sweep.STATE
    state.write_text(state.read_text() + '{"name": "0/sta')  # a line that was being written
    seen = []
    run(tiny_opt, calibration, tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == stop and seen[-1][0] == seen[-1][1]
    whole = (swept[0] / "eval" / sweep.REPORT).read_bytes()
    assert (tmp_path / "eval" / sweep.REPORT).read_bytes() == whole


def test_a_sweep_of_something_else_is_refused_by_name(tiny_opt, tmp_path):
    options = replace(SMALL, against=("static",))
    calibration = calibration_of(tiny_opt)
    before = run(tiny_opt, calibration, tmp_path, options)
    with pytest.raises(OptionError, match=r"another seed\n.*expected: seed 1\n.*got: seed 0"):
        run(tiny_opt, calibration, tmp_path, replace(options, seed=1))
    with pytest.raises(OptionError, match="another tokens, text"):
        run(tiny_opt, calibration, tmp_path, replace(options, tokens=64))
    with pytest.raises(OptionError, match="another calibration"):
        run(tiny_opt, replace(calibration, seed=7), tmp_path, options)
    after = run(tiny_opt, calibration, tmp_path, replace(options, seed=1), fresh=True)
    assert after == before | {"seed": 1}
    state = tmp_path / "eval" / sweep.STATE
    state.write_text("[1]\n" * 3)
    with pytest.raises(OptionError, match="damaged"):
        run(tiny_opt, calibration, tmp_path, options)
    state.unlink()
    with pytest.raises(OptionError, match="report of something else"):
        run(tiny_opt, calibration, tmp_path, options)


@pytest.mark.parametrize(
    "wrong",
    [
        {"against": ("magic",)},
        {"sparsities": ()},
        {"sparsities": (1.0,)},
        {"sparsities": (0.5, 0.5)},
        {"sparsities": (float("nan"),)},
    ],
)
def test_what_cannot_be_measured(wrong):
    with pytest.raises(OptionError):
        replace(SMALL, **wrong)


@pytest.mark.parametrize("keep, floor", [(0, 0), (1, 0), (6, 2), (17, 2), (59, 0), (60, 0)])
@pytest.mark.parametrize("kind", ["distinct", "ties", "one layer", "not finite"])
def test_a_ranking_keeps_what_select_keeps(kind, keep, floor):
    scores = torch.rand(40, 3, 20, generator=torch.Generator().manual_seed(0))
    if kind == "ties":
        scores = (scores * 4).floor()
    elif kind == "one layer":  # so that the floors of the others decide
        scores[:, 0] += 1
    elif kind == "not finite":
        scores[0, 1, 3:9], scores[1, 2, 4:] = torch.nan, -torch.inf
    mask = sweep.Ranking(scores).best(keep, floor)
    assert torch.equal(mask, select_reference(scores, keep, floor, False))


class _Page(HTMLParser):
    """Counts open tags and collects names."""

    def __init__(self, text):
        super().__init__()
        self.open, self.names, self.titles = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        if tag != "meta":
            self.open.append(tag)
        for name, value in attrs:
            assert not (name in ("src", "href") or "http" in (value or "")), (tag, name, value)

    def handle_startendtag(self, tag, attrs):
        self.names.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def test_the_page_holds_every_figure(swept):
    directory, result = swept
    save_sweep(result, directory / "eval")
    text = (directory / "eval" / "report.html").read_text()
    page = _Page(text)
    assert not page.open and "script" not in page.names and "prefers-color-scheme: dark" in text
    assert page.titles == [
        "Perplexity over sparsity", "Perplexity over bytes", "How well scores are predicted",
        "Budget of each layer", "Context dependence of heads", "Numbers", "What was measured",
    ]  # fmt: skip
    pictures = [part.split("</svg>")[0] + "</svg>" for part in text.split("<svg")[1:]]
    drawn = [ElementTree.fromstring("<svg" + picture) for picture in pictures]
    methods = result["methods"]
    dense = methods["dense"][0]["perplexity"]
    whole = {n: [p["perplexity"] for p in points] for n, points in methods.items() if n != "dense"}
    near = {n: [value for value in line if value <= 4 * dense] for n, line in whole.items()}
    near = {n: line for n, line in near.items() if len(line) > 1}
    twice = 1 if near in ({}, whole) else 2
    assert len(drawn) == 2 * twice + 2 + 2 + 1
    first = [line for line in drawn[0].iter("path") if line.get("d", "").count("L")]
    assert len(first) == 5  # a line for each method but dense, which is level
    assert len([*drawn[-1].iter("rect")]) == 3 * 4 + 12  # heads, and the scale
    numbers = json.loads((directory / "eval" / sweep.REPORT).read_text())
    assert numbers == result
    assert {"versions", "text", "data", "scored", "seed", "calibration_seed"} <= numbers.keys()


def test_a_page_without_a_predictor(tiny_opt, tmp_path):
    calibration = calibration_of(tiny_opt).static()
    result = run(tiny_opt, calibration, tmp_path, replace(SMALL, against=("dense",)))
    assert list(result["methods"]) == ["static", "dense"]
    save_sweep(result, tmp_path / "eval")
    assert "no predictor" in (tmp_path / "eval" / "report.html").read_text()


def test_axes_hold_their_values_between_round_numbers():
    axis = figures.linear("", [0.21, 0.77], figures.percent)
    assert axis.ticks == [0.2, 0.4, 0.6, 0.8] and axis.share(0.5) == pytest.approx(0.5)
    axis = figures.logarithmic("", [25.0, 600.0])
    assert axis.ticks == [50, 100, 200, 500] and figures.number(1.71e6) == "1.7e+06"
    assert figures.logarithmic("", [24.0, 98.0]).ticks == [30, 40, 50, 70, 100]
    assert 0 < axis.share(25) < axis.share(600) < 1
    assert figures.linear("", [3.0, 3.0]).ticks[-1] > 3.0
