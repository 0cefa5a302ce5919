"""scores of all tokens  ->  scores of the last token: a prompt's keep sets come from that one.

Predictors compute in fp32, whatever the type of the model's own activations.
"""

from __future__ import annotations

import torch
from torch import fx

from shadowc.errors import PassError
from shadowc.passes.find_blocks import blocks_of

aten = torch.ops.aten


def last_feature(module: fx.GraphModule) -> bool:
    """Slice what predictors read to the last token.

    Args:
        module: A graph with scores that nothing masks with (`scored`), or without any.

    Returns:
        Whether anything changed.

    Raises:
        PassError: If a mask is in use, which every token needs.
    """
    keep = blocks_of(module).keep
    if keep is None or not keep.readers:
        return False
    used = {
        user.target for masks in keep.masks.values() for m in masks.values() for user in m.users
    }
    if used - {aten.stack.default}:  # what the graph returns
        raise PassError("last_feature: masks of all tokens are in use")
    call = module.graph.call_function
    for readers in keep.readers:
        (feature,) = {a for node in readers for a in node.all_input_nodes if a.op != "get_attr"}
        with module.graph.inserting_before(readers[0]):
            last = call(aten.to.dtype, (call(aten.slice.Tensor, (feature, 1, -1)), torch.float32))
            last = call(aten.contiguous.default, (last,))  # rows of a batch lie T tokens apart
        for node in readers:
            node.replace_input_with(feature, last)
    keep.readers = []
    return True
