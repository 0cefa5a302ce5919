"""Reordered weights give the sums of aten.linear."""

from __future__ import annotations

import pytest
import torch

from shadowc.passes.manager import copy_module
from shadowc.passes.prepack_linear import prepack_linear

aten = torch.ops.aten


def linears(module):
    return module.graph.find_nodes(op="call_function", target=aten.linear.default)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN")
@pytest.mark.parametrize("stage", ["find_blocks", "masked"])
def test_every_linear_is_reordered_and_sums_the_same(tiny, stage):
    module = tiny.graph(stage)
    count = len(linears(module))
    fast = copy_module(module)
    assert count > 3 * 6 and prepack_linear(fast)
    fast.graph.lint()
    fast.recompile()
    assert not linears(fast) and len(linears(module)) == count
    ids = tiny.ids(2, 12)
    inputs = list(tiny.inputs(ids))
    if stage == "masked":
        inputs.append(torch.arange(12).expand(2, -1))
    with torch.inference_mode():
        (plain, *_), (found, *_) = module(*inputs), fast(*inputs)
    # fp32 sums of at most 96 products in another order
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_it_is_idempotent(tiny):
    module = tiny.graph("find_blocks")
    prepack_linear(module)
    assert not prepack_linear(module)
