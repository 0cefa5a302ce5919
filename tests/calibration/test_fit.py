import dataclasses
import json
from contextlib import nullcontext

import pytest
import torch

from shadowc.budget import predictor_elements
from shadowc.calibration import checkpoint, trained
from shadowc.calibration import fit as fit_module
from shadowc.calibration.collect import Collector
from shadowc.calibration.criteria import CRITERIA
from shadowc.calibration.data import Example
from shadowc.calibration.fit import FitOptions, calibrate
from shadowc.calibration.measure import _agreement
from shadowc.calibration.progress import showing
from shadowc.calibration.ridge import ScoreSums
from shadowc.calibration.store import JSON_FILE, TENSOR_FILE, save_calibration
from shadowc.compiler import build_programs
from shadowc.config import Policy
from shadowc.errors import CalibrationError, DataError, OptionError
from shadowc.evaluation.masks import teacher_forced
from shadowc.kernels.select import select_reference
from shadowc.models import load_model
from shadowc.passes.manager import copy_module
from shadowc.targets import load_target

QUICK = FitOptions(("sens",), "shadow", rank=8, random_features=16, batch_tokens=64)


def examples(tiny, count: int = 9, tokens: int = 16) -> list[Example]:
    rows = tiny.ids(count, tokens).tolist()
    return [Example(ids, [True] * tokens) for ids in rows]


def all_scores(tiny, criterion, data, feature="residual"):
    """Everything at once: feature [N, C], a and g based scores {kind: [N, L, U]}, g^2."""
    collector = Collector(tiny.loaded.model, tiny.shape, feature)
    batch = collector.run(data)
    found = {units.site: units for units in batch}
    scores, squares = {}, {}
    for kind in ("heads", "neurons"):
        layers = [found[kind, layer] for layer in range(tiny.shape.layers)]
        own = [CRITERIA[criterion].score(units)[batch.counts] for units in layers]
        scores[kind] = torch.stack(own, dim=1).double()
        squares[kind] = torch.stack(
            [units.g[batch.counts].double().square().sum(-1).mean(0) for units in layers]
        )
    return batch.feature(0)[batch.counts].double(), scores, squares


def ranking_units(criterion, scores, squares):
    """Per-token scores as units are ranked by them."""
    ranked = {}
    for kind, values in scores.items():
        if CRITERIA[criterion].factor is not None:
            values = values * squares[kind].sqrt()
        scale = values.mean(dim=(0, 2), keepdim=True) ** -CRITERIA[criterion].balance
        ranked[kind] = values * scale
    return ranked


@pytest.mark.parametrize("criterion", ["plainact", "sens"])
def test_static_scores_are_means(tiny, criterion):
    data = examples(tiny)
    options = dataclasses.replace(QUICK, criteria=(criterion,), predictor="static")
    (found,) = calibrate(tiny.loaded, data, options)
    assert found.build_predictors() == [] and found.rank == 0 and not found.weights
    _, scores, squares = all_scores(tiny, criterion, data[:7] + data[8:])
    ranked = ranking_units(criterion, scores, squares)
    for got, kind in ((found.mean_head_scores, "heads"), (found.mean_neuron_scores, "neurons")):
        torch.testing.assert_close(got.double(), ranked[kind].mean(0), rtol=1e-3, atol=1e-9)


@pytest.mark.parametrize(
    "feature, placed",
    [
        ("residual", {}),
        ("context", {}),
        ("residual", {"every": 2}),
        ("normed", {"predictor": "layerwise"}),
        ("residual", {"predictor": "fullseq"}),
    ],
)
@pytest.mark.parametrize("mapped", [64, 2])
def test_each_predictor_is_the_ridge_regression(tiny, monkeypatch, feature, placed, mapped):
    """At full rank: the same as solving from stored scores in fp64, with each tap's own feature.

    Also where features are normalised by other examples' moments.
    """
    monkeypatch.setattr(fit_module, "_MAPPED_EXAMPLES", mapped)
    data = examples(tiny)
    training = data[:7] + data[8:]
    options = dataclasses.replace(QUICK, rank=1000, feature=feature, **placed)
    (found,) = calibrate(tiny.loaded, data, options)
    taps = {2: (0, 2), "layerwise": (0, 1, 2)}
    assert found.taps == taps.get(next(iter(placed.values()), None), (0,))
    pooled = found.predictor == "fullseq"
    collector = Collector(tiny.loaded.model, tiny.shape, feature, found.taps, pooled=pooled)
    batch = collector.run(training)
    _, scores, squares = all_scores(tiny, "sens", training)
    ranked = ranking_units("sens", scores, squares)
    maps = fit_module._feature_maps(collector, training, 64, options)
    seen = [batch.feature(tap)[batch.counts] for tap in range(len(found.taps))]
    for x, feature_map, predictor in zip(seen, maps, found.build_predictors(), strict=True):
        tap = predictor.tap
        targets = torch.cat(
            [ranked[kind][:, list(getattr(tap, kind))].flatten(1) for kind in ("heads", "neurons")],
            dim=1,
        ).sqrt()
        if mapped > len(data):
            mean = x.double().mean(0)
            torch.testing.assert_close(feature_map.mean.double(), mean, rtol=1e-4, atol=1e-5)
        phi = feature_map.expand(x).double()
        n, p = phi.shape
        assert p == found.rank == x.shape[1] + options.size[1]
        centred = phi - phi.mean(0)
        gram = centred.T @ centred / n
        ridge = options.ridge * p / n * gram.diagonal().mean() * torch.eye(p)
        weight = torch.linalg.solve(gram + ridge, centred.T @ targets / n)
        expected = centred @ weight + targets.mean(0)
        got = torch.cat([part[0].flatten(1) for part in predictor(x[None])], dim=1)
        assert (got.double() - expected).abs().max() < 0.02 * expected.std()


def test_quantiles_are_those_of_held_out_predictions(tiny):
    """Of every position that counts, in layers that are predicted; they give the budget there."""
    data = examples(tiny, 18)
    held_out = [data[7], data[15]]
    (found,) = calibrate(tiny.loaded, data, dataclasses.replace(QUICK, predictor="layerwise"))
    batch = Collector(tiny.loaded.model, tiny.shape, "entry", found.taps).run(held_out)
    predictors = found.build_predictors()
    for tap, predictor in enumerate(predictors):
        x = batch.feature(tap)
        heads, neurons = predictor(x[batch.counts][None])
        for quantiles, layers, scores in (
            (found.head_quantiles, predictor.tap.heads, heads),
            (found.neuron_quantiles, predictor.tap.neurons, neurons),
        ):
            for i, layer in enumerate(layers):
                middle = quantiles[layer, quantiles.shape[1] // 2]
                above = (scores[0, :, i] > middle).float().mean()
                assert above == pytest.approx(0.5, abs=0.02)
                ends = scores[0, :, i].aminmax()
                assert torch.allclose(quantiles[layer, [0, -1]], torch.stack(ends), rtol=0.02)
    assert not found.head_quantiles[0].any()  # layer 0's heads always run


def test_rank_buys_fit_and_is_bounded(tiny):
    data = examples(tiny)
    x, scores, squares = all_scores(tiny, "sens", data[:7] + data[8:])
    target = ranking_units("sens", scores, squares)["neurons"].sqrt()
    errors = []
    for rank in (1, 4, 16, 64):
        (found,) = calibrate(tiny.loaded, data, dataclasses.replace(QUICK, rank=rank))
        predicted = found.build_predictors()[0](x.float()[None])[1][0]
        errors.append(float((predicted - target).square().mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.9 * errors[0]


def test_one_pass_serves_several_criteria(tiny, monkeypatch):
    runs = []
    run = Collector.run
    monkeypatch.setattr(Collector, "run", lambda *given: runs.append(1) or run(*given))
    options = dataclasses.replace(QUICK, criteria=("plainact", "random", "sens"))
    together = calibrate(tiny.loaded, examples(tiny), options)
    passes = len(runs)
    assert [found.criterion for found in together] == ["plainact", "random", "sens"]
    for found in together:
        only = dataclasses.replace(QUICK, criteria=(found.criterion,))
        runs.clear()
        (alone,) = calibrate(tiny.loaded, examples(tiny), only)
        assert len(runs) == passes
        for name, value in alone.tensors().items():
            assert torch.equal(found.tensors()[name], value)


def test_held_out_examples_are_held_out(tiny):
    data = examples(tiny)
    (first,) = calibrate(tiny.loaded, data, QUICK)
    data[7] = Example(data[7].ids[::-1], data[7].scored)
    (second,) = calibrate(tiny.loaded, data, QUICK)
    for name, value in first.tensors().items():  # some are of the held-out predictions
        assert torch.equal(second.tensors()[name], value) == (
            "quantiles" not in name and "damage" not in name
        )
    assert first.metrics["spearman_neurons"] != second.metrics["spearman_neurons"]


def test_agreement_is_also_measured_within_each_layer(tiny):
    data = examples(tiny)
    options = dataclasses.replace(QUICK, criteria=("plainact",), predictor="static")
    (found,) = calibrate(tiny.loaded, data, options)
    _, scores, _ = all_scores(tiny, "plainact", [data[7]])
    for kind, mean in (("heads", found.mean_head_scores), ("neurons", found.mean_neuron_scores)):
        first = int(kind == "heads")  # layer 0's heads always run
        assert (found.metrics[f"spearman_{kind}_by_layer"][0] is None) == bool(first)
        for layer in range(first, tiny.shape.layers):
            true = scores[kind][:, layer].float()
            alone = _agreement(mean[layer].expand_as(true), true)
            for name, key in (("spearman", f"spearman_{kind}"), ("recall_50", f"recall_{kind}_50")):
                got = found.metrics[f"{key}_by_layer"]
                assert len(got) == tiny.shape.layers
                assert got[layer] == pytest.approx(float(alone[name].double().mean()), abs=1e-6)


def test_metrics_of_a_perfect_and_of_an_unrelated_prediction():
    torch.manual_seed(0)
    true = torch.rand(20, 2000)
    true[:, 500:] = 0  # ties; zeros are nobody's best
    perfect = _agreement(true * 3 + 1, true)
    unrelated = _agreement(torch.rand(20, 2000), true)
    assert torch.allclose(perfect["spearman"], torch.ones(20, dtype=torch.float64))
    assert (perfect["recall_70"] == 1).all()
    assert unrelated["spearman"].abs().mean() < 0.05
    assert unrelated["recall_70"].mean() == pytest.approx(0.3, abs=0.03)
    assert unrelated["recall_30"].mean() == pytest.approx(0.7, abs=0.03)


def test_spearman_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    torch.manual_seed(0)
    x, y = torch.randint(0, 9, (2, 3, 40)).float()
    found = _agreement(x, y)["spearman"]
    expected = [stats.spearmanr(a.numpy(), b.numpy()).statistic for a, b in zip(x, y, strict=True)]
    assert found.tolist() == pytest.approx(expected)


def test_zero_rate_counts_exact_zeros(tiny):
    data = examples(tiny)
    (found,) = calibrate(tiny.loaded, data, QUICK)
    batch = Collector(tiny.loaded.model, tiny.shape, "residual").run(data[:7] + data[8:])
    zeros = {
        u.layer: (u.a[u.counts] == 0).float().mean((0, 2)) for u in batch if u.kind == "neurons"
    }
    expected = torch.stack([zeros[layer] for layer in range(tiny.shape.layers)])
    torch.testing.assert_close(found.zero_rate, expected)
    assert (found.zero_rate.mean() > 0.3) == (tiny.shape.activation == "relu")


def test_rule_5_train_and_serve_see_the_same_feature(tiny):
    """An artifact of a fitted calibration masks by the fit's own predictions."""
    model = tiny.loaded.model
    (found,) = calibrate(tiny.loaded, examples(tiny), QUICK)
    policy = Policy(0.5, 0.5, min_neurons=2)
    ids = tiny.ids(2, 8, seed=5)
    data = [Example(row, [True] * len(row)) for row in ids.tolist()]
    feature = Collector(model, tiny.shape, "residual").run(data).feature(0)
    heads, neurons = found.build_predictors()[0](feature)
    result = teacher_forced(tiny.session(policy, calibration=found), ids)
    for name, scores, first, (keep, floor) in (
        ("head_mask", heads, 1, (policy.heads_kept(tiny.shape), policy.min_heads)),
        ("neuron_mask", neurons, 0, (policy.neurons_kept(tiny.shape), policy.min_neurons)),
    ):
        expected = select_reference(scores, keep, floor, False)
        # The feature comes before every mask, so it is the same at all positions.
        assert torch.equal(result[name][:, 1:, first:], expected[:, 1:])


def test_rule_10_same_inputs_and_seed_same_bytes(tiny, tmp_path):
    def made(name, **changes):
        options = dataclasses.replace(QUICK, **changes)
        (found,) = calibrate(tiny.loaded, examples(tiny), options)
        path = save_calibration(found, tmp_path / name)
        header = json.loads((path / JSON_FILE).read_text())
        header["metrics"].pop("seconds")
        return header, (path / TENSOR_FILE).read_bytes()

    assert made("a") == made("b")
    assert made("a")[1] != made("c", seed=1)[1]


@pytest.mark.parametrize(
    "changes, stop",
    [({}, 3), ({"predictor": "layerwise"}, 6), ({"fit": "paper", "rank": None}, 4)],
)
def test_an_interrupted_calibration_ends_with_the_same_bytes(
    tiny_opt, tmp_path, monkeypatch, changes, stop
):
    monkeypatch.setattr(checkpoint, "EVERY", 2)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    monkeypatch.setitem(trained.SCHEDULES, "heads", trained.Schedule(8, 2, 8))
    monkeypatch.setitem(trained.SCHEDULES, "neurons", trained.Schedule(8, 2, 8))
    criteria = "sens", "random"
    options = dataclasses.replace(QUICK, criteria=criteria, batch_tokens=16, **changes)
    file, run, calls = tmp_path / "unfinished", Collector.run, []

    def counted(collector, group, seed):
        calls.append(group)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return run(collector, group, seed)

    whole = calibrate(tiny_opt.loaded, examples(tiny_opt), options)
    monkeypatch.setattr(Collector, "run", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny_opt.loaded, examples(tiny_opt), options, checkpoint=file)
    calls.clear()
    stop = 0
    again = calibrate(tiny_opt.loaded, examples(tiny_opt), options, checkpoint=file)
    assert len(calls) in (9 - 2, 9 - 4)  # nine examples, one a batch
    for one, other in zip(whole, again, strict=True):
        for name, value in one.tensors().items():
            assert torch.equal(value, other.tensors()[name]), name
        assert one.metrics | {"seconds": 0} == other.metrics | {"seconds": 0}


@pytest.mark.parametrize(
    "changes, fresh, message",
    [
        ({"seed": 1}, False, "another seed"),
        ({"ridge": 1.0}, False, "another ridge"),
        ({}, False, None),
        ({"seed": 1}, True, None),
    ],
)
def test_only_the_same_calibration_goes_on(
    tiny_opt, tmp_path, monkeypatch, changes, fresh, message
):
    monkeypatch.setattr(checkpoint, "EVERY", 1)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    file = tmp_path / "unfinished"
    calibrate(tiny_opt.loaded, examples(tiny_opt), QUICK, checkpoint=file)
    options = dataclasses.replace(QUICK, **changes)
    again = pytest.raises(CalibrationError, match=message) if message else nullcontext()
    with again:
        calibrate(tiny_opt.loaded, examples(tiny_opt), options, checkpoint=file, fresh=fresh)


def test_a_damaged_state_is_named(tiny_opt, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 1)
    monkeypatch.setattr(checkpoint, "SHARE", 1e9)
    file = tmp_path / "unfinished"
    calibrate(tiny_opt.loaded, examples(tiny_opt), QUICK, checkpoint=file)
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CalibrationError, match="unfinished is damaged"):
        calibrate(tiny_opt.loaded, examples(tiny_opt), QUICK, checkpoint=file)


def test_targets_of_a_refresh_are_means_over_the_tokens_that_a_mask_serves(tiny_opt):
    batch = Collector(tiny_opt.loaded.model, tiny_opt.shape, "residual").run(
        [
            Example(tiny_opt.ids(1, 9)[0].tolist(), [True] * 9),
            Example(tiny_opt.ids(1, 6)[0].tolist(), [True] * 6),
        ]
    )
    values = torch.rand(2, 9, 3)
    (units,) = [units for units in batch if units.site == ("neurons", 1)]
    for refresh in (1, 2, 3, 0):
        ahead = units.ahead(values, refresh)
        for row, position in batch.counts.nonzero().tolist():
            own = slice(position, position + refresh if refresh else None)
            expected = values[row, own][batch.counts[row, own]].mean(0)
            torch.testing.assert_close(ahead[row, position], expected)
    for refresh in (1, 3):
        sums = ScoreSums(CRITERIA["plainact"], refresh)
        sums.add(units, batch.feature(0) * batch.counts[..., None])
        scores = units.ahead(CRITERIA["plainact"].score(units), refresh)
        expected = scores[batch.counts].sqrt().sum(0)
        torch.testing.assert_close(sums.roots["neurons", 1].float(), expected)
        mean = CRITERIA["plainact"].score(units)[batch.counts].sum(0)
        torch.testing.assert_close(sums.totals["neurons", 1].float(), mean)


def test_the_papers_recipe_learns_scores_within_layers(tiny, monkeypatch):
    """It knows the samples that it was trained on, and runs inside the masked program."""
    monkeypatch.setitem(trained.SCHEDULES, "heads", trained.Schedule(256, 200, 8))
    monkeypatch.setitem(trained.SCHEDULES, "neurons", trained.Schedule(256, 200, 8))
    data = examples(tiny, count=5)
    options = FitOptions(("sens",), fit="paper", batch_tokens=64)
    (found,) = calibrate(tiny.loaded, data, options)
    (predictor,) = found.build_predictors()
    x, scores, squares = all_scores(tiny, "sens", data[:4])
    for got, kind, first in zip(predictor(x[None].float()), scores, (1, 0), strict=True):
        true = (scores[kind] * squares[kind].sqrt())[:, first:]
        low, high = true.amin(2, keepdim=True), true.amax(2, keepdim=True)
        target = (true - low) / (high - low)
        unexplained = (got[0] - target).square().mean() / (target - target.mean(0)).square().mean()
        assert unexplained < 0.1
    policy = Policy(0.5, 0.5, min_neurons=2)
    built = build_programs(
        copy_module(tiny.traced), tiny.loaded, found, policy, load_target("cpu"), torch.float32
    )
    assert built.predictor_bytes == 4 * predictor_elements(
        found, heads=True, neurons=True
    ) + 4 * sum(v.numel() for v in found.weights.values() if v.dim() == 1)


def test_an_interrupt_goes_through_and_leaves_no_hook(tiny, monkeypatch):
    model = tiny.loaded.model

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.lm_head, "forward", interrupt)
    with pytest.raises(KeyboardInterrupt):
        calibrate(tiny.loaded, examples(tiny), QUICK)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


def test_memory_that_never_suffices_names_the_knobs(tiny_opt, monkeypatch):
    tried = []

    def full(collector, group, seed):
        tried.append((collector.keep, len(group)))
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(Collector, "run", full)
    options = dataclasses.replace(QUICK, batch_tokens=64)
    with pytest.raises(CalibrationError, match="--batch-tokens or --seq-len"):
        calibrate(tiny_opt.loaded, examples(tiny_opt), options)
    # Graphs go first, then examples, to the last one.
    assert tried == [(3, 4), (0, 4), (0, 2), (0, 1)]


def test_progress_is_on_stderr_and_only_when_asked(tiny, capsys):
    options = dataclasses.replace(QUICK, predictor="static")
    calibrate(tiny.loaded, examples(tiny), options)
    assert capsys.readouterr() == ("", "")
    for style in ("bar", "json"):
        with showing(style) as progress:
            calibrate(tiny.loaded, examples(tiny), options, progress=progress)
        out, err = capsys.readouterr()
        lines = err.splitlines()
        assert out == ""
        if style == "bar":  # which is no terminal here
            assert lines[-1].startswith("calibrating: 9 of 9 examples, ") and "recall" in lines[-1]
            continue
        events = [json.loads(line) for line in lines]
        assert (events[0]["examples"], events[-1]["examples"], events[-1]["total"]) == (0, 9, 9)
        assert events[-1]["recall"] > 0 and events[-1]["eta_seconds"] == 0


def test_too_few_examples(tiny):
    one = examples(tiny, 1)
    nothing_scored = Example(one[0].ids, [False] * 16)
    for data in ([], one, [*one, nothing_scored], [*one, Example([5, 6], [True, True])]):
        with pytest.raises(DataError, match="too few examples"):
            calibrate(tiny.loaded, data, QUICK)
    (found,) = calibrate(tiny.loaded, examples(tiny, 2), QUICK)  # one to fit, one to measure
    assert found.tokens == 14


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"criteria": ("magnitude",)}, "plainact, plainact-weights, sens"),
        ({"predictor": "oracle"}, "shadow, layerwise, fullseq, static"),
        ({"feature": "embedding"}, "residual, normed, entry, context"),
        ({"rank": 0}, "rank"),
        ({"every": 0}, "every"),
        ({"every": 2, "predictor": "layerwise"}, "--taps with --predictor shadow"),
        ({"every": 2, "feature": "context"}, "context"),
        ({"predictor": "layerwise", "feature": "context"}, "context"),
        ({"batch_tokens": 0}, "batch_tokens"),
        ({"random_features": -1}, "random_features"),
        ({"ridge": 0.0}, "ridge"),
    ],
)
def test_options_out_of_range(changes, message):
    with pytest.raises(OptionError, match=message):
        FitOptions(**changes)


def test_a_real_model_is_predicted_better_than_by_its_means():
    loaded = load_model("opt-books-15m")
    text = loaded.tokenizer.encode(open(__file__).read() + (fit_module.__doc__ or "") * 2)
    data = [Example(text[i : i + 48], [True] * 48) for i in range(0, 48 * 16, 48)]
    shadow, static = (
        calibrate(loaded, data, dataclasses.replace(QUICK, predictor=predictor, batch_tokens=384))[
            0
        ].metrics
        for predictor in ("shadow", "static")
    )
    for kind in ("heads", "neurons"):
        assert shadow[f"spearman_{kind}"] > static[f"spearman_{kind}"] + 0.01
        assert shadow[f"recall_{kind}_70"] > static[f"recall_{kind}_70"] > 0.3
