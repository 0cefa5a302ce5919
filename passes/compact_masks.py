"""per-layer mask -> compact   ->   one shadowc::select for the whole model, or keep sets given as
inputs

    scores -> top-k -> mask [B, T, L, N] -> select layer -> compact      (L times)
        ->  select(scores) -> index [L, B, N], count [L, B] -> unbind    (decode: the mask never
        exists)
        ->  inputs head_index, head_count, neuron_index, neuron_count    (hold: no predictor runs)

The graph then returns the keep sets it ran with, by name: `module.meta["outputs"]`. When a policy
keeps all heads, their keep set is left out and the ops run all of them; a graph without masks
keeps all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from shadowc.config import Policy
from shadowc.errors import PassError
from shadowc.kernels import select as _register  # noqa: F401
from shadowc.passes.find_blocks import blocks_of
from shadowc.passes.fuse_sparse_attention import unpack
from shadowc.passes.manager import eliminate_dead_code

aten = torch.ops.aten


def compact_masks(module: fx.GraphModule, *, policy: Policy, hold: bool = False) -> bool:
    """Turn masks into keep sets: indices and counts.

    Args:
        module: A graph whose blocks are fused.
        policy: The policy that the masks were made with.
        hold: Take the keep sets as inputs instead of computing them.

    Returns:
        Whether anything changed.

    Raises:
        PassError: If the blocks are not fused.
    """
    if "outputs" in module.meta:
        return False
    blocks = blocks_of(module)
    keep, shape, graph = blocks.keep, blocks.shape, module.graph
    if not graph.find_nodes(op="placeholder", target="start"):
        raise PassError("compact_masks needs the fuse passes before it")
    rows = module.meta.get("rows", [])
    results = {"logits": graph.output_node().args[0][0]}
    kinds = () if keep is None else (
        ("head", keep.head_mask, keep.head_scores, policy.heads_kept(shape), policy.min_heads),
        ("neuron", keep.neuron_mask, keep.neuron_scores, policy.neurons_kept(shape),
         policy.min_neurons),
    )  # fmt: skip
    for kind, mask, scores, kept, floor in kinds:
        layers, units = scores.meta["val"].shape[2:]
        if kept == layers * units:
            _replace_compacts(graph, mask, [(None, None)] * layers)
            continue
        if hold:
            inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
            with graph.inserting_before(inputs["k_cache_0"]):
                index = graph.placeholder(f"{kind}_index")
                count = graph.placeholder(f"{kind}_count")
            with graph.inserting_before(list(inputs.values())[-1].next):
                by_layer = _unbind(graph, index, count, layers)
        else:
            with graph.inserting_before(scores.next):
                token = graph.call_function(aten.select.int, (scores, 1, -1))
                token = graph.call_function(aten.contiguous.default, (token,))
                chosen = graph.call_function(
                    torch.ops.shadowc.select.default,
                    (token, kept, floor, policy.scope == "local"),
                )
                index, count = unpack(graph, chosen, 2)
                by_layer = _unbind(graph, index, count, layers)
        _replace_compacts(graph, mask, by_layer)
        results |= {f"{kind}_index": index, f"{kind}_count": count}
    results |= {f"rows_{layer}": node for layer, node in enumerate(rows)}
    graph.output_node().args = (tuple(results.values()),)
    module.meta["outputs"] = tuple(results)
    eliminate_dead_code(graph)
    for node in graph.find_nodes(op="placeholder"):
        if node.name == "mask_source":
            graph.erase_node(node)
    return True


def _unbind(
    graph: fx.Graph, index: fx.Node, count: fx.Node, layers: int
) -> list[tuple[fx.Node, fx.Node]]:
    both = [graph.call_function(aten.unbind.int, (node,)) for node in (index, count)]
    return list(zip(*(unpack(graph, node, layers) for node in both), strict=True))


def _replace_compacts(
    graph: fx.Graph, mask: fx.Node, by_layer: Sequence[tuple[fx.Node | None, fx.Node | None]]
) -> None:
    """Give every `compact` of a layer of `mask` that layer's keep set instead."""
    shift = mask.meta["val"].shape[2] - len(by_layer)
    for layer_mask in [u for u in mask.users if u.target is aten.select.int]:
        layer = layer_mask.args[2]
        reached = [layer_mask]  # -> select the token -> contiguous -> compact -> index, count
        for _ in range(4):
            reached = [user for node in reached for user in node.users]
        for result in reached:
            new = by_layer[layer - shift][result.args[1]]
            for user in list(result.users):
                user.args = tuple(new if a is result else a for a in user.args)
