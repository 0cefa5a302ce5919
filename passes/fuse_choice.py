"""scores and thresholds of a tap  ->  one op:

    code -> linear (heads)   -> [L', N] -> select_above -> index, count
         -> linear (neurons) -> [L'', F] -> select_above -> index, count
        ->  choose_above(code, weights, biases, thresholds)

For targets where a launch costs more than the work in it. The sets are chosen where the code is
made, as early as can be: what reads them need not wait (`soon` is whether the next op does).
"""

from __future__ import annotations

import operator
from collections import defaultdict

import torch
from torch import fx

from shadowc.errors import PassError
from shadowc.kernels import choose_above
from shadowc.passes.fuse_sparse_attention import unpack
from shadowc.passes.manager import eliminate_dead_code

_ = choose_above  # importing registers the op
aten, ops = torch.ops.aten, torch.ops.shadowc

_CHAIN = (aten.contiguous.default, aten.select.int, aten.unflatten.int)
_PARTS = (operator.getitem, aten.unbind.int)


def fuse_choice(module: fx.GraphModule) -> bool:
    """Fuse what follows every tap's code.

    Args:
        module: A graph of one token whose masks are compact.

    Returns:
        Whether anything changed.

    Raises:
        PassError: If scores are not made as a predictor makes them.
    """
    graph = module.graph
    groups: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = defaultdict(list)
    selects = graph.find_nodes(op="call_function", target=ops.select_above.default)
    for select in selects:
        linear = select.args[0]
        for expected in _CHAIN:
            if linear.target is not expected:
                raise PassError("fuse_choice: scores of another make", got=linear.target)
            linear = linear.args[0]
        if linear.target is not aten.linear.default:
            raise PassError("fuse_choice: scores of another make", got=linear.target)
        groups[linear.args[0]].append((linear, select))
    places = {node: place for place, node in enumerate(graph.nodes)}
    for code, kinds in groups.items():
        last = max((linear for linear, _ in kinds), key=places.__getitem__)
        thresholds = [select.args[1] for _, select in kinds]
        for threshold in thresholds:
            last.prepend(threshold)
        with graph.inserting_after(last):
            weights, biases = zip(*(linear.args[1:3] for linear, _ in kinds), strict=True)
            new = graph.call_function(
                ops.choose_above.default, (code, [*weights], [*biases], thresholds, True)
            )
        with graph.inserting_after(new):
            parts = unpack(graph, new, 2 * len(kinds))
        for place, (_, select) in enumerate(kinds):
            for user in list(select.users):  # its index and its count
                user.replace_all_uses_with(parts[2 * place + user.args[1]])
    eliminate_dead_code(graph)  # first: what is gone reads nothing
    for new in graph.find_nodes(op="call_function", target=ops.choose_above.default):
        new.update_arg(4, _read_next(new))
    return bool(groups)


def _read_next(choice: fx.Node) -> bool:
    """Whether the next of our ops reads what was chosen."""
    made, node = {choice}, choice.next
    while getattr(node.target, "namespace", "") != "shadowc":
        if node.op == "output":
            return False
        if node.target in _PARTS and node.args[0] in made:
            made.add(node)
        node = node.next
    return any(source in made for source in node.all_input_nodes)
