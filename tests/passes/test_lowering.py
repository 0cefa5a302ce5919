"""The lowering passes, each by its golden, its equality, its refusal and its idempotence."""

from functools import partial

import pytest
import torch

from shadowc.config import Policy
from shadowc.errors import PassError
from shadowc.passes.compact_masks import compact_masks
from shadowc.passes.fuse_rms_norm import fuse_rms_norm
from shadowc.passes.fuse_sparse_attention import fuse_sparse_attention
from shadowc.passes.fuse_sparse_mlp import fuse_sparse_mlp
from shadowc.passes.last_logits import last_logits
from shadowc.passes.lower_linear import lower_linear
from shadowc.passes.manager import run_passes
from shadowc.passes.pack_weights import Types, pack_weights

aten, ops = torch.ops.aten, torch.ops.shadowc
POLICY = Policy(0.4, 0.5, min_neurons=2)


def count(module, target):
    return len(module.graph.find_nodes(op="call_function", target=target))


def caches(tiny, batch, slots=12):
    shape = tiny.shape
    size = (batch, shape.kv_heads, slots, shape.head_dim)
    return [torch.zeros(size) for _ in range(2 * shape.layers)]


def state(tiny, ids, position=0):
    """What a lowered graph takes: ids, positions, start, position, caches."""
    batch, tokens = ids.shape
    positions = torch.arange(position, position + tokens).expand(batch, -1)
    return (ids, positions, torch.zeros(batch, dtype=torch.int64), torch.tensor([position]))


def test_fuse_rms_norm(tiny_llama, tiny_opt):
    module, ids = tiny_llama.graph("find_blocks"), tiny_llama.ids()
    run_passes(module, (fuse_rms_norm,))
    assert count(module, ops.rms_norm.default) == 7
    assert count(module, aten.rsqrt.default) == 0
    torch.testing.assert_close(
        module(*tiny_llama.inputs(ids))[0], tiny_llama.loaded.model(ids).logits,
        atol=1e-4, rtol=1e-4,
    )  # fmt: skip
    assert not fuse_rms_norm(module)
    assert not fuse_rms_norm(tiny_opt.graph("find_blocks"))  # OPT has layer norms


def test_fuse_sparse_attention_dense(tiny):
    module, ids = tiny.graph("find_blocks"), tiny.ids()
    run_passes(module, (fuse_sparse_attention,))
    for op in (ops.sparse_qkv, ops.decode_attention, ops.sparse_out_proj):
        assert count(module, op.default) == 3
    assert count(module, aten.scaled_dot_product_attention.default) == 0
    assert "attention_mask" not in [n.name for n in module.graph.find_nodes(op="placeholder")]
    logits = module(*state(tiny, ids), *caches(tiny, 2))[0]
    torch.testing.assert_close(logits, tiny.loaded.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert not fuse_sparse_attention(module)


def test_fuse_sparse_attention_decodes_from_its_cache(tiny):
    module, ids = tiny.graph("find_blocks"), tiny.ids()
    run_passes(module, (fuse_sparse_attention,))
    memory = caches(tiny, 2)
    module(*state(tiny, ids[:, :7]), *memory)
    for token in range(7, 12):
        logits = module(*state(tiny, ids[:, token : token + 1], token), *memory)[0]
    expected = tiny.loaded.model(ids).logits[:, -1:]
    torch.testing.assert_close(logits, expected, atol=1e-4, rtol=1e-4)


def test_fuse_sparse_attention_refuses_different_inputs(tiny):
    module = tiny.graph("find_blocks")
    block = module.meta["blocks"].attention[1]
    block.key.replace_input_with(block.key.args[0], module.meta["blocks"].attention[0].context)
    with pytest.raises(PassError, match="project from different inputs"):
        fuse_sparse_attention(module)


@pytest.mark.parametrize("skip_zeros", [True, False])
def test_fuse_sparse_mlp(tiny, skip_zeros):
    module, ids = tiny.graph("find_blocks"), tiny.ids()
    run_passes(module, (partial(fuse_sparse_mlp, skip_zeros=skip_zeros),))
    op = ops.sparse_gated_mlp if tiny.shape.gated else ops.sparse_mlp
    assert count(module, op.default) == 3
    logits, *rows = module(*tiny.inputs(ids))
    torch.testing.assert_close(logits, tiny.loaded.model(ids).logits, atol=1e-4, rtol=1e-4)
    assert len(rows) == 3
    all_rows = 12 * tiny.shape.ffn
    if skip_zeros and not tiny.shape.gated:
        assert all((0 < r).all() and (r < all_rows).all() for r in rows)
    else:
        assert all((r == all_rows).all() for r in rows)
    assert not fuse_sparse_mlp(module)


def test_fuse_sparse_mlp_refuses_biases_in_a_gated_mlp(tiny_llama):
    module = tiny_llama.graph("find_blocks")
    down = module.meta["blocks"].mlp[0].output
    down.args = (*down.args[:2], module.graph.find_nodes(op="get_attr")[0])
    with pytest.raises(PassError, match="a gated MLP with biases"):
        fuse_sparse_mlp(module)


def test_each_stage_of_lowering_runs_and_agrees(tiny):
    """One decode step of the masked graph, the fused one, and the one with `select`."""
    ids = tiny.ids(tokens=1)
    source = torch.zeros(2, 1, dtype=torch.int64)
    masked = tiny.graph("masked", POLICY)
    expected, heads, neurons = masked(*tiny.inputs(ids), source)
    module = tiny.graph("masked", POLICY)
    run_passes(module, (fuse_sparse_attention, fuse_sparse_mlp))
    assert count(module, ops.compact.default) == 5
    ids_, positions, start, position = state(tiny, ids)
    names = [n.name for n in module.graph.find_nodes(op="placeholder")]
    assert names[:5] == ["input_ids", "position_ids", "mask_source", "start", "position"]
    fused = module(ids_, positions, source, start, position, *caches(tiny, 2))[0]
    torch.testing.assert_close(fused, expected, atol=1e-4, rtol=1e-4)

    run_passes(module, (partial(compact_masks, policy=POLICY),))
    assert count(module, ops.compact.default) == 0
    assert count(module, ops.select.default) == 2
    assert not compact_masks(module, policy=POLICY)
    outputs = module.meta["outputs"]
    assert outputs[:5] == ("logits", "head_index", "head_count", "neuron_index", "neuron_count")
    results = dict(zip(outputs, module(*state(tiny, ids), *caches(tiny, 2)), strict=True))
    torch.testing.assert_close(results["logits"], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(results["head_count"].T, heads[:, 0, 1:].sum(-1))
    assert torch.equal(results["neuron_count"].T, neurons[:, 0].sum(-1))


def test_compact_masks_hold_takes_the_keep_sets(tiny):
    ids = tiny.ids(tokens=1)
    step = (fuse_sparse_attention, fuse_sparse_mlp)
    chosen = run_passes(
        tiny.graph("masked", POLICY), (*step, partial(compact_masks, policy=POLICY))
    )
    results = chosen(*state(tiny, ids), *caches(tiny, 2))
    held = run_passes(
        tiny.graph("masked", POLICY), (*step, partial(compact_masks, policy=POLICY, hold=True))
    )
    assert count(held, ops.select.default) == 0
    assert not [n for n in held.graph.nodes if str(n.target).startswith("predictor.")]
    again = held(*state(tiny, ids), *results[1:5], *caches(tiny, 2))
    assert torch.equal(again[0], results[0])


def test_compact_masks_leaves_out_what_keeps_all(tiny):
    policy = Policy(0.0, 0.5, min_neurons=2)
    passes = (fuse_sparse_attention, fuse_sparse_mlp, partial(compact_masks, policy=policy))
    module = run_passes(tiny.graph("masked", policy), passes)
    assert "head_index" not in module.meta["outputs"]
    assert count(module, ops.select.default) == 1


def test_compact_masks_refuses_an_unfused_graph(tiny):
    with pytest.raises(PassError, match="needs the fuse passes before it"):
        compact_masks(tiny.graph("masked"), policy=POLICY)


def test_last_logits(tiny):
    module, ids = tiny.graph("find_blocks"), tiny.ids()
    assert last_logits(module) and not last_logits(module)
    module.recompile()
    logits = module(*tiny.inputs(ids))[0]
    torch.testing.assert_close(logits, tiny.loaded.model(ids).logits[:, -1:])
    module.graph.output_node().args = ((module.graph.find_nodes(op="placeholder")[0],),)
    with pytest.raises(PassError, match="the logits are not a projection"):
        last_logits(module)


def test_lower_linear(tiny):
    module, ids = tiny.graph("find_blocks"), tiny.ids()
    assert lower_linear(module) and not lower_linear(module)
    module.recompile()
    assert count(module, aten.linear.default) == 0
    torch.testing.assert_close(
        module(*tiny.inputs(ids))[0], tiny.loaded.model(ids).logits, atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pack_weights(tiny, dtype):
    lowering = (fuse_rms_norm, fuse_sparse_attention, fuse_sparse_mlp, last_logits, lower_linear)
    packed = {}
    pack = partial(pack_weights, types=Types(dtype), packed=packed)
    module = run_passes(tiny.graph("find_blocks"), (*lowering, pack))
    assert count(module, aten.t.default) == 0
    assert not pack_weights(module, types=Types(dtype), packed=packed)
    turned = [name for name in packed if name.endswith("_t")]
    assert len(turned) == 6  # out and second projection of each layer
    for name, value in packed.items():
        assert value.is_contiguous()
        matrix = value.dim() > 1
        assert value.dtype == (dtype if matrix else torch.float32), name
    total = sum(p.numel() for p in tiny.loaded.model.parameters())
    buffers = sum(v.numel() for n, v in packed.items() if "inv_freq" in n)
    assert sum(v.numel() for v in packed.values()) - buffers == total  # each weight once

    masked = run_passes(
        tiny.graph("find_blocks"), (partial(pack_weights, types=Types(dtype), packed=packed),)
    )
    ids = tiny.ids()
    lowered = module(*state(tiny, ids), *caches(tiny, 2))[0]
    torch.testing.assert_close(lowered, masked(*tiny.inputs(ids))[0][:, -1:], atol=1e-3, rtol=1e-3)
