"""weight * (x * rsqrt(mean(x^2) + eps))  ->  shadowc::rms_norm(x, weight, eps): one op for six."""

from __future__ import annotations

import torch
from torch import fx

from shadowc.kernels import rms_norm as _register  # noqa: F401

aten = torch.ops.aten


def fuse_rms_norm(module: fx.GraphModule) -> bool:
    """Replace every spelled-out RMS norm.

    Args:
        module: A canonical graph.

    Returns:
        Whether anything changed.
    """
    changed = False
    for node in module.graph.find_nodes(op="call_function", target=aten.mul.Tensor):
        found = _match(node)
        if found is None:
            continue
        x, weight, eps = found
        with module.graph.inserting_before(node):
            fused = module.graph.call_function(torch.ops.shadowc.rms_norm.default, (x, weight, eps))
        fused.meta = dict(node.meta)
        node.replace_all_uses_with(fused)
        changed = True
    return changed


def _match(node: fx.Node) -> tuple[fx.Node, fx.Node, float] | None:
    weight, normed = node.args
    if not _calls(weight, None) or not _calls(normed, aten.mul.Tensor):
        return None
    x, root = normed.args
    if not _calls(root, aten.rsqrt.default):
        return None
    shifted = root.args[0]
    if not _calls(shifted, aten.add.Tensor) or not isinstance(shifted.args[1], float):
        return None
    mean = shifted.args[0]
    if not _calls(mean, aten.mean.dim) or list(mean.args[1]) != [-1]:
        return None
    square = mean.args[0]
    if not _calls(square, aten.pow.Tensor_Scalar) or square.args != (x, 2):
        return None
    return x, weight, shifted.args[1]


def _calls(node: object, target: object) -> bool:
    """Whether `node` calls `target`; None stands for a weight."""
    if not isinstance(node, fx.Node):
        return False
    return node.op == "get_attr" if target is None else node.target is target
