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
ABOVE = Policy(0.4, 0.5, min_neurons=2, selection="threshold")


def scores_of(module, tiny, ids):
    """All scores in place of the graph's results: masks no longer fit all tokens."""
    keep = blocks_of(module).keep
    module.graph.output_node().args = (tuple(choice.scores for choice in keep.choices),)
    eliminate_dead_code(module.graph)
    module.recompile()
    return module(*tiny.inputs(ids), torch.zeros(ids.shape, dtype=torch.int64))


TAPS = [(0,), (0, 2), (0, 1, 2)]


@pytest.mark.parametrize(
    "feature, taps",
    [
        ("context", (0,)),
        *(("residual", t) for t in TAPS),
        *((f, TAPS[2]) for f in ("normed", "entry")),
    ],
)
def test_scores_are_those_of_the_last_token(tiny, feature, taps):
    ids, tiny = tiny.ids(), tiny.with_taps(taps)
    found = []
    for passes in ((), (last_feature,)):
        module = tiny.graph("find_blocks")
        masks = tiny.masks(ABOVE)
        run_passes(module, (partial(insert_predictor, masks=masks, feature=feature), *passes))
        found.append(scores_of(module, tiny, ids))
    for every, last in zip(*found, strict=True):
        assert every.shape[1] == 12 and last.shape[1] == 1
        torch.testing.assert_close(last, every[:, -1:], atol=1e-5, rtol=1e-5)
        assert (every[:, -2] - every[:, -1]).abs().max() > 0.1


@pytest.mark.parametrize("core", [False, True])
@pytest.mark.parametrize("policy, taps", [(POLICY, (0,)), *((ABOVE, t) for t in TAPS)])
def test_a_prompt_gives_the_same_keep_sets(tiny, core, policy, taps):
    ids, shape, tiny = tiny.ids(), tiny.shape, tiny.with_taps(taps)
    attention = partial(fuse_sparse_attention, core=core)
    results = []
    for passes in ((), (last_feature,)):
        module = tiny.graph("insert_predictor", policy)
        compact = partial(compact_masks, policy=policy)
        run_passes(module, (attention, last_logits, *passes, compact))
        size = (2, shape.kv_heads, 12, shape.head_dim)
        caches = [torch.zeros(size) for _ in range(2 * shape.layers)]
        inputs = (ids, torch.arange(12).expand(2, -1), torch.tensor([0, 0]), torch.tensor([0]))
        results.append(dict(zip(module.meta["outputs"], module(*inputs, *caches), strict=True)))
    assert set(results[0]) == set(results[1])
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]) or name == "logits"
    torch.testing.assert_close(results[0]["logits"], results[1]["logits"])


@pytest.mark.parametrize("taps", TAPS)
def test_one_slice_a_tap_and_a_second_run_changes_nothing(tiny, taps):
    module = tiny.with_taps(taps).graph("insert_predictor", ABOVE)
    every = list(blocks_of(module).keep.readers)
    assert len(every) == len(taps) and all(every)
    before = len(module.graph.find_nodes(op="call_function", target=aten.slice.Tensor))
    assert last_feature(module)
    slices = module.graph.find_nodes(op="call_function", target=aten.slice.Tensor)
    assert len(slices) == before + len(taps)
    for readers in every:
        (wide,) = {n for node in readers for n in node.all_input_nodes if n.op != "get_attr"}
        assert wide.target is aten.contiguous.default
        (wide,) = wide.args
        assert wide.target is aten.to.dtype and wide.args[1] is torch.float32
        assert wide.args[0] in slices and wide.args[0].args[1:] == (1, -1)
    assert not last_feature(module)
    module.graph.lint()


def test_a_graph_without_predictor_has_nothing_to_slice(tiny):
    assert not last_feature(tiny.graph("find_blocks"))


def test_refuses_masks_that_are_in_use(tiny):
    module = tiny.graph("masked")
    with pytest.raises(PassError, match="masks of all tokens are in use"):
        last_feature(module)
