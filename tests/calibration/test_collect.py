import copy

import pytest
import torch

from shadowc.calibration.collect import Collector
from shadowc.calibration.criteria import CRITERIA
from shadowc.calibration.data import Example
from shadowc.errors import CalibrationError
from shadowc.models import LoadedModel, load_model


def example(tiny, tokens: int, seed: int = 0, scored=None) -> Example:
    ids = tiny.ids(1, tokens, seed)[0].tolist()
    return Example(ids, [True] * tokens if scored is None else scored)


def sites(batch):
    """{(kind, layer): (a, g)}"""
    return {units.site: (units.a, units.g) for units in batch}


def losses(model, ids, module=None, change=None):
    """Next-token losses [B, T-1], with `change` applied to a module's input."""

    def hook(_, args):
        return (change(args[0].clone()),)

    handle = module.register_forward_pre_hook(hook) if module is not None else None
    try:
        with torch.no_grad():
            logits = model(input_ids=ids, use_cache=False).logits[:, :-1].double()
    finally:
        if handle is not None:
            handle.remove()
    return torch.nn.functional.cross_entropy(logits.mT, ids[:, 1:], reduction="none")


def spearman(x, y):
    x, y = (v.argsort().argsort().double() for v in (x, y))
    return float(torch.corrcoef(torch.stack((x, y)))[0, 1])


@pytest.mark.parametrize("kind", ["heads", "neurons"])
def test_gradients_are_directional_derivatives(tiny, kind):
    """A small step along a unit's own activation at one token changes the loss by g . a."""
    one, t, layer, eps = example(tiny, 10), 4, 1, 3e-2
    collector = Collector(tiny.loaded.model, tiny.shape, "residual")
    batch = collector.run([one])
    a, g = sites(batch)[kind, layer]
    expected = (a * g).sum(dim=-1)[0, t]
    module = getattr(collector, kind)[layer]
    ids = torch.tensor([one.ids])
    for unit in (0, 3):
        width = module.in_features // expected.numel()
        span = slice(unit * width, (unit + 1) * width)

        ends = []
        for factor in (1 + eps, 1 - eps):

            def change(x, span=span, factor=factor):
                x.view(-1, x.shape[-1])[t, span] *= factor
                return x

            ends.append(losses(tiny.loaded.model, ids, module, change).mean())
        measured = (ends[0] - ends[1]) / (2 * eps)
        assert measured == pytest.approx(float(expected[unit]), rel=2e-2, abs=1e-6)


def test_plainact_ranks_like_knocking_a_unit_out():
    """|loss without the unit - loss| at one token, for all heads of a real model's layers."""
    loaded = load_model("opt-books-15m")
    ids = loaded.tokenizer.encode("It was a dark night, and the sea had been rough for two days.")
    collector = Collector(loaded.model, loaded.shape, "residual")
    batch = collector.run([Example(ids, [True] * len(ids))])
    inputs, t = torch.tensor([ids]).expand(loaded.shape.heads, -1), len(ids) - 2
    base = losses(loaded.model, inputs[:1]).mean()
    true, scored = [], []
    for units in batch:
        if units.kind == "neurons":
            continue
        scored.append(CRITERIA["plainact"].score(units)[0, t])

        def knock_out(x):  # head h of row h
            for head, row in enumerate(x):
                row[t, head * loaded.shape.head_dim : (head + 1) * loaded.shape.head_dim] = 0
            return x

        changed = losses(loaded.model, inputs, collector.heads[units.layer], knock_out).mean(dim=1)
        true.append((changed - base).abs())
    assert spearman(torch.cat(scored), torch.cat(true)) > 0.7


def test_positions_that_count(tiny):
    """Not the first (prompt), not the last (no gradient), not padding; the rest."""
    collector = Collector(tiny.loaded.model, tiny.shape, "residual")
    batch = collector.run([example(tiny, 9), example(tiny, 6)])
    assert batch.counts[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert batch.counts[1].nonzero().flatten().tolist() == [1, 2, 3, 4]
    for _, g in sites(batch).values():
        assert not g[0, 8:].any() and not g[1, 5:].any()
        assert g[0, 7].any() and g[1, 4].any()


def test_tokens_before_a_masked_loss_get_gradient_from_later_ones(tiny):
    scored = [False] * 8 + [True]
    batch = Collector(tiny.loaded.model, tiny.shape, "residual").run(
        [example(tiny, 9, scored=scored)]
    )
    assert batch.counts[0].nonzero().flatten().tolist() == [1, 2, 3, 4, 5, 6, 7]
    found = sites(batch)
    assert found["neurons", 0][1][0, 3].any()  # through the attention of later layers
    last = found["neurons", tiny.shape.layers - 1][1]
    assert not last[0, 3].any() and last[0, 7].any()


def test_a_batch_with_padding_equals_its_examples_alone(tiny):
    collector = Collector(tiny.loaded.model, tiny.shape, "residual")
    short, long = example(tiny, 6, 1), example(tiny, 11, 2)
    together = collector.run([short, long])
    pairs = sites(together)
    for row, one in enumerate((short, long)):
        alone, n = collector.run([one]), len(one.ids)
        torch.testing.assert_close(together.feature(0)[row, :n], alone.feature(0)[0])
        for site, single in sites(alone).items():
            for x, y in zip(pairs[site], single, strict=True):
                assert (x[row, :n] - y[0]).norm() <= 1e-4 * y[0].norm()


def test_layers_that_run_once_more_give_the_same(tiny):
    """Whatever number of layers keeps its graph."""
    examples = [example(tiny, 9, 1), example(tiny, 12, 2)]
    whole = Collector(tiny.loaded.model, tiny.shape, "entry", (0, 2)).run(examples)
    expected = sites(whole)
    assert list(expected)[0] == ("neurons", tiny.shape.layers - 1)
    for keep in (0, 1, 2):
        batch = Collector(tiny.loaded.model, tiny.shape, "entry", (0, 2), keep=keep).run(examples)
        assert batch.loss == whole.loss
        torch.testing.assert_close(batch.feature(1), whole.feature(1), rtol=0, atol=0)
        found = sites(batch)
        assert found.keys() == expected.keys()
        for site, pair in found.items():
            torch.testing.assert_close(pair, expected[site], rtol=0, atol=0)


@pytest.mark.parametrize("taps", [(0,), (0, 2)])
@pytest.mark.parametrize("feature", ["residual", "normed", "entry", "context"])
def test_features_alone_are_the_features_of_the_pass(tiny, feature, taps):
    collector = Collector(tiny.loaded.model, tiny.shape, feature, taps)
    examples = [example(tiny, 7), example(tiny, 5)]
    alone, counts = collector.features(examples)
    batch = collector.run(examples)
    read = [batch.feature(tap) for tap in range(len(taps))]
    torch.testing.assert_close(alone, read, rtol=0, atol=0)
    assert torch.equal(counts, batch.counts) and len(alone) == len(taps)
    found = sites(batch)
    for tap, x in zip(taps, alone, strict=True):
        assert torch.equal(x, found["heads", tap][0].flatten(2)) == (feature == "context")


def test_entry_is_the_norm_of_the_layers_input(tiny):
    layers, states = tiny.loaded.model.get_decoder().layers, []
    handles = [
        layer.register_forward_pre_hook(lambda _, args: states.append(args[0])) for layer in layers
    ]
    found = Collector(tiny.loaded.model, tiny.shape, "entry", (0, 1, 2)).run([example(tiny, 7)])
    for handle in handles:
        handle.remove()
    name = "self_attn_layer_norm" if tiny.shape.architecture == "opt" else "input_layernorm"
    for tap, (layer, x) in enumerate(zip(layers, states[-3:], strict=True)):
        torch.testing.assert_close(layer.get_submodule(name)(x), found.feature(tap))


def test_normed_is_the_norm_of_the_residual(tiny):
    """At every layer: what the model's own norm makes of it."""
    residual, normed = (
        Collector(tiny.loaded.model, tiny.shape, feature, (0, 1, 2)).features([example(tiny, 7)])[0]
        for feature in ("residual", "normed")
    )
    name = "final_layer_norm" if tiny.shape.architecture == "opt" else "post_attention_layernorm"
    layers = tiny.loaded.model.get_decoder().layers
    for layer, x, y in zip(layers, residual, normed, strict=True):
        torch.testing.assert_close(layer.get_submodule(name)(x), y)


def test_the_model_is_left_as_it_was(tiny):
    model = tiny.loaded.model
    sites(Collector(model, tiny.shape, "residual").run([example(tiny, 6)]))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# What bfloat16 rounds away depends on how a CPU sums: below 0.2 with AVX-512, 0.29 with AMX.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.1), (torch.bfloat16, 0.4)])
def test_half_precision_gradients(dtype, tolerance):
    full, half = (load_model("opt-books-15m", dtype=d) for d in (torch.float32, dtype))

    def heads(loaded: LoadedModel):
        ids = loaded.tokenizer.encode("The old man looked at the sea and said nothing at all.")
        batch = Collector(loaded.model, loaded.shape, "residual").run(
            [Example(ids, [True] * len(ids))]
        )
        found = [g for (kind, _), (_, g) in sites(batch).items() if kind == "heads"]
        assert found[0].dtype == torch.float32
        return torch.cat([g.flatten() for g in found])

    x, y = heads(full), heads(half)
    assert (x - y).norm() / x.norm() < tolerance
    assert (x != 0).sum() == (y != 0).sum()  # nothing underflows: the loss is scaled


def test_numbers_that_are_not_finite_are_named(tiny_opt):
    model, shape = copy.deepcopy(tiny_opt.loaded.model), tiny_opt.shape
    weight = model.get_parameter("model.decoder.layers.1.fc2.weight")
    with torch.no_grad():
        weight[3, 4] = float("nan")
    with pytest.raises(CalibrationError, match=r"layers\.1\.fc2\.weight"):
        Collector(model, shape, "residual").run([example(tiny_opt, 6)])
    with torch.no_grad():
        weight[3] = 3e38
    with pytest.raises(CalibrationError, match="layer 1"):
        Collector(model, shape, "residual").run([example(tiny_opt, 6)])
