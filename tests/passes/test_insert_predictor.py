"""insert_predictor: scores and masks, nothing else changed."""

from functools import partial

import pytest
import torch

from shadowc.config import Policy
from shadowc.errors import PassError
from shadowc.evaluation.masks import mask_source
from shadowc.passes.find_blocks import blocks_of
from shadowc.passes.insert_predictor import StaticScores, export_masks, insert_predictor
from shadowc.passes.manager import copy_module, run_passes

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
    masks = export_masks(static, tiny.shape, POLICY, tiny.shape.hidden)
    module = run_passes(tiny.graph("find_blocks"), (partial(insert_predictor, masks=masks),))
    _, (_, heads, neurons) = run(tiny, module)
    assert (heads[:, 2:] == heads[:1, 2:3]).all() and (neurons[:, 2:] == neurons[:1, 2:3]).all()


def test_context_feature_reads_layer_0s_attention(tiny):
    masks = export_masks(tiny.calibration.build_predictor(), tiny.shape, POLICY, tiny.shape.hidden)
    module = run_passes(
        tiny.graph("find_blocks"), (partial(insert_predictor, masks=masks, feature="context"),)
    )
    _, (_, heads, _) = run(tiny, module)
    _, (_, other, _) = run(tiny, tiny.graph("insert_predictor", POLICY))
    assert not torch.equal(heads, other)


def test_idempotent_and_needs_blocks(tiny):
    module = tiny.graph("insert_predictor", POLICY)
    masks = export_masks(tiny.calibration.build_predictor(), tiny.shape, POLICY, 64)
    assert not insert_predictor(module, masks=masks)
    assert blocks_of(module).keep is not None
    with pytest.raises(PassError, match="needs find_blocks"):
        insert_predictor(copy_module(tiny.traced), masks=masks)
