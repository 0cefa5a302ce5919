"""A step with lazy keys and values   ->   the program that computes what is still missing.

    q, computed = lazy_qkv(.., wk, wv, .., position, cos, sin, state, caches), ..
        ->  catch_up(wk, wv, position, state, caches)           (for each layer, and nothing else)

Its `position` is that of the last token. It returns nothing: the caches are complete then.
"""

from __future__ import annotations

import torch
from torch import fx

from shadowc.errors import PassError
from shadowc.kernels import lazy_qkv

_ = lazy_qkv  # importing registers the op
ops = torch.ops.shadowc

_NAMES = [argument.name for argument in ops.lazy_qkv.default._schema.arguments]
_SHARED = [_NAMES.index(argument.name) for argument in ops.catch_up.default._schema.arguments]


def catch_up(module: fx.GraphModule) -> bool:
    """Keep of a step what computes missing keys and values.

    Args:
        module: A graph that `lazy_kv` rewrote.

    Returns:
        Whether anything changed.

    Raises:
        PassError: If it did not.
    """
    graph = module.graph
    if graph.find_nodes(op="call_function", target=ops.catch_up.default):
        return False
    steps = graph.find_nodes(op="call_function", target=ops.lazy_qkv.default)
    if not steps:
        raise PassError("catch_up needs lazy_kv before it", expected="lazy_qkv", got="none")
    output = graph.output_node()
    with graph.inserting_before(output):
        for step in steps:
            graph.call_function(ops.catch_up.default, tuple(step.args[i] for i in _SHARED))
    output.args = ((),)
    module.meta["outputs"] = ()
    for node in reversed(list(graph.nodes)):
        cache = node.op == "placeholder" and node.name.startswith(("k_cache_", "v_cache_"))
        if node.op != "output" and node.target is not ops.catch_up.default and not cache:
            if not node.users:
                graph.erase_node(node)
    return True
