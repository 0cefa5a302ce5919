"""exported graph -> the same graph in one spelling, so that later passes match few shapes.

plain call signature      pytrees and constant inputs -> the three tensors of `trace.INPUTS`
dropout, alias, asserts   -> removed (they do nothing in inference)
sizes of the mask         -> sizes of input_ids, so that the lowering can drop the mask
float -> float casts      -> removed: activations have one float type throughout
reshape(x, [-1, C]) ... view(y, [B, T, C])  -> x ... y, when only row-wise ops lie between
"""

from __future__ import annotations

import torch
from torch import fx

from shadowc.errors import PassError
from shadowc.trace import INPUTS

aten = torch.ops.aten

_IDENTITY = {aten.dropout.default, aten.alias.default, aten.contiguous.default, aten.detach.default}
_CASTS = {aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten._to_copy.default}
_RESHAPES = {aten.view.default, aten.reshape.default}
#: Ops that treat every row of [..., C] alike, whatever the leading dimensions.
_ROW_WISE = {
    aten.linear.default, aten.layer_norm.default, aten.relu.default, aten.silu.default,
    aten.gelu.default, aten.add.Tensor, aten.mul.Tensor,
}  # fmt: skip


def canonicalize(module: fx.GraphModule) -> bool:
    """Bring a traced graph into the spelling that the later passes expect.

    Args:
        module: What `ExportedProgram.module()` gives; rewritten in place.

    Returns:
        Whether anything changed.

    Raises:
        PassError: If the graph's inputs are not those of `shadowc.trace`.
    """
    changed = _plain_signature(module)
    changed |= _sizes_of_ids(module)
    changed |= _remove_identities(module)
    changed |= _remove_flattening(module)
    return changed


def _plain_signature(module: fx.GraphModule) -> bool:
    graph = module.graph
    plain = type(graph._codegen) is fx.graph.CodeGen
    graph.set_codegen(fx.graph.CodeGen())
    changed = not plain
    for node in graph.find_nodes(op="placeholder"):
        if node.name not in INPUTS:
            if node.users:
                raise PassError(
                    "canonicalize found an input it does not know",
                    expected=", ".join(INPUTS),
                    got=node.name,
                )
            graph.erase_node(node)
            changed = True
    return changed


def _sizes_of_ids(module: fx.GraphModule) -> bool:
    ids, _, mask = module.graph.find_nodes(op="placeholder")
    changed = False
    for node in module.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        if node.args[0] is mask:
            node.args = (ids, 0 if node.args[1] == 0 else 1)
            changed = True
    return changed


def _remove_identities(module: fx.GraphModule) -> bool:
    changed = False
    for node in list(module.graph.nodes):
        if node.target in (aten._assert_tensor_metadata.default, aten._assert_scalar.default):
            module.graph.erase_node(node)
            changed = True
        elif node.target in _IDENTITY or (node.target in _CASTS and _float_to_float(node)):
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
            changed = True
    return changed


def _float_to_float(node: fx.Node) -> bool:
    before = node.args[0].meta["val"].dtype
    after = node.meta["val"].dtype
    return bool(before == after or (before.is_floating_point and after.is_floating_point))


def _remove_flattening(module: fx.GraphModule) -> bool:
    changed, erased = False, set()
    for node in list(module.graph.nodes):
        if node in erased or node.target not in _RESHAPES:
            continue
        if node.args[0].meta["val"].dim() != 3 or node.meta["val"].dim() != 2:
            continue
        ends = _row_wise_ends(node)
        source = node.args[0]
        if ends is None or any(e.meta["val"].shape != source.meta["val"].shape for e in ends):
            continue
        node.replace_all_uses_with(source)
        for end in ends:
            end.replace_all_uses_with(end.args[0])
            module.graph.erase_node(end)
        module.graph.erase_node(node)
        erased |= {node, *ends}
        changed = True
    return changed


def _row_wise_ends(start: fx.Node) -> list[fx.Node] | None:
    """The reshapes that end the row-wise region that begins at `start`; None if it leaks."""
    ends, queue, seen = [], list(start.users), {start}
    while queue:
        node = queue.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.target in _RESHAPES:
            ends.append(node)
        elif node.target in _ROW_WISE:
            queue.extend(node.users)
        else:
            return None
    inside = seen - set(ends)
    for node in inside - {start}:
        tensors = [a for a in node.all_input_nodes if a.op != "get_attr"]
        if any(a not in inside for a in tensors):
            return None
    return ends
