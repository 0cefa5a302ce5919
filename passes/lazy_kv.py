"""norm_qkv -> decode_attention   ->   lazy_qkv -> decode_attention over a cache that has it all.

    q, k, v = norm_qkv(scaled, stats, .., index, count)
    ctx     = decode_attention(q, k, v, cos, sin, caches, .., index, count)
        ->  q, computed = lazy_qkv(scaled, stats, .., position, cos, sin, state, caches)
            ctx         = decode_attention(q, None, None, cos, sin, caches, .., index, count)

For steps of one token of one row. Layers that keep all heads stay as they are. The others get
state as inputs in front of the caches, `window_l`, `moments_l`, `filled_l` and for all layers
together `turns` (see `lazy_qkv`); and the graph also returns `computed_l`, the tokens of each head
whose keys and values layer l computed.
"""

from __future__ import annotations

import torch
from torch import fx

from shadowc.errors import PassError
from shadowc.kernels import lazy_qkv
from shadowc.passes.fuse_sparse_attention import unpack

_ = lazy_qkv  # importing registers the op
ops = torch.ops.shadowc


def lazy_kv(module: fx.GraphModule) -> bool:
    """Let keys and values of skipped heads wait.

    Args:
        module: A decode step whose norms are fused and whose keep sets are compact.

    Returns:
        Whether anything changed.

    Raises:
        PassError: If no layer skips heads, or something else reads keys and values.
    """
    graph = module.graph
    if graph.find_nodes(op="call_function", target=ops.lazy_qkv.default):
        return False
    found = graph.find_nodes(op="call_function", target=ops.norm_qkv.default)
    sparse = [(layer, node) for layer, node in enumerate(found) if node.args[-1] is not None]
    if not sparse or "outputs" not in module.meta:
        raise PassError(
            "lazy_kv finds no layer that skips heads",
            expected="norm_qkv with a keep set, after fuse_norms and compact_masks",
            got=f"{len(found)} norm_qkv without one",
        )
    first = next(node for node in graph.find_nodes(op="placeholder") if node.name == "k_cache_0")
    turns: fx.Node | None = None
    computed = []
    for layer, node in sparse:
        attention = _attention(node)
        q, _, _, cos, sin, k_cache, v_cache, start, position, *rest = attention.args
        with graph.inserting_before(first):
            state = [
                graph.placeholder(f"{name}_{layer}") for name in ("window", "moments", "filled")
            ]
            if cos is not None and turns is None:
                turns = graph.placeholder("turns")
        with graph.inserting_before(attention):
            lazy = graph.call_function(
                ops.lazy_qkv.default,
                (*node.args, position, cos, sin, *state, turns, k_cache, v_cache),
            )
            query, count = unpack(graph, lazy, 2)
        attention.args = (
            query, None, None, cos, sin, k_cache, v_cache, start, position, *rest
        )  # fmt: skip
        computed.append((f"computed_{layer}", count))
    output = graph.output_node()
    output.args = ((*output.args[0], *(count for _, count in computed)),)
    module.meta["outputs"] = (*module.meta["outputs"], *(name for name, _ in computed))
    return True


def _attention(node: fx.Node) -> fx.Node:
    """The attention that alone reads queries, keys and values."""
    readers = {user for part in node.users for user in part.users}
    if len(readers) == 1:
        (reader,) = readers
        parts = [argument for argument in reader.args[:3] if isinstance(argument, fx.Node)]
        if reader.target is ops.decode_attention.default and set(parts) == set(node.users):
            return reader
    raise PassError(
        "lazy_kv: queries, keys and values do not go to one attention",
        expected="norm_qkv -> decode_attention",
        got=f"{node.name} -> {', '.join(sorted(reader.name for reader in readers)) or 'nothing'}",
    )
