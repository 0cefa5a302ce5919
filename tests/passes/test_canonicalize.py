"""canonicalize: one spelling, the same results."""

import pytest
import torch

from shadowc.errors import PassError
from shadowc.passes.canonicalize import canonicalize
from shadowc.passes.manager import copy_module
from shadowc.trace import INPUTS, trace

aten = torch.ops.aten


def test_golden(tiny):
    targets = [n.target for n in tiny.traced.graph.nodes if n.op == "call_function"]
    for gone in (aten.dropout.default, aten.alias.default, aten._assert_tensor_metadata.default):
        assert gone not in targets
    names = [n.name for n in tiny.traced.graph.find_nodes(op="placeholder")]
    assert tuple(names) == INPUTS
    flat = [
        n
        for n in tiny.traced.graph.nodes
        if n.op == "call_function"
        and n.target in (aten.view.default, aten.reshape.default)
        and list(n.args[1])[:1] == [-1]
        and len(n.args[1]) == 2
        and n.args[1][1] == 64
    ]
    assert not flat  # OPT's MLP no longer flattens [B, T, C]


def test_equal_to_the_model(tiny):
    ids = tiny.ids()
    (logits,) = tiny.traced(*tiny.inputs(ids))
    assert torch.equal(logits, tiny.loaded.model(ids).logits)


def test_sizes_come_from_the_ids(tiny):
    mask = tiny.traced.graph.find_nodes(op="placeholder")[2]
    assert not [u for u in mask.users if u.target is aten.sym_size.int]


def test_idempotent(tiny):
    module = copy_module(tiny.traced)
    canonicalize(module)  # a copied graph has lost its code generator's marks
    assert not canonicalize(module)


def test_refuses_an_input_it_does_not_know(tiny_opt):
    module = trace(tiny_opt.loaded.model).module(check_guards=False)
    ids = module.graph.find_nodes(op="placeholder")[0]
    ids.name = "tokens"
    with pytest.raises(PassError, match="an input it does not know[\\s\\S]*got: tokens"):
        canonicalize(module)
