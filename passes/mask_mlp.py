"""down(hidden)  ->  down(hidden * neuron mask): a skipped neuron adds nothing, the bias stays."""

from __future__ import annotations

import torch
from torch import fx

from shadowc.errors import PassError
from shadowc.passes.find_blocks import blocks_of

aten = torch.ops.aten


def mask_mlp(module: fx.GraphModule) -> bool:
    """Multiply every neuron's activation by its mask.

    Args:
        module: A graph with blocks and masks.

    Returns:
        Whether anything changed.

    Raises:
        PassError: If insert_predictor has not run.
    """
    blocks = blocks_of(module)
    if blocks.keep is None:
        raise PassError("mask_mlp needs insert_predictor before it")
    graph, changed = module.graph, False
    for layer, block in enumerate(blocks.mlp):
        if block.mask is not None:
            continue
        mask = blocks.keep.masks["neuron"][layer]
        with graph.inserting_before(block.output):
            masked = graph.call_function(aten.mul.Tensor, (block.hidden, mask))
        block.output.replace_input_with(block.hidden, masked)
        block.mask = mask
        changed = True
    return changed
