"""find_blocks: every block, by structure; a refusal says what was looked for."""

from dataclasses import replace

import pytest
import torch

from shadowc.errors import PassError
from shadowc.passes.find_blocks import blocks_of, find_blocks
from shadowc.passes.manager import copy_module

aten = torch.ops.aten


def test_finds_every_block(tiny):
    blocks = blocks_of(tiny.graph("find_blocks"))
    assert len(blocks.attention) == len(blocks.mlp) == 3
    for attention, mlp in zip(blocks.attention, blocks.mlp, strict=True):
        assert attention.scale == pytest.approx(tiny.shape.head_dim**-0.5)
        assert (attention.rotary is None) == (tiny.shape.architecture == "opt")
        assert attention.context.meta["val"].shape[-1] == 64
        assert (mlp.gate is None) == (not tiny.shape.gated)
        assert mlp.activation == tiny.shape.activation
        assert mlp.hidden.meta["val"].shape[-1] == tiny.shape.ffn
    assert all(blocks.residual(layer).target is aten.add.Tensor for layer in range(3))


def test_does_not_rely_on_names(tiny):
    module = copy_module(tiny.traced)
    for i, node in enumerate(module.graph.nodes):
        if node.op == "call_function":
            node.name = f"n{i}"
    find_blocks(module, shape=tiny.shape)
    assert len(blocks_of(module).mlp) == 3


def test_refuses_another_number_of_layers(tiny):
    with pytest.raises(PassError, match="found 3 attention blocks in a model of 4 layers"):
        find_blocks(copy_module(tiny.traced), shape=replace(tiny.shape, layers=4))


def test_refuses_an_mlp_it_does_not_understand(tiny_opt):
    module = copy_module(tiny_opt.traced)
    for node in module.graph.find_nodes(op="call_function", target=aten.relu.default):
        node.target = aten.tanh.default
    with pytest.raises(
        PassError, match="found 0 MLP blocks[\\s\\S]*expected: linear -> activation"
    ):
        find_blocks(module, shape=tiny_opt.shape)


def test_refuses_attention_without_projection(tiny_llama):
    module = copy_module(tiny_llama.traced)
    sdpa = module.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )[0]
    with module.graph.inserting_before(sdpa):
        sdpa.replace_input_with(
            sdpa.args[0], module.graph.call_function(aten.relu.default, (sdpa.args[0],))
        )
    with pytest.raises(PassError, match="an input of attention is not a projection"):
        find_blocks(module, shape=tiny_llama.shape)


def test_a_block_must_lie_in_its_layer(tiny):
    module = copy_module(tiny.traced)
    linears = module.graph.find_nodes(op="call_function", target=aten.linear.default)
    for node in linears:
        node.meta["nn_module_stack"] = {"x": ("model.layers.2", "Layer")}
    with pytest.raises(PassError, match="attention block 0 does not lie in layer 0"):
        find_blocks(module, shape=tiny.shape)


def test_other_passes_need_it(tiny):
    with pytest.raises(PassError, match="needs find_blocks before it"):
        blocks_of(copy_module(tiny.traced))


def test_idempotent(tiny):
    module = tiny.graph("find_blocks")
    blocks = blocks_of(module)
    find_blocks(module, shape=tiny.shape)
    assert blocks_of(module) is blocks
