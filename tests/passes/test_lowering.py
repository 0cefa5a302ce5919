"""The lowering passes, each by its golden, its equality, its refusal and its idempotence."""

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
from shadowc.passes.insert_predictor import PREFIX
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


def test_fuse_sparse_attention_core_leaves_the_projections(tiny):
    """For prompts: only what needs the cache is replaced."""
    module, ids = tiny.graph("find_blocks"), tiny.ids()
    before = count(module, aten.linear.default)
    run_passes(module, (partial(fuse_sparse_attention, core=True),))
    assert count(module, ops.decode_attention.default) == 3
    assert count(module, aten.linear.default) == before
    assert count(module, aten.scaled_dot_product_attention.default) == 0
    for op in (ops.sparse_qkv, ops.sparse_out_proj):
        assert count(module, op.default) == 0
    assert "attention_mask" not in [n.name for n in module.graph.find_nodes(op="placeholder")]
    memory = caches(tiny, 2)
    first = module(*state(tiny, ids[:, :7]), *memory)[0]
    second = module(*state(tiny, ids[:, 7:], 7), *memory)[0]
    torch.testing.assert_close(
        torch.cat((first, second), 1), tiny.loaded.model(ids).logits, atol=1e-4, rtol=1e-4
    )
    assert not fuse_sparse_attention(module, core=True)
    blocks = module.meta["blocks"]
    assert all(block.output.args[0] is block.context for block in blocks.attention)


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


def test_lower_linear_only_the_predictor(tiny):
    module = tiny.graph("insert_predictor")
    before = count(module, aten.linear.default)
    only = partial(lower_linear, only=PREFIX)
    run_passes(module, (only,))
    made = module.graph.find_nodes(op="call_function", target=ops.linear.default)
    assert made and all(str(node.args[1].target).startswith(f"{PREFIX}.") for node in made)
    rest = module.graph.find_nodes(op="call_function", target=aten.linear.default)
    assert len(rest) == before - len(made)
    assert not [node for node in rest if str(node.args[1].target).startswith(PREFIX)]
    assert not only(module)
    assert not lower_linear(tiny.graph("find_blocks"), only=PREFIX)


HALVES = [torch.bfloat16, torch.float16]
# Largest error over largest logit: weights and a few activations a layer are rounded.
SHARES = {torch.float16: 1e-2, torch.bfloat16: 8e-2}


def prompt(tiny, types, packed):
    """The lowering of a prompt whose products belong to torch."""
    core, pack = partial(fuse_sparse_attention, core=True), partial(pack_weights, types=types)
    passes = (fuse_rms_norm, core, last_logits, partial(pack, packed=packed))
    return run_passes(tiny.graph("find_blocks"), passes)


@pytest.mark.parametrize("dtype", HALVES)
def test_pack_weights_computes_in_half_precision(tiny, dtype):
    """Nothing is cast where matrices, vectors and activations have one type."""
    packed, types = {}, Types(dtype, vectors=dtype, compute=dtype)
    module, ids = prompt(tiny, types, packed), tiny.ids()
    names = dict(tiny.loaded.model.named_parameters(remove_duplicate=False))
    for name, value in packed.items():
        assert value.dtype == (dtype if name in names else torch.float32), name
    weights = module.graph.find_nodes(op="get_attr")
    casts = [n for n in module.graph.find_nodes(op="call_function", target=aten.to.dtype)]
    assert not [n for n in casts if n.args[0] in weights and n.args[1] == dtype]
    logits = tiny.bind(module, packed)(*state(tiny, ids), *caches(tiny, 2))[0]
    expected = tiny.loaded.model(ids).logits[:, -1:]
    assert logits.dtype == dtype
    assert (logits.float() - expected).abs().max() <= SHARES[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", HALVES)
def test_pack_weights_stores_once_what_all_programs_share(tiny, dtype):
    """A step in float32, a prompt in half precision and the masked graph read the same tensors."""
    packed = {}
    pack = partial(pack_weights, types=Types(dtype, vectors=dtype), packed=packed)
    norms = partial(fuse_norms, dtype=dtype)
    steps = (fuse_rms_norm, fuse_sparse_attention, fuse_sparse_mlp, norms, lower_linear, pack)
    step = run_passes(tiny.graph("find_blocks"), steps)
    half = prompt(tiny, Types(dtype, vectors=dtype, compute=dtype), packed)
    masked = run_passes(tiny.graph("find_blocks"), (pack,))
    parameters = dict(tiny.loaded.model.named_parameters(remove_duplicate=False))
    own = [name for name in packed if name.removesuffix("_t") in parameters]
    for name, value in packed.items():
        assert name.removesuffix("_t") not in packed or not name.endswith("_t")
        assert value.dtype == (dtype if name in own else torch.float32), name
        assert value.make().is_contiguous(), name
    total = sum(p.numel() for p in tiny.loaded.model.parameters())
    assert sum(packed[name].shape.numel() for name in own) == total
    # Attention's output projections stay as they are, as `scaled_out_proj` wants them.
    assert len([name for name in own if name.endswith("_t")]) == 3
    for module in (half, masked):  # read back as the transpose of what is stored
        assert count(module, aten.t.default) == 3
    for module in (step, half, masked):
        tiny.bind(module, packed)

    ids = tiny.ids(tokens=1)
    lowered = step(*state(tiny, ids), *caches(tiny, 2))[0]
    want = masked(*tiny.inputs(ids))[0]
    logits = half(*state(tiny, ids), *caches(tiny, 2))[0]
    assert lowered.dtype == want.dtype == torch.float32 and logits.dtype == dtype
    for found in (lowered, logits.float()):  # a unit in the last place, a few times a layer
        assert (found - want).abs().max() <= SHARES[dtype] * want.abs().max()


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
        assert value.make().is_contiguous()
        matrix = len(value.shape) > 1
        assert value.dtype == (dtype if matrix else torch.float32), name
    total = sum(p.numel() for p in tiny.loaded.model.parameters())
    buffers = sum(v.shape.numel() for n, v in packed.items() if "inv_freq" in n)
    assert sum(v.shape.numel() for v in packed.values()) - buffers == total  # each weight once

    masked = run_passes(
        tiny.graph("find_blocks"), (partial(pack_weights, types=Types(dtype), packed=packed),)
    )
    ids = tiny.ids()
    for each in (module, masked):
        tiny.bind(each, packed)
    lowered = module(*state(tiny, ids), *caches(tiny, 2))[0]
    torch.testing.assert_close(lowered, masked(*tiny.inputs(ids))[0][:, -1:], atol=1e-3, rtol=1e-3)
