"""scores of all tokens  ->  scores of the last token: a prompt's keep sets come from that one."""

from __future__ import annotations

import torch
from torch import fx

from shadowc.errors import PassError
from shadowc.passes.find_blocks import blocks_of

aten = torch.ops.aten


def last_feature(module: fx.GraphModule) -> bool:
    """Slice what the predictor reads to the last token.

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
    if any(user.target is aten.select.int for user in keep.neuron_mask.users):
        raise PassError("last_feature: masks of all tokens are in use")
    (feature,) = {a for node in keep.readers for a in node.all_input_nodes if a.op != "get_attr"}
    with module.graph.inserting_before(keep.readers[0]):
        last = module.graph.call_function(aten.slice.Tensor, (feature, 1, -1))
    for node in keep.readers:
        node.replace_input_with(feature, last)
    keep.readers = []
    return True
