"""MLP block  ->  shadowc::sparse_mlp, or shadowc::sparse_gated_mlp.

    linear fc1 . act . mask . linear fc2 . residual add       -> sparse_mlp(x, fc1, fc2^T, residual)
    act(linear gate) * linear up . mask . linear down . residual add -> sparse_gated_mlp(...)

Each also tells how many rows of the second projection it read; the graph returns them by layer.
"""

from __future__ import annotations

import torch
from torch import fx

from shadowc.errors import PassError
from shadowc.kernels import sparse_gated_mlp, sparse_mlp
from shadowc.passes.find_blocks import MLP, blocks_of
from shadowc.passes.fuse_sparse_attention import (
    compacted,
    residual_add,
    transposed,
    unpack,
    weight_and_bias,
)

_ = (sparse_gated_mlp, sparse_mlp)  # importing registers the ops


def fuse_sparse_mlp(module: fx.GraphModule, *, skip_zeros: bool = True) -> bool:
    """Replace every MLP block.

    Args:
        module: A graph with blocks, masked or not.
        skip_zeros: Whether rows of the second projection whose activation is exactly zero are not
            read (the result is the same).

    Returns:
        Whether anything changed.

    Raises:
        PassError: If blocks are missing, or a gated MLP has biases.
    """
    blocks = blocks_of(module)
    if "rows" in module.meta:
        return False
    rows = [_fuse(module.graph, block, skip_zeros) for block in blocks.mlp]
    output = module.graph.output_node()
    output.args = ((*output.args[0], *rows),)
    module.meta["rows"] = rows
    return True


def _fuse(graph: fx.Graph, block: MLP, skip_zeros: bool) -> fx.Node:
    weight, bias = weight_and_bias(block.output)
    with graph.inserting_before(block.output):
        keep = compacted(graph, block.mask)
        residual, total = residual_add(block.output)
        second = transposed(graph, weight)
        options = (residual, block.activation, skip_zeros, *keep)
        if block.gate is None:
            fused = graph.call_function(
                torch.ops.shadowc.sparse_mlp.default,
                (block.up.args[0], *weight_and_bias(block.up), second, bias, *options),
            )
        else:
            gate, gate_bias = weight_and_bias(block.gate)
            up, up_bias = weight_and_bias(block.up)
            if any(b is not None for b in (gate_bias, up_bias, bias)):
                raise PassError(
                    "fuse_sparse_mlp: a gated MLP with biases",
                    expected="gate, up and down projections without bias, as in Llama",
                )
            fused = graph.call_function(
                torch.ops.shadowc.sparse_gated_mlp.default,
                (block.up.args[0], gate, up, second, *options),
            )
        y, rows = unpack(graph, fused, 2)
    y.meta = dict(block.output.meta)
    total.replace_all_uses_with(y)
    block.output = y
    return rows
