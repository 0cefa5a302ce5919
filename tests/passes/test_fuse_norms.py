"""Norms folded into the projections around them: golden, equality, refusals, idempotence."""

from functools import partial

import pytest
import torch

from shadowc.config import Policy
from shadowc.errors import PassError
from shadowc.passes.compact_masks import compact_masks
from shadowc.passes.fuse_norms import fuse_norms
from shadowc.passes.fuse_rms_norm import fuse_rms_norm
from shadowc.passes.fuse_sparse_attention import fuse_sparse_attention
from shadowc.passes.fuse_sparse_mlp import fuse_sparse_mlp
from shadowc.passes.lower_linear import lower_linear
from shadowc.passes.manager import run_passes
from shadowc.passes.pack_weights import Types, pack_weights

aten, ops = torch.ops.aten, torch.ops.shadowc
POLICY = Policy(0.4, 0.5, min_neurons=2)
BEFORE = (fuse_rms_norm, fuse_sparse_attention, fuse_sparse_mlp)
MADE = {"norm_qkv": 3, "scaled_out_proj": 3, "norm_mlp": 3, "norm_linear": 1, "scale": 1}
FULL = torch.float32


def counts(module):
    names = [getattr(n.target, "__name__", "") for n in module.graph.nodes]
    return {op: names.count(f"{op}.default") for op in MADE}


def fused(module, *passes, dtype=FULL):
    return run_passes(module, (*BEFORE, partial(fuse_norms, dtype=dtype), *passes))


def decode(tiny, module, ids):
    """Results of each token of ids [B, T], fed one by one: [B, T, V] and what else there is."""
    shape, (batch, tokens) = tiny.shape, ids.shape
    size = (batch, shape.kv_heads, tokens, shape.head_dim)
    caches = [torch.zeros(size) for _ in range(2 * shape.layers)]
    start, found = torch.zeros(batch, dtype=torch.int64), []
    for token in range(tokens):
        position = torch.tensor([token])
        inputs = (ids[:, token : token + 1], position.expand(batch, 1), start, position)
        found.append(module(*inputs, *caches))
    return torch.cat([logits for logits, *_ in found], 1), [rest for _, *rest in found]


@pytest.mark.parametrize("stage", ["find_blocks", "masked"])
def test_every_norm_is_folded(tiny, stage):
    module = fused(tiny.graph(stage))
    for norm in (aten.layer_norm, ops.rms_norm):
        assert not module.graph.find_nodes(op="call_function", target=norm.default)
    assert counts(module) == MADE
    code = module.code
    for gone in ("sparse_qkv", "sparse_out_proj", "sparse_mlp", "sparse_gated_mlp", "aten.t("):
        assert gone not in code
    # A layer norm leaves gain and shift of each projection behind; an RMS norm leaves nothing.
    made = [name for name, _ in module.named_buffers() if name.endswith(("_gain", "_shift"))]
    assert len(made) == (0 if tiny.shape.gated else 2 * (3 * 4 + 1))
    kinds = {n.args[2] for n in module.graph.nodes if str(n.target).startswith("shadowc.norm_")}
    assert kinds == {"rms" if tiny.shape.gated else "layer"}


def test_the_unfused_graph_is_the_same(tiny):
    ids = tiny.ids(tokens=5)
    want, _ = decode(tiny, run_passes(tiny.graph("find_blocks"), BEFORE), ids)
    got, rows = decode(tiny, fused(tiny.graph("find_blocks")), ids)
    # float32 in another order: the mean is subtracted after the product.
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got, tiny.loaded.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert all(len(r) == 3 and (0 < torch.stack(r)).all() for r in rows)


def test_the_unfused_graph_is_the_same_with_keep_sets(tiny):
    ids, compact = tiny.ids(tokens=5), partial(compact_masks, policy=POLICY)
    want, kept = decode(tiny, run_passes(tiny.graph("masked", POLICY), (*BEFORE, compact)), ids)
    module = fused(tiny.graph("masked", POLICY), compact, lower_linear)
    assert counts(module) == MADE
    assert module.meta["outputs"][-3:] == ("rows_0", "rows_1", "rows_2")
    got, again = decode(tiny, module, ids)
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    for here, there in zip(again, kept, strict=True):
        assert all(map(torch.equal, here[:4], there[:4]))  # the keep sets
        # An activation within rounding of zero may fall on either side.
        assert all((a - b).abs().max() <= 1 for a, b in zip(here[4:], there[4:], strict=True))


def test_keep_sets_reach_the_ops(tiny):
    module = fused(tiny.graph("masked", POLICY), partial(compact_masks, policy=POLICY))
    for op in ("norm_qkv", "scaled_out_proj", "norm_mlp"):
        nodes = module.graph.find_nodes(op="call_function", target=getattr(ops, op).default)
        dense = [node for node in nodes if node.args[-1] is None]
        assert len(dense) == (0 if op == "norm_mlp" else 1)  # layer 0 keeps all heads


def test_constants_are_those_of_the_stored_weights(tiny_opt):
    """In the type in which the matrix is read, or the mean would not cancel."""
    module = fused(tiny_opt.graph("find_blocks"), dtype=torch.float16)
    node = module.graph.find_nodes(op="call_function", target=ops.norm_linear.default)[0]
    weight, gain, shift = (getattr(module, n.target, None) for n in node.args[4:7])
    weight = tiny_opt.loaded.model.lm_head.weight.half().float()
    norm = tiny_opt.loaded.model.model.decoder.final_layer_norm
    assert gain.dtype == shift.dtype == FULL
    torch.testing.assert_close(gain, weight @ norm.weight.half().float())
    torch.testing.assert_close(shift, weight @ norm.bias.half().float())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_agrees_with_the_model(tiny, dtype):
    packed = {}
    pack = partial(pack_weights, types=Types(dtype, vectors=dtype), packed=packed)
    module = fused(tiny.graph("find_blocks"), lower_linear, pack, dtype=dtype)
    ids = tiny.ids(tokens=4)
    logits, _ = decode(tiny, tiny.bind(module, packed), ids)
    want = tiny.loaded.model(ids).logits
    # Rounding of weights and of each layer's activations: a unit in the last place of a few.
    share = {torch.float16: 1e-2, torch.bfloat16: 8e-2}[dtype]
    assert logits.dtype == FULL
    assert (logits - want).abs().max() <= share * want.abs().max()


def test_a_second_run_changes_nothing(tiny):
    module = tiny.graph("find_blocks")
    run_passes(module, BEFORE)
    assert fuse_norms(module, dtype=FULL)
    module.graph.lint()
    code = module.code
    assert not fuse_norms(module, dtype=FULL)
    assert module.code == code


def test_refuses_an_unfused_graph(tiny):
    module = tiny.graph("find_blocks")
    with pytest.raises(PassError, match="fuse_norms needs the fuse passes before it"):
        fuse_norms(module, dtype=FULL)
    # With the MLPs fused and attention not, projections are linear layers that nobody joins.
    run_passes(module, (fuse_rms_norm, fuse_sparse_mlp))
    run_passes(module, (partial(fuse_norms, dtype=FULL),))
    assert counts(module) == {
        "norm_qkv": 0, "scaled_out_proj": 0, "norm_mlp": 3, "norm_linear": 10, "scale": 4
    }  # fmt: skip


def norms_of(module):
    return [
        n for n in module.graph.nodes if n.target in (aten.layer_norm.default, ops.rms_norm.default)
    ]


@pytest.mark.parametrize("which", [0, 1, -1])
def test_refuses_a_norm_that_something_else_follows(tiny, which):
    module = run_passes(tiny.graph("find_blocks"), BEFORE)
    norm = norms_of(module)[which]
    user = next(iter(norm.users))
    with module.graph.inserting_after(norm):
        between = module.graph.call_function(aten.relu.default, (norm,))
    user.replace_input_with(norm, between)
    with pytest.raises(PassError, match=r"(?s)a norm that no projection follows.*aten.relu"):
        fuse_norms(module, dtype=FULL)


def test_refuses_a_layer_norm_without_weight(tiny_opt):
    module = run_passes(tiny_opt.graph("find_blocks"), BEFORE)
    norm = norms_of(module)[2]
    norm.args = norm.args[:2]
    norm.args = (*norm.args, None)
    with pytest.raises(PassError, match="a layer norm without weight"):
        fuse_norms(module, dtype=FULL)
