"""aten.linear -> shadowc::linear: projections that no block took, with half-precision weights."""

from __future__ import annotations

import torch
from torch import fx

from shadowc.kernels import linear as _register  # noqa: F401


def lower_linear(module: fx.GraphModule, *, only: str = "") -> bool:
    """Replace every remaining projection: the output head and the predictor's.

    Args:
        module: A graph whose blocks are fused.
        only: Replace those alone whose weight's name begins so.

    Returns:
        Whether anything changed.
    """
    every = module.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    nodes = [node for node in every if str(node.args[1].target).startswith(only)]
    for node in nodes:
        bias = node.args[2] if len(node.args) > 2 else None
        node.target = torch.ops.shadowc.linear.default
        node.args = (*node.args[:2], bias)
    return bool(nodes)
