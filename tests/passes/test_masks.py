"""mask_attention and mask_mlp: multiply by the masks, and only by them."""

import pytest
import torch

from shadowc.config import Policy
from shadowc.errors import PassError
from shadowc.passes.mask_attention import mask_attention
from shadowc.passes.mask_mlp import mask_mlp

aten = torch.ops.aten


def count(module, target):
    return len(module.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize("rewrite", [mask_attention, mask_mlp])
def test_golden(tiny, rewrite):
    module = tiny.graph("insert_predictor")
    before = count(module, aten.mul.Tensor)
    assert rewrite(module)
    masked = 2 if rewrite is mask_attention else 3  # layer 0's attention stays dense
    assert count(module, aten.mul.Tensor) == before + masked
    assert not rewrite(module)  # idempotent


@pytest.mark.parametrize("rewrite", [mask_attention, mask_mlp])
def test_refuses_without_masks(tiny, rewrite):
    with pytest.raises(PassError, match="needs insert_predictor before it"):
        rewrite(tiny.graph("find_blocks"))


def test_all_ones_is_the_model(tiny):
    """Sparsity 0 through the masked graph is the original model."""
    module, ids = tiny.graph("masked", Policy(0.0, 0.0, min_neurons=2)), tiny.ids()
    source = torch.arange(12).expand(2, -1)
    logits, heads, neurons = module(*tiny.inputs(ids), source)
    assert heads.all() and neurons.all()
    torch.testing.assert_close(logits, tiny.loaded.model(ids).logits, atol=1e-5, rtol=1e-5)


def test_masks_change_the_result(tiny):
    module, ids = tiny.graph("masked"), tiny.ids()
    logits = module(*tiny.inputs(ids), torch.arange(12).expand(2, -1))[0]
    assert (logits - tiny.loaded.model(ids).logits).abs().max() > 1e-2
