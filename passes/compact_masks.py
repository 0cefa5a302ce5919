"""per-layer mask -> compact   ->   one selection op a tap, or keep sets given as inputs

    scores -> top-k -> mask [B, T, L', N] -> select layer -> compact     (L' times)
        ->  select(scores) -> index [L', B, N], count [L', B] -> unbind  (decode: the mask never
        exists)
    scores -> above thresholds -> ...  ->  select_above(scores, threshold) -> ...
        ->  inputs head_index, head_count, neuron_index, neuron_count    (hold: no predictor runs)

The graph then returns the keep sets it ran with, by name: `module.meta["outputs"]`. Those of
several taps are joined at its very end, where nothing waits for them. When a policy keeps all
heads, their keep set is left out and the ops run all of them; a graph without masks keeps all.
"""

from __future__ import annotations

import torch
from torch import fx

from shadowc.config import Policy
from shadowc.errors import PassError
from shadowc.kernels import select, select_above
from shadowc.passes.find_blocks import Choice, blocks_of
from shadowc.passes.fuse_sparse_attention import unpack
from shadowc.passes.manager import eliminate_dead_code
from shadowc.selection import TopK

_ = (select, select_above)  # importing registers the ops
aten, ops = torch.ops.aten, torch.ops.shadowc


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
    budgets = (("head", policy.heads_kept(shape), shape.heads * (shape.layers - 1)),
               ("neuron", policy.neurons_kept(shape), shape.ffn * shape.layers))  # fmt: skip
    for kind, kept, all_units in budgets:
        if keep is None:
            break
        choices = [choice for choice in keep.choices if choice.kind == kind]
        layers = [layer for choice in choices for layer in choice.layers]
        if kept == all_units:
            by_layer = [(None, None)] * len(layers)
        elif hold:
            inputs = {node.name: node for node in graph.find_nodes(op="placeholder")}
            with graph.inserting_before(inputs["k_cache_0"]):
                sets = graph.placeholder(f"{kind}_index"), graph.placeholder(f"{kind}_count")
            with graph.inserting_before(list(inputs.values())[-1].next):
                by_layer = _unbind(graph, *sets, len(layers))
        else:
            made = [_choose(graph, choice) for choice in choices]
            by_layer = [one for _, unbound in made for one in unbound]
            sets = made[0][0]
            if len(made) > 1:
                with graph.inserting_before(graph.output_node()):
                    parts = zip(*(own for own, _ in made), strict=True)
                    sets = tuple(graph.call_function(aten.cat.default, ([*p],)) for p in parts)
        for layer, one in zip(layers, by_layer, strict=True):
            _replace_compacts(keep.masks[kind][layer], one)
        if kept < all_units:
            results |= dict(zip((f"{kind}_index", f"{kind}_count"), sets, strict=True))
    results |= {f"rows_{layer}": node for layer, node in enumerate(rows)}
    graph.output_node().args = (tuple(results.values()),)
    module.meta["outputs"] = tuple(results)
    eliminate_dead_code(graph)
    for node in graph.find_nodes(op="placeholder"):
        if node.name == "mask_source":
            graph.erase_node(node)
    return True


def _choose(
    graph: fx.Graph, choice: Choice
) -> tuple[tuple[fx.Node, fx.Node], list[tuple[fx.Node, fx.Node]]]:
    """A tap's keep sets: index and count of its layers together, and of each."""
    call, how = graph.call_function, choice.selection
    with graph.inserting_before(choice.scores.next):
        token = call(aten.select.int, (choice.scores, 1, -1))
        token = call(aten.contiguous.default, (token,))
        if isinstance(how, TopK):
            chosen = call(ops.select.default, (token, how.keep, how.floor, how.local))
        else:
            chosen = call(ops.select_above.default, (token, choice.threshold))
        index, count = unpack(graph, chosen, 2)
        return (index, count), _unbind(graph, index, count, len(choice.layers))


def _unbind(
    graph: fx.Graph, index: fx.Node, count: fx.Node, layers: int
) -> list[tuple[fx.Node, fx.Node]]:
    both = [graph.call_function(aten.unbind.int, (node,)) for node in (index, count)]
    return list(zip(*(unpack(graph, node, layers) for node in both), strict=True))


def _replace_compacts(mask: fx.Node, keep: tuple[fx.Node | None, fx.Node | None]) -> None:
    """Give every `compact` of a layer's mask that layer's keep set instead."""
    reached = [user for user in mask.users if user.target is aten.select.int]
    for _ in range(3):  # select the token -> contiguous -> compact -> index, count
        reached = [user for node in reached for user in node.users]
    for result in reached:
        new = keep[result.args[1]]
        for user in list(result.users):
            user.args = tuple(new if a is result else a for a in user.args)
