"""insert_predictor: scores and masks, nothing else changed."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from shadowc.calibration.collect import Collector
from shadowc.calibration.data import Example
from shadowc.config import Policy
from shadowc.errors import PassError
from shadowc.evaluation.masks import mask_source
from shadowc.passes.find_blocks import blocks_of
from shadowc.passes.insert_predictor import StaticScores, export_masks, insert_predictor
from shadowc.passes.manager import copy_module, run_passes
from shadowc.selection import selections

POLICY = Policy(0.5, 0.5, min_neurons=2)


def run(tiny, module, refresh=1):
    ids = tiny.ids()
    source = mask_source(ids.shape[1], prompt=2, refresh=refresh).expand(2, -1)
    return ids, module(*tiny.inputs(ids), source)


def test_logits_are_untouched_and_masks_have_the_budget(tiny):
    ids, (logits, heads, neurons) = run(tiny, tiny.graph("insert_predictor", POLICY))
    assert torch.equal(logits, tiny.loaded.model(ids).logits)
    assert heads.dtype == neurons.dtype == torch.bool
    assert heads[:, :2].all() and neurons[:, :2].all()  # the prompt runs dense
    assert (heads[:, 2:].sum((-1, -2)) == 6).all()  # half of 3 x 4 heads
    assert heads[:, :, 0].all()
    assert (neurons[:, 2:].sum((-1, -2)) == 144).all()


@pytest.mark.parametrize("refresh", [0, 1, 4])
def test_mask_source_states_every_refresh_mode(tiny, refresh):
    module = tiny.graph("insert_predictor", POLICY)
    _, (_, own_heads, own_neurons) = run(tiny, module)
    _, (_, heads, neurons) = run(tiny, module, refresh)
    source = mask_source(12, prompt=2, refresh=refresh)
    for token in range(3, 12):
        if source[token] >= 2:
            assert torch.equal(heads[:, token], own_heads[:, source[token]])
            assert torch.equal(neurons[:, token], own_neurons[:, source[token]])
        else:
            assert torch.equal(neurons[:, token], neurons[:, 2])


def test_static_scores_give_one_mask(tiny):
    calibration = tiny.calibration
    static = StaticScores(calibration.mean_head_scores, calibration.mean_neuron_scores)
    chosen = selections(calibration, POLICY)
    masks = export_masks([static], chosen, tiny.shape.hidden)
    module = run_passes(tiny.graph("find_blocks"), (partial(insert_predictor, masks=masks),))
    _, (_, heads, neurons) = run(tiny, module)
    assert (heads[:, 2:] == heads[:1, 2:3]).all() and (neurons[:, 2:] == neurons[:1, 2:3]).all()


def test_context_feature_reads_layer_0s_attention(tiny):
    module = run_passes(
        tiny.graph("find_blocks"),
        (partial(insert_predictor, masks=tiny.masks(POLICY), feature="context"),),
    )
    _, (_, heads, _) = run(tiny, module)
    _, (_, other, _) = run(tiny, tiny.graph("insert_predictor", POLICY))
    assert not torch.equal(heads, other)


TAPS = [(0,), (0, 2), (0, 1, 2)]
ABOVE = replace(POLICY, selection="threshold")


@pytest.mark.parametrize("feature", ["residual", "normed", "entry"])
@pytest.mark.parametrize("taps", TAPS)
def test_each_tap_scores_its_own_layers_from_its_own_feature(tiny, taps, feature):
    """Every mask is what its tap's predictor and thresholds make of what the model itself computes
    there; the logits are untouched."""
    tapped = tiny.with_taps(taps, feature)
    module = tapped.graph("insert_predictor", ABOVE)
    ids, (logits, heads, neurons) = run(tapped, module)
    assert torch.equal(logits, tiny.loaded.model(ids).logits)
    assert heads[:, :, 0].all() and heads[:, :2].all() and neurons[:, :2].all()
    collector = Collector(tiny.loaded.model, tiny.shape, feature, taps)
    seen, _ = collector.features([Example(row, [True] * len(row)) for row in ids.tolist()])
    chosen = selections(tapped.calibration, ABOVE)
    layers = {"heads": [], "neurons": []}
    predictors = tapped.calibration.build_predictors()
    for x, predictor, (tap, *thresholds) in zip(seen, predictors, chosen, strict=True):
        for kind, scores, threshold in zip(layers, predictor(x), thresholds, strict=True):
            mask = (heads if kind == "heads" else neurons)[:, :, list(getattr(tap, kind))]
            assert torch.equal(mask[:, 2:], scores[:, 2:] > threshold[:, None])
            assert not tap.neurons or mask.numel() == 0 or not mask[:, 2:].all()
            layers[kind] += getattr(tap, kind)
    assert layers == {"heads": [1, 2], "neurons": [0, 1, 2]}
    weights = {str(n.target).split(".")[1] for n in module.graph.find_nodes(op="get_attr")
               if str(n.target).startswith("predictor.")}  # fmt: skip
    assert weights == {str(tap) for tap in taps}


def test_local_top_k_of_several_taps_is_that_of_one(tiny_opt):
    """The budget of a layer does not depend on where the taps are; 145 / 3 leaves a rest."""
    policy = Policy(0.5, 143 / 288, scope="local", min_neurons=2)
    counts = []
    for taps in TAPS:
        tapped = tiny_opt.with_taps(taps)
        _, (_, heads, neurons) = run(tapped, tapped.graph("insert_predictor", policy))
        counts.append((heads[0, 2].sum(-1).tolist(), neurons[0, 2].sum(-1).tolist()))
    assert counts == [([4, 1, 1], [49, 48, 48])] * 3


@pytest.mark.parametrize("taps", TAPS)
def test_idempotent_and_needs_blocks(tiny, taps):
    tiny = tiny.with_taps(taps)
    module = tiny.graph("insert_predictor", ABOVE)
    masks = tiny.masks(ABOVE)
    assert not insert_predictor(module, masks=masks)
    assert blocks_of(module).keep is not None
    with pytest.raises(PassError, match="needs find_blocks"):
        insert_predictor(copy_module(tiny.traced), masks=masks)
