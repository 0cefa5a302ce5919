import copy
import dataclasses

import numpy as np
import pytest
import torch

from shadowc.calibration.collect import Batch, Collector
from shadowc.calibration.criteria import CRITERIA, Moments, Units, find_criterion
from shadowc.calibration.data import Example
from shadowc.calibration.fit import FitOptions, calibrate
from shadowc.errors import CalibrationError, OptionError
from shadowc.evaluation.oracle import true_scores
from shadowc.models import LoadedModel, load_model

AGGREGATE = ("plainact-weights", "jacov", "epenas")
NEEDS = ("curvature", "first")


def examples(loaded: LoadedModel, *lengths: int) -> list[Example]:
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(5, 8192, (n,), generator=generator).tolist() for n in lengths]
    return [Example(row, [True] * len(row)) for row in ids]


def collect(tiny, *lengths: int) -> Batch:
    collector = Collector(tiny.loaded.model, tiny.shape, "residual", (), NEEDS)
    return collector.run(examples(tiny.loaded, *lengths))


def units_of(batch: Batch, kind: str, layer: int = 1) -> Units:
    return next(units for units in batch if units.site == (kind, layer))


def static(name: str, units: Units) -> torch.Tensor:
    """The static score, of one batch."""
    criterion = CRITERIA[name]
    if criterion.total is None:
        return criterion.score(units)[units.counts].mean(0)
    total = criterion.total(units)
    return criterion.finish(total) if criterion.finish else total / units.counts.sum()


@pytest.fixture(params=["heads", "neurons"])
def kind(request) -> str:
    return request.param


@pytest.fixture
def units(tiny, kind) -> Units:
    """Of two examples of different length."""
    return units_of(collect(tiny, 12, 9), kind)


def test_formulas(units):
    a, g = units.a.double(), units.g.double()
    expected = {
        "plainact": (a * g).sum(-1).abs(),
        "snip": (a * g).sum(-1).abs(),
        "fisher": (a * g).sum(-1) ** 2,
        "l2norm": (a**2).sum(-1).sqrt(),
        "gradnorm": (g**2).sum(-1).sqrt(),
        "nwot": (1 + ((1 - (a > 0).double()) ** 2).sum(-1)).log(),
    }
    expected["sens"] = expected["l2norm"]
    for name, scores in expected.items():
        found = CRITERIA[name].score(units).double()
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-12)  # sums cancel


def test_contrib_is_what_the_output_projection_makes_of_one_unit(units):
    width = units.a.shape[-1]
    scores = CRITERIA["contrib"].score(units)
    for unit in (0, 3):
        alone = torch.zeros_like(units.a)
        alone[:, :, unit] = units.a[:, :, unit]
        added = alone.flatten(2) @ units.weight.T
        torch.testing.assert_close(scores[..., unit], added.norm(dim=-1), rtol=1e-4, atol=1e-6)
    assert units.weight.shape[1] == units.a.shape[2] * width


def test_the_static_score_of_snip_lets_effects_cancel(units):
    effects = (units.a * units.g).sum(-1).double() * units.counts[..., None]
    expected = effects.sum(1).abs().sum(0) / units.counts.sum()
    torch.testing.assert_close(static("snip", units).double(), expected, rtol=1e-4, atol=1e-12)
    assert (static("snip", units) <= static("plainact", units) * 1.0001).all()
    assert static("snip", units).sum() < 0.9 * static("plainact", units).sum()


def gate_gradients(tiny, example: Example, gates: list[torch.Tensor]) -> list[torch.Tensor]:
    """In fp64: gradients of gates on all units, at every position but the first."""
    model = copy.deepcopy(tiny.loaded.model).double()
    collector = Collector(model, tiny.shape, "residual")
    gates = [gate.clone().requires_grad_() for gate in gates]

    def multiply(gate):
        def hook(_, args):
            x = args[0].unflatten(-1, (len(gate), -1))
            y = (x * gate[:, None]).flatten(-2).view(1, len(example.ids), -1)
            first = args[0].view(1, len(example.ids), -1)[:, :1]
            return (torch.cat((first, y[:, 1:]), dim=1).view_as(args[0]),)

        return hook

    for module, gate in zip((*collector.heads, *collector.neurons), gates, strict=True):
        module.register_forward_pre_hook(multiply(gate))
    ids = torch.tensor([example.ids])
    with torch.enable_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
        return list(torch.autograd.grad(loss, gates))


def test_grasp_is_the_hessian_times_the_gradient_of_the_gates(tiny):
    """Against a central difference of the gates' gradient, along that gradient."""
    data = examples(tiny.loaded, 12, 9)
    batch = collect(tiny, 12, 9)
    order = [(kind, layer) for kind in ("heads", "neurons") for layer in range(3)]
    scores = {units.site: CRITERIA["grasp"].score(units) for units in batch}
    shape = tiny.shape
    ones = [torch.ones(n).double() for n in [shape.heads] * 3 + [shape.ffn] * 3]
    for row, example in enumerate(data):
        along = gate_gradients(tiny, example, ones)
        eps = 1e-3 / float(torch.cat(along).norm())
        ahead, behind = (
            gate_gradients(
                tiny, example, [one + s * eps * v for one, v in zip(ones, along, strict=True)]
            )
            for s in (1, -1)
        )
        expected = [-(x - y) / (2 * eps) for x, y in zip(ahead, behind, strict=True)]
        found = [(scores[site] * batch.counts[..., None]).sum(1)[row] for site in order]
        for x, y in zip(found, expected, strict=True):
            # Llama's norms are fp32 even in an fp64 model, which the difference feels.
            assert (x.double() - y).norm() < 1e-2 * y.norm()


def test_plainact_weights_is_of_the_gradient_of_the_first_matrices(tiny):
    """Of each example alone; the first position runs dense, so it has no part in it."""
    expected = torch.zeros(tiny.shape.ffn)
    for example in examples(tiny.loaded, 12, 9):
        model = copy.deepcopy(tiny.loaded.model)
        layer, ids = model.get_decoder().layers[1], torch.tensor([example.ids])
        names = ["mlp.gate_proj", "mlp.up_proj"] if tiny.shape.gated else ["fc1"]
        modules = [layer.get_submodule(name) for name in names]

        def without_first(_, __, output):
            rows = output.view(-1, output.shape[-1])
            return torch.cat((rows[:1].detach(), rows[1:])).view_as(output)

        for module in modules:
            module.weight.requires_grad_()
            module.register_forward_hook(without_first)
        with torch.enable_grad():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
            gradients = torch.autograd.grad(loss, [module.weight for module in modules])
        for module, gradient in zip(modules, gradients, strict=True):
            expected += (gradient * module.weight.detach()).abs().sum(1)
    total = CRITERIA["plainact-weights"].total(units_of(collect(tiny, 12, 9), "neurons"))
    torch.testing.assert_close(total.float(), expected, rtol=1e-3, atol=1e-7)
    heads = units_of(collect(tiny, 12, 9), "heads")
    plainact = CRITERIA["plainact"].score(heads)[heads.counts].sum(0)
    torch.testing.assert_close(CRITERIA["plainact-weights"].total(heads).float(), plainact)


def test_jacov_is_of_the_spectrum_of_the_correlations(tiny, kind):
    """Of rows at 8 regular positions, over fifteen examples and d."""
    units = units_of(collect(tiny, *range(15, 30)), kind)
    found = static("jacov", units)
    for unit in range(4):
        rows = []
        for example, counts in zip(units.g[:, :, unit], units.counts, strict=True):
            last = int(counts.sum())
            rows.append(example[[1 + i * (last - 1) // 7 for i in range(8)]])
        correlation = np.corrcoef(torch.cat(rows, dim=1).double().numpy())
        values = np.linalg.eigvalsh(correlation).clip(0) + 1e-5
        expected = -(np.log(values) + 1 / values).sum()
        assert float(found[unit]) == pytest.approx(expected, rel=0.02)


def test_jacov_prefers_unrelated_rows(units):
    """Rows that are all the same against independent ones."""
    generator = torch.Generator().manual_seed(0)
    g = torch.randn(40, 20, 2, 8, generator=generator)
    g[:, :, 1] = g[:, :1, 1]
    counts = torch.ones(40, 20, dtype=torch.bool)
    counts[:, 0], counts[:, -1] = False, False
    apart, same = static("jacov", dataclasses.replace(units, g=g, counts=counts))
    assert apart == pytest.approx(-8, abs=1) and same < -1e5


def test_epenas_is_the_difference_over_all_pairs(tiny, kind):
    units = units_of(collect(tiny, 30, 25), kind)
    # A few classes, so that there are pairs of each.
    units = dataclasses.replace(units, following=units.following % 3)
    found = static("epenas", units)
    classes = units.following[units.counts]
    same = classes[:, None] == classes
    pairs = ~torch.eye(len(classes), dtype=torch.bool)
    for unit in range(4):
        rows = torch.nn.functional.normalize(units.g[units.counts][:, unit].double(), dim=-1)
        cosines = rows @ rows.T
        expected = cosines[same & pairs].mean() - cosines[~same].mean()
        assert float(found[unit]) == pytest.approx(float(expected), abs=1e-4)


def test_the_factor_of_sens_is_the_rms_gradient():
    square = torch.tensor([4.0, 9.0])
    assert CRITERIA["sens"].factor(Moments(square)).tolist() == [2.0, 3.0]
    assert CRITERIA["plainact"].factor is None


def test_random_is_seeded_and_not_constant(units):
    def draw(seed):
        return CRITERIA["random"].score(dataclasses.replace(units, seed=seed))

    scores = draw(1)
    assert scores.shape == units.a.shape[:3] and scores.unique().numel() > 0.9 * scores.numel()
    assert torch.equal(scores, draw(1)) and not torch.equal(scores, draw(2))


@pytest.mark.parametrize("name", CRITERIA)
def test_every_criterion_is_described_and_scores_every_unit(units, name):
    criterion = CRITERIA[name]
    assert criterion.name == name and criterion.formula and criterion.source
    assert criterion.per_token == (name not in AGGREGATE)
    if criterion.per_token:
        assert criterion.score.__doc__
        scores = criterion.score(units)
        assert scores.shape == units.a.shape[:3] and scores.dtype == torch.float32
        assert (scores >= 0).all() or name == "grasp"
    found = static(name, units)
    assert found.shape == units.a.shape[2:3] and found.isfinite().all()


@pytest.mark.parametrize("name", ["plainact", "snip", "fisher"])
def test_ranks_like_knocking_a_unit_out(name, kind, capsys):
    """The measured change of the loss, of a trained model without each of some units in turn.

    For all heads, and 16 neurons of each layer that are active; at one token, and for snip at all
    that count.
    """
    loaded = load_model("opt-books-15m")
    ids = loaded.tokenizer.encode("It was a dark night, and the sea had been rough for two days.")
    collector = Collector(loaded.model, loaded.shape, "residual")
    batch = collector.run([Example(ids, [True] * len(ids))])
    where = batch.counts[0].nonzero().flatten() if name == "snip" else torch.tensor([len(ids) - 2])

    def losses(module=None, spans=()):
        def knock_out(_, args):  # span i of row i
            x = args[0].clone().view(len(spans), len(ids), -1)
            for row, span in zip(x, spans, strict=True):
                row[where, span] = 0
            return (x.view_as(args[0]),)

        handle = module.register_forward_pre_hook(knock_out) if spans else None
        inputs = torch.tensor([ids]).expand(max(1, len(spans)), -1)
        with torch.no_grad():
            logits = loaded.model(input_ids=inputs, use_cache=False).logits[:, :-1].double()
        if handle:
            handle.remove()
        found = torch.nn.functional.cross_entropy(logits.mT, inputs[:, 1:], reduction="none")
        return found.mean(dim=1)

    base, true, scored = losses(), [], []
    for units in batch:
        if units.kind != kind:
            continue
        known = static(name, units) if name == "snip" else CRITERIA[name].score(units)[0, where[0]]
        active = units.a[0, where].square().sum((0, 2)).topk(min(16, units.a.shape[2])).indices
        width = units.a.shape[-1]
        spans = [slice(u * width, (u + 1) * width) for u in active.tolist()]
        changed = (losses(getattr(collector, kind)[units.layer], spans) - base).abs()
        true.append(changed**2 if name == "fisher" else changed)
        scored.append(known[active])
    ranks = [torch.cat(v).argsort().argsort().double() for v in (true, scored)]
    rho = float(torch.corrcoef(torch.stack(ranks))[0, 1])
    with capsys.disabled():
        print(f"\n{name}, {kind}: rank correlation with knocking out {rho:.2f}")
    assert rho > (0.5 if name == "snip" else 0.7)


def test_weight_gradients_in_half_precision_and_no_curvature():
    """Nothing underflows in fp16: the loss is scaled."""
    totals = []
    for dtype in (torch.float32, torch.float16):
        loaded = load_model("opt-books-15m", dtype=dtype)
        ids = loaded.tokenizer.encode("The old man looked at the sea and said nothing at all.")
        collector = Collector(loaded.model, loaded.shape, "residual", (), ("first",))
        batch = collector.run([Example(ids, [True] * len(ids))])
        totals.append(CRITERIA["plainact-weights"].total(units_of(batch, "neurons")))
    assert (totals[0] - totals[1]).norm() < 0.1 * totals[0].norm()
    with pytest.raises(CalibrationError, match="float32"):
        Collector(loaded.model, loaded.shape, "residual", (), NEEDS)


def test_what_a_criterion_needs_changes_nothing_else(tiny):
    plain = Collector(tiny.loaded.model, tiny.shape, "residual").run(examples(tiny.loaded, 12, 9))
    more = {units.site: units for units in collect(tiny, 12, 9)}
    for units in plain:
        other = more.pop(units.site)
        assert units.curvature is None and not units.first
        assert other.curvature is not None and bool(other.first) == (units.kind == "neurons")
        torch.testing.assert_close((units.a, units.g), (other.a, other.g), rtol=1e-3, atol=1e-6)
    assert not more
    model = tiny.loaded.model
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_all_criteria_are_calibrated_at_once(tiny):
    """Static scores of two kinds of sums, in batches, are those of all examples together."""
    data = examples(tiny.loaded, *[20] * 18)
    options = FitOptions(tuple(CRITERIA), "static", batch_tokens=45)
    found = dict(zip(CRITERIA, calibrate(tiny.loaded, data, options), strict=True))
    collector = Collector(tiny.loaded.model, tiny.shape, "residual", (), NEEDS)
    batch = {u.site: u for u in collector.run(data[:7] + data[8:15] + data[16:])}
    for name in ("snip", "fisher", "grasp", *AGGREGATE):
        assert ("spearman_heads" in found[name].metrics) == (name not in AGGREGATE)
        raw = torch.stack([static(name, batch["neurons", layer]) for layer in range(3)])
        scale = raw.abs().mean(1, keepdim=True) ** -CRITERIA[name].balance
        scores = found[name].mean_neuron_scores.double()
        error = (scores - raw.double() * scale).abs().max()
        assert error < 1e-2 * scores.std(), name


def test_a_signed_criterion_is_learnt(tiny):
    """Grasp: the square root keeps the sign, so a predictor of full rank ranks as it does."""
    data = examples(tiny.loaded, *[20] * 9)
    options = FitOptions(("grasp",), "shadow", rank=1000, ridge=1e-4, random_features=400)
    (found,) = calibrate(tiny.loaded, data, options)
    batch = collect(tiny, *[20] * 9)
    found_units = {units.site: units for units in batch}
    heads = torch.stack(
        [CRITERIA["grasp"].score(found_units["heads", layer]) for layer in (1, 2)], dim=2
    )
    feature = Collector(tiny.loaded.model, tiny.shape, "residual").run(data[:7]).feature(0)
    scores = found.build_predictors()[0](feature)[0][batch.counts[:7]]
    true = heads[:7][batch.counts[:7]]
    assert ((scores > 0) == (true > 0)).float().mean() > 0.9 and (true < 0).any()


def test_unknown_criterion_lists_the_known_ones():
    with pytest.raises(OptionError, match="plainact, plainact-weights, sens"):
        find_criterion("plainactt")


@pytest.mark.parametrize("name", AGGREGATE)
def test_a_predictor_cannot_learn_an_aggregate_criterion(tiny_opt, name):
    assert find_criterion(name, predictor="static").name == name
    for predictor in ("shadow", "layerwise"):
        with pytest.raises(OptionError, match="--predictor static"):
            FitOptions((name,), predictor)
    with pytest.raises(OptionError, match="no oracle"):
        true_scores(tiny_opt.loaded, name, [[5, 6, 7]])
