"""the model's parameters -> the artifact's tensors: each matrix once, in one type, unit rows
contiguous

    contiguous(t(weight))      -> weight_t, stored transposed                   (second projections)
    matrix                     -> stored in the weight type; vectors stay fp32
    embedding(matrix)          -> float(embedding(matrix))                    (activations are fp32)
    any other use of a matrix  -> float(matrix)                                 (the masked program)

All programs of an artifact share one `Packed` store: the lowered ones lay it out, the masked one
reads a second projection back as the transpose of what they stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from shadowc.errors import PassError

aten = torch.ops.aten
Packed = dict[str, Tensor]


def pack_weights(module: fx.GraphModule, *, dtype: torch.dtype, packed: Packed) -> bool:
    """Bind a graph to packed tensors.

    Args:
        module: Any of an artifact's graphs; the lowered ones first.
        dtype: Type of the stored matrices.
        packed: The artifact's tensors by name; new ones are added.

    Returns:
        Whether anything changed.
    """
    if module.meta.get("packed"):
        return False
    graph = module.graph
    for node in list(graph.find_nodes(op="get_attr")):
        if not node.users:
            continue
        _pack(module, node, dtype, packed)
    module.meta["packed"] = True
    return True


def _pack(module: fx.GraphModule, node: fx.Node, dtype: torch.dtype, packed: Packed) -> None:
    graph, name = module.graph, str(node.target)
    value = _attribute(module, name).detach()
    turned = f"{name}_t"
    users = list(node.users)
    matrix = value.dim() > 1 and any(_multiplies(user) for user in users)
    stored = dtype if matrix else torch.float32 if value.is_floating_point() else value.dtype
    if all(user.target is aten.t.default for user in users):
        packed.setdefault(turned, value.t().to(stored).contiguous())
        for user in users:
            for copy in list(user.users):
                copy.replace_all_uses_with(node)
        _rebind(module, node, turned, packed[turned])
        return
    if turned in packed:
        _rebind(module, node, turned, packed[turned])
        with graph.inserting_before(node.next):
            read = graph.call_function(aten.t.default, (node,))
    else:
        packed.setdefault(name, value.to(stored).contiguous())
        _rebind(module, node, name, packed[name])
        read = node
    if stored == torch.float32 or not value.is_floating_point():
        _use(users, node, read)
        return
    plain = [u for u in users if getattr(u.target, "namespace", "") == "shadowc"]
    lookups = [u for u in users if u.target is aten.embedding.default]
    for lookup in lookups:
        with graph.inserting_before(lookup.next):
            wide = graph.call_function(aten.to.dtype, (lookup, torch.float32))
        lookup.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
    others = [u for u in users if u not in plain and u not in lookups]
    _use(plain + lookups, node, read)
    if others:
        with graph.inserting_before(read.next):
            wide = graph.call_function(aten.to.dtype, (read, torch.float32))
        _use(others, node, wide)


def _multiplies(user: fx.Node) -> bool:
    matrix_ops = (aten.t.default, aten.linear.default, aten.embedding.default)
    return user.target in matrix_ops or getattr(user.target, "namespace", "") == "shadowc"


def _use(users: list[fx.Node], old: fx.Node, new: fx.Node) -> None:
    if new is not old:
        for user in users:
            user.replace_input_with(old, new)


def _attribute(module: fx.GraphModule, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value = getattr(module.get_submodule(owner), leaf)
    if not isinstance(value, Tensor):
        raise PassError(f"pack_weights: {name} is not a tensor", got=type(value).__name__)
    return value


def _rebind(module: fx.GraphModule, node: fx.Node, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    home = module.get_submodule(owner)
    if hasattr(home, leaf):
        delattr(home, leaf)
    home.register_buffer(leaf, value, persistent=False)
    node.target = name
