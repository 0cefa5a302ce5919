"""A prompt's keep sets come from its last token: equality, golden, refusal, idempotence."""

from functools import partial

import pytest
import torch

from shadowc.config import Policy
from shadowc.errors import PassError
from shadowc.passes.compact_masks import compact_masks
from shadowc.passes.find_blocks import blocks_of
from shadowc.passes.fuse_sparse_attention import fuse_sparse_attention
from shadowc.passes.insert_predictor import insert_predictor
from shadowc.passes.last_feature import last_feature
from shadowc.passes.last_logits import last_logits
from shadowc.passes.manager import eliminate_dead_code, run_passes

aten = torch.ops.aten
POLICY = Policy(0.4, 0.5, min_neurons=2)


def scores_of(module, tiny, ids):
    """Head and neuron scores in place of the graph's results: masks no longer fit all tokens."""
    keep = blocks_of(module).keep
    module.graph.output_node().args = ((keep.head_scores, keep.neuron_scores),)
    eliminate_dead_code(module.graph)
    module.recompile()
    return module(*tiny.inputs(ids), torch.zeros(ids.shape, dtype=torch.int64))


@pytest.mark.parametrize("feature", ["residual", "context"])
def test_scores_are_those_of_the_last_token(tiny, feature):
    ids = tiny.ids()
    found = []
    for passes in ((), (last_feature,)):
        module = tiny.graph("find_blocks")
        masks = tiny.masks(POLICY)
        run_passes(module, (partial(insert_predictor, masks=masks, feature=feature), *passes))
        found.append(scores_of(module, tiny, ids))
    for every, last in zip(*found, strict=True):
        assert every.shape[1] == 12 and last.shape[1] == 1
        torch.testing.assert_close(last, every[:, -1:], atol=1e-5, rtol=1e-5)
        assert (every[:, -2] - every[:, -1]).abs().max() > 0.1


@pytest.mark.parametrize("core", [False, True])
def test_a_prompt_gives_the_same_keep_sets(tiny, core):
    ids, shape = tiny.ids(), tiny.shape
    attention = partial(fuse_sparse_attention, core=core)
    results = []
    for passes in ((), (last_feature,)):
        module = tiny.graph("insert_predictor")
        compact = partial(compact_masks, policy=POLICY)
        run_passes(module, (attention, last_logits, *passes, compact))
        size = (2, shape.kv_heads, 12, shape.head_dim)
        caches = [torch.zeros(size) for _ in range(2 * shape.layers)]
        inputs = (ids, torch.arange(12).expand(2, -1), torch.tensor([0, 0]), torch.tensor([0]))
        results.append(dict(zip(module.meta["outputs"], module(*inputs, *caches), strict=True)))
    assert set(results[0]) == set(results[1])
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]) or name == "logits"
    torch.testing.assert_close(results[0]["logits"], results[1]["logits"])


def test_one_slice_and_a_second_run_changes_nothing(tiny):
    module = tiny.graph("insert_predictor")
    readers = list(blocks_of(module).keep.readers)
    assert readers
    before = len(module.graph.find_nodes(op="call_function", target=aten.slice.Tensor))
    assert last_feature(module)
    slices = module.graph.find_nodes(op="call_function", target=aten.slice.Tensor)
    assert len(slices) == before + 1
    (last,) = {n for node in readers for n in node.all_input_nodes if n.op != "get_attr"}
    assert last in slices and last.args[1:] == (1, -1)
    assert not last_feature(module)
    module.graph.lint()


def test_a_graph_without_predictor_has_nothing_to_slice(tiny):
    assert not last_feature(tiny.graph("find_blocks"))


def test_refuses_masks_that_are_in_use(tiny):
    module = tiny.graph("masked")
    with pytest.raises(PassError, match="masks of all tokens are in use"):
        last_feature(module)
