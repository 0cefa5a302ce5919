"""a tap's predictor and choice  ->  one op that writes into the keep sets of the whole model:

    feature -> linear -> choose_above(code, weights, ...) -> index, count -> unbind     (each tap)
                                                             cat of all taps'
        ->  index, count = new_empty [L, B, N], [L, B] -> unbind                        (once)
            choose_into(feature, linear's weight and bias, weights, ..., sets, place)   (each tap)

For CPUs, where a small call costs more than the work in it. A code that is not one linear of what
the tap reads (random features) stays as it is, and the op reads that.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from shadowc.errors import PassError
from shadowc.kernels import choose_into
from shadowc.passes.fuse_sparse_attention import unpack
from shadowc.passes.manager import eliminate_dead_code

_ = choose_into  # importing registers the op
aten, ops = torch.ops.aten, torch.ops.shadowc


def fuse_predictor(module: fx.GraphModule) -> bool:
    """Fuse every tap's predictor with its choice.

    Args:
        module: A graph after `fuse_choice`.

    Returns:
        Whether anything changed.

    Raises:
        PassError: If keep sets are joined in another way than `compact_masks` does.
    """
    graph, call = module.graph, module.graph.call_function
    taps = graph.find_nodes(op="call_function", target=ops.choose_above.default)
    if not taps:
        return False
    (ids,) = (node for node in graph.find_nodes(op="placeholder") if node.name == "input_ids")
    with graph.inserting_before(taps[0]):
        batch = call(aten.sym_size.int, (ids, 0))
    output = graph.output_node()
    results = dict(zip(module.meta["outputs"], output.args[0], strict=True))
    places: dict[fx.Node, tuple[fx.Node, int]] = {}  # a tap's set: the model's, and where in it
    for name, whole in results.items():
        if not name.endswith(("_index", "_count")):
            continue
        parts = whole.args[0] if whole.target is aten.cat.default else [whole]
        if any(part.args[0] not in taps for part in parts):
            raise PassError("fuse_predictor: keep sets of another make", got=whole)
        sizes = [_size(module, part) for part in parts]
        layers, units = sum(size for size, _ in sizes), sizes[0][1]
        shape = [layers, batch, units] if name.endswith("_index") else [layers, batch]
        with graph.inserting_before(taps[0]):
            new = call(aten.new_empty.default, (ids, shape), {"dtype": torch.int32})
            by_layer = unpack(graph, call(aten.unbind.int, (new,)), layers)
        at = 0
        for part, (size, _) in zip(parts, sizes, strict=True):
            places[part] = new, at
            for one in [one for user in part.users for one in user.users]:
                if one.target is operator.getitem:  # of what was unbound: a layer's own
                    one.replace_all_uses_with(by_layer[at + one.args[1]])
            at += size
        output.replace_input_with(whole, new)
    for tap in taps:
        _fuse(graph, tap, places)
    return eliminate_dead_code(graph)


def _size(module: fx.GraphModule, part: fx.Node) -> tuple[int, int]:
    """Layers and units of what a tap chose."""
    tap, place = part.args
    weight, threshold = (
        operator.attrgetter(str(tap.args[i][place // 2].target))(module) for i in (1, 3)
    )
    layers = len(threshold)
    return layers, len(weight) // layers


def _fuse(graph: fx.Graph, tap: fx.Node, places: dict[fx.Node, tuple[fx.Node, int]]) -> None:
    source, *lists, _ = tap.args
    first: tuple[Any, Any] = None, None
    if source.target is aten.linear.default:
        source, *first = source.args
    parts = sorted(tap.users, key=lambda part: part.args[1])
    sets = [places[part][0] for part in parts]
    at = [places[part][1] for part in parts[::2]]
    with graph.inserting_before(tap):
        graph.call_function(ops.choose_into.default, (source, *first, *lists, sets, at))
