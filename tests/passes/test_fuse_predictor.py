"""A tap's predictor as one op: what it computes, what is left of the graph, what it refuses."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.testing import FileCheck

from shadowc.config import Policy
from shadowc.errors import PassError
from shadowc.passes.compact_masks import compact_masks
from shadowc.passes.fuse_choice import fuse_choice
from shadowc.passes.fuse_predictor import fuse_predictor
from shadowc.passes.fuse_rms_norm import fuse_rms_norm
from shadowc.passes.fuse_sparse_attention import fuse_sparse_attention
from shadowc.passes.fuse_sparse_mlp import fuse_sparse_mlp
from shadowc.passes.insert_predictor import insert_predictor
from shadowc.passes.manager import run_passes
from shadowc.passes.mask_attention import mask_attention
from shadowc.passes.mask_mlp import mask_mlp

aten, ops = torch.ops.aten, torch.ops.shadowc
ABOVE = Policy(0.4, 0.5, min_neurons=2, selection="threshold")
# Taps, feature, random features: without these the code is one linear.
TAPS = [
    ((0,), "residual", 16), ((0, 2), "residual", 0), ((0, 1, 2), "normed", 0),
    ((0, 1, 2), "entry", 0), ((0, 1, 2), "entry", 16),
]  # fmt: skip


def step(tiny, taps, feature, random_features, policy, *passes):
    """A decode step whose masks are compact."""
    tapped = tiny.with_taps(taps, feature, random_features)
    module = tapped.graph("find_blocks")
    masks = tapped.masks(policy)
    run_passes(module, (
        partial(insert_predictor, masks=masks, feature=feature), mask_attention, mask_mlp,
        fuse_rms_norm, fuse_sparse_attention, partial(fuse_sparse_mlp, skip_zeros=True),
        partial(compact_masks, policy=policy), *passes,
    ))  # fmt: skip
    return module


def count(module, target):
    return len(module.graph.find_nodes(op="call_function", target=target))


def run(module, shape, batch):
    torch.manual_seed(0)
    size = (batch, shape.kv_heads, 12, shape.head_dim)
    caches = [torch.randn(size) for _ in range(2 * shape.layers)]
    ids, start = torch.arange(3, 3 + batch)[:, None], torch.zeros(batch, dtype=torch.int64)
    results = module(ids, torch.full((batch, 1), 5), start, torch.tensor([5]), *caches)
    return dict(zip(module.meta["outputs"], results, strict=True))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(("taps", "feature", "random_features"), TAPS)
def test_a_step_gives_the_same(tiny, taps, feature, random_features, batch):
    """To the bit: the op adds in the order of the kernels that it stands for."""
    from shadowc.passes.lower_linear import lower_linear

    before = step(tiny, taps, feature, random_features, ABOVE, lower_linear)
    fused = step(
        tiny, taps, feature, random_features, ABOVE, fuse_choice, fuse_predictor, lower_linear
    )
    want, got = (run(module, tiny.shape, batch) for module in (before, fused))
    assert want.keys() == got.keys() and {"head_index", "neuron_count"} <= got.keys()
    for name, value in want.items():
        assert torch.equal(value, got[name]), name
    chosen = want["neuron_count"]
    assert 0 < int(chosen.sum()) < chosen.numel() * tiny.shape.ffn
    assert count(fused, ops.choose_into.default) == len(taps)
    # A code of random features stays, with its two products.
    assert count(fused, ops.linear.default) == 1 + 2 * len(taps) * bool(random_features)


def test_golden(tiny_opt):
    module = step(tiny_opt, (0, 1, 2), "entry", 0, ABOVE, fuse_choice, fuse_predictor)
    FileCheck().check_count("new_empty.default", 4, exactly=True).run(module.code)
    FileCheck().check("unbind.int").check("choose_into.default(layer_norm").check(
        "sparse_qkv"
    ).check("sparse_mlp").check("choose_into").check("sparse_qkv").run(module.code)
    for gone in (aten.cat, ops.choose_above, ops.select_above):
        assert not count(module, gone.default)
    places = [n.args[-1] for n in module.graph.nodes if n.target is ops.choose_into.default]
    assert places == [[0, 0], [1, 1], [2]]  # nothing comes after the last layer's heads
    assert not fuse_predictor(module)


def test_kinds_that_all_run_have_no_sets(tiny):
    policy = replace(ABOVE, head_sparsity=0.0)
    module = step(tiny, (0, 1, 2), "entry", 0, policy, fuse_choice, fuse_predictor)
    assert count(module, ops.choose_into.default) == 3
    assert count(module, aten.new_empty.default) == 2
    assert "head_index" not in run(module, tiny.shape, 2)


def test_keep_sets_of_another_make_are_refused(tiny):
    module = step(tiny, (0, 1, 2), "entry", 0, ABOVE, fuse_choice)
    results = dict(zip(module.meta["outputs"], module.graph.output_node().args[0], strict=True))
    joined = results["neuron_index"]
    with module.graph.inserting_before(joined):
        clone = module.graph.call_function(aten.clone.default, (joined.args[0][1],))
    joined.args = ([joined.args[0][0], clone, *joined.args[0][2:]],)
    with pytest.raises(PassError, match="keep sets of another make"):
        fuse_predictor(module)
