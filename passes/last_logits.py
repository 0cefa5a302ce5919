"""logits of all tokens  ->  logits of the last token: only that one is sampled from."""

from __future__ import annotations

import torch
from torch import fx

from shadowc.errors import PassError

aten = torch.ops.aten


def last_logits(module: fx.GraphModule) -> bool:
    """Slice the input of the output projection to the last token.

    Args:
        module: A graph whose first result is `linear(x)`, x [B, T, C].

    Returns:
        Whether anything changed.

    Raises:
        PassError: If the first result is not a projection.
    """
    graph = module.graph
    head = graph.output_node().args[0][0]
    if head.target is not aten.linear.default:
        raise PassError("last_logits: the logits are not a projection", got=str(head.target))
    if head.args[0].target is aten.contiguous.default:
        return False
    with graph.inserting_before(head):
        last = graph.call_function(aten.slice.Tensor, (head.args[0], 1, -1))
        last = graph.call_function(aten.contiguous.default, (last,))
    head.replace_input_with(head.args[0], last)
    return True
