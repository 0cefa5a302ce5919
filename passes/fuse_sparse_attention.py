"""attention block  ->  sparse_qkv -> decode_attention -> sparse_out_proj, over a static KV cache.

    linear q, k, v . rotary . sdpa . mask . linear out . residual add
        ->  index, count = compact(mask)                       (none: every head, the dense program)
            q, k, v      = sparse_qkv(x, ...)                    (k and v of every head)
            context      = decode_attention(q, k, v, caches)
            y            = sparse_out_proj(context, out^T, residual)

The stateless graph becomes one with state: inputs `start` int64 [B] (first valid slot of a row),
`position` int64 [1] (slot of the first new token) and a key and a value cache [B, G, S, D] a layer
take the place of the attention mask.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from shadowc.errors import PassError
from shadowc.kernels import compact, decode_attention, sparse_out_proj, sparse_qkv
from shadowc.passes.find_blocks import Attention, Blocks, blocks_of
from shadowc.passes.manager import eliminate_dead_code

_ = (compact, decode_attention, sparse_out_proj, sparse_qkv)  # importing registers the ops
aten = torch.ops.aten


def fuse_sparse_attention(module: fx.GraphModule, *, core: bool = False) -> bool:
    """Replace every attention block.

    Args:
        module: A graph with blocks, masked or not.
        core: Replace only what lies between the projections, which stay aten.linear (for dense
            programs whose library has better products than ours).

    Returns:
        Whether anything changed.

    Raises:
        PassError: If blocks are missing or project from different inputs.
    """
    blocks = blocks_of(module)
    graph = module.graph
    inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
    if "start" in inputs:
        return False
    with graph.inserting_before(list(inputs.values())[-1].next):
        start, position = graph.placeholder("start"), graph.placeholder("position")
        caches = [
            (graph.placeholder(f"k_cache_{layer}"), graph.placeholder(f"v_cache_{layer}"))
            for layer in range(blocks.shape.layers)
        ]
    for block, cache in zip(blocks.attention, caches, strict=True):
        _fuse(graph, blocks, block, (*cache, start, position), core)
    eliminate_dead_code(graph)
    graph.erase_node(inputs["attention_mask"])
    return True


def _fuse(
    graph: fx.Graph, blocks: Blocks, block: Attention, state: tuple[fx.Node, ...], core: bool
) -> None:
    x = block.query.args[0]
    if block.key.args[0] is not x or block.value.args[0] is not x:
        raise PassError("fuse_sparse_attention: q, k and v project from different inputs")
    head_dim = blocks.shape.head_dim
    with graph.inserting_before(block.context):
        keep = compacted(graph, block.mask)
        weights = [
            argument
            for projection in (block.query, block.key, block.value)
            for argument in weight_and_bias(projection)
        ]
        if core:
            q, k, v = block.query, block.key, block.value
        else:
            qkv = graph.call_function(
                torch.ops.shadowc.sparse_qkv.default, (x, *weights, head_dim, *keep)
            )
            q, k, v = unpack(graph, qkv, 3)
        context = graph.call_function(
            torch.ops.shadowc.decode_attention.default,
            (q, k, v, *(block.rotary or (None, None)), *state, block.scale, *keep),
        )
    context.meta = dict(block.context.meta)
    if core:
        block.context.replace_all_uses_with(context)
        block.context = context
        return
    weight, bias = weight_and_bias(block.output)
    with graph.inserting_before(block.output):
        residual, total = residual_add(block.output)
        projected = graph.call_function(
            torch.ops.shadowc.sparse_out_proj.default,
            (context, transposed(graph, weight), bias, residual, head_dim, *keep),
        )
    projected.meta = dict(block.output.meta)
    total.replace_all_uses_with(projected)
    block.context.replace_all_uses_with(context)
    block.context, block.output = context, projected


def compacted(graph: fx.Graph, mask: fx.Node | None) -> tuple[fx.Node | None, fx.Node | None]:
    """Index and count of a mask [B, T, N] at the one token of a decode step."""
    if mask is None:
        return None, None
    row = graph.call_function(aten.select.int, (mask, 1, -1))
    row = graph.call_function(aten.contiguous.default, (row,))
    index, count = unpack(graph, graph.call_function(torch.ops.shadowc.compact.default, (row,)), 2)
    return index, count


def weight_and_bias(linear: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    """The parameters of an aten.linear node."""
    return linear.args[1], linear.args[2] if len(linear.args) > 2 else None


def transposed(graph: fx.Graph, weight: fx.Node) -> fx.Node:
    """A second projection with one contiguous row a unit; pack_weights stores it so."""
    turned = graph.call_function(aten.t.default, (weight,))
    return graph.call_function(aten.contiguous.default, (turned,))


def residual_add(output: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """(residual, sum) when the projection only feeds one addition, else (None, projection)."""
    users = list(output.users)
    if len(users) == 1 and users[0].target is aten.add.Tensor and len(users[0].args) == 2:
        left, right = users[0].args
        other = right if left is output else left
        if isinstance(other, fx.Node):
            return other, users[0]
    return None, output


def unpack(graph: fx.Graph, node: fx.Node, n: int) -> list[fx.Node]:
    """The n results of an op that returns several."""
    return [graph.call_function(operator.getitem, (node, i)) for i in range(n)]
