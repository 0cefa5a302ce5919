"""out(context)  ->  out(context * head mask): a skipped head contributes nothing.

Only the context is masked: keys and values are computed for every head, so that a head which comes
back later finds its past.
"""

from __future__ import annotations

import torch
from torch import fx

from shadowc.errors import PassError
from shadowc.passes.find_blocks import blocks_of

aten = torch.ops.aten


def mask_attention(module: fx.GraphModule) -> bool:
    """Multiply every head's slice of the context by its mask, except in layer 0.

    Layer 0's attention stays dense because the predictor reads what it computes.

    Args:
        module: A graph with blocks and masks.

    Returns:
        Whether anything changed.

    Raises:
        PassError: If insert_predictor has not run.
    """
    blocks = blocks_of(module)
    if blocks.keep is None:
        raise PassError("mask_attention needs insert_predictor before it")
    graph, shape, changed = module.graph, blocks.shape, False
    for layer, block in enumerate(blocks.attention):
        if layer == 0 or block.mask is not None:
            continue
        call = graph.call_function
        mask = blocks.keep.masks["head"][layer]  # [B, T, H]
        with graph.inserting_before(block.output):
            split = call(aten.unflatten.int, (block.context, -1, [shape.heads, shape.head_dim]))
            kept = call(aten.mul.Tensor, (split, call(aten.unsqueeze.default, (mask, -1))))
            masked = call(aten.flatten.using_ints, (kept, -2))
        block.output.replace_input_with(block.context, masked)
        block.mask = mask
        changed = True
    return changed
