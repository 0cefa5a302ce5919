"""The selection of a tap as one op: what it computes, where it stands, and whom it hurries."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from shadowc.config import Policy
from shadowc.errors import PassError
from shadowc.passes.compact_masks import compact_masks
from shadowc.passes.fuse_choice import fuse_choice
from shadowc.passes.fuse_rms_norm import fuse_rms_norm
from shadowc.passes.fuse_sparse_attention import fuse_sparse_attention
from shadowc.passes.fuse_sparse_mlp import fuse_sparse_mlp
from shadowc.passes.insert_predictor import insert_predictor
from shadowc.passes.manager import run_passes
from shadowc.passes.mask_attention import mask_attention
from shadowc.passes.mask_mlp import mask_mlp

ops = torch.ops.shadowc
ABOVE = Policy(0.4, 0.5, min_neurons=2, selection="threshold")
TAPS = [((0,), "residual"), ((0, 2), "residual"), ((0, 1, 2), "normed"), ((0, 1, 2), "entry")]


def step(tiny, taps, feature, policy, *passes):
    """A decode step whose masks are compact."""
    tapped = tiny.with_taps(taps, feature)
    module = tapped.graph("find_blocks")
    masks = tapped.masks(policy)
    run_passes(module, (
        partial(insert_predictor, masks=masks, feature=feature), mask_attention, mask_mlp,
        fuse_rms_norm, fuse_sparse_attention, partial(fuse_sparse_mlp, skip_zeros=True),
        partial(compact_masks, policy=policy), *passes,
    ))  # fmt: skip
    return module


def found(module):
    return module.graph.find_nodes(op="call_function", target=ops.choose_above.default)


@pytest.mark.parametrize(("taps", "feature"), TAPS)
def test_a_step_gives_the_same(tiny, taps, feature):
    shape, results = tiny.shape, []
    for passes in ((), (fuse_choice,)):
        module = step(tiny, taps, feature, ABOVE, *passes)
        torch.manual_seed(0)
        size = (2, shape.kv_heads, 12, shape.head_dim)
        caches = [torch.randn(size) for _ in range(2 * shape.layers)]
        ids = tiny.ids()[:, :1]
        inputs = ids, torch.full((2, 1), 5), torch.tensor([0, 0]), torch.tensor([5])
        results.append(dict(zip(module.meta["outputs"], module(*inputs, *caches), strict=True)))
    assert len(found(module)) == len(taps)
    assert not module.graph.find_nodes(op="call_function", target=ops.select_above.default)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


@pytest.mark.parametrize(("taps", "feature"), TAPS)
def test_a_layer_that_reads_next_is_hurried(tiny_opt, taps, feature):
    """What is chosen before a layer's attention is ready when its MLP starts."""
    module = step(tiny_opt, taps, feature, ABOVE, fuse_choice)
    assert [node.args[4] for node in found(module)] == [feature != "entry"] * len(taps)
    assert not fuse_choice(module)


def test_kinds_that_all_run_are_not_chosen(tiny):
    module = step(tiny, (0,), "residual", replace(ABOVE, head_sparsity=0.0), fuse_choice)
    (choice,) = found(module)
    assert len(choice.args[1]) == 1


def test_scores_of_another_make_are_refused(tiny):
    module = step(tiny, (0,), "residual", ABOVE)
    select = module.graph.find_nodes(op="call_function", target=ops.select_above.default)[0]
    with module.graph.inserting_before(select):
        doubled = module.graph.call_function(torch.ops.aten.mul.Tensor, (select.args[0], 2.0))
    select.args = (doubled, select.args[1])
    with pytest.raises(PassError, match="scores of another make"):
        fuse_choice(module)
