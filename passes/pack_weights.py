"""the model's parameters -> the artifact's tensors: each matrix once, in one type, unit rows
contiguous

    contiguous(t(weight))      -> weight_t, stored transposed                   (second projections)
    matrix                     -> stored in the weight type
    vector                     -> stored in `vectors`; what is no parameter of the model in fp32
    embedding(weight)          -> to(embedding(weight), compute)
    any other use of a weight  -> to(weight, compute), except by shadowc ops, which take it as it is

Nothing is copied here: what is packed says how a tensor is made, for whoever writes or runs it.

All programs of an artifact share one `Packed` store: the lowered ones lay it out, the masked one
reads a second projection back as the transpose of what they stored.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from shadowc.errors import PassError
from shadowc.stored import Stored

aten = torch.ops.aten
Packed = dict[str, Stored]


@dataclass(frozen=True)
class Types:
    """How weights are stored and what a graph computes in.

    Attributes:
        matrices: Type of stored matrices.
        vectors: Type of stored biases and norms.
        compute: Type of the activations of aten ops.
    """

    matrices: torch.dtype
    vectors: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32


def pack_weights(module: fx.GraphModule, *, types: Types, packed: Packed) -> bool:
    """Bind a graph to packed tensors, by name: a program runs with them, the module does not.

    Args:
        module: Any of an artifact's graphs; the lowered ones first.
        types: How weights are stored, and what this graph computes in.
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
        _pack(module, node, types, packed)
    module.meta["packed"] = True
    return True


def _pack(module: fx.GraphModule, node: fx.Node, types: Types, packed: Packed) -> None:
    graph, name = module.graph, str(node.target)
    parameter = _attribute(module, name)
    value = parameter.detach()
    turned = f"{name}_t"
    users = list(node.users)
    stored = value.dtype
    if value.is_floating_point():
        matrix = value.dim() > 1 and any(_multiplies(user) for user in users)
        vector = types.vectors if isinstance(parameter, torch.nn.Parameter) else torch.float32
        stored = types.matrices if matrix else vector
    if all(user.target is aten.t.default for user in users):
        packed.setdefault(turned, Stored(value, stored, turned=True))
        for user in users:
            for copy in list(user.users):
                copy.replace_all_uses_with(node)
        _rebind(module, node, turned, value)
        return
    if turned in packed:
        _rebind(module, node, turned, value)
        with graph.inserting_before(node.next):
            read = graph.call_function(aten.t.default, (node,))
    else:
        packed.setdefault(name, Stored(value, stored))
        _rebind(module, node, name, value)
        read = node
    if stored in (torch.float32, types.compute) or not value.is_floating_point():
        _use(users, node, read)
        return
    plain = [u for u in users if getattr(u.target, "namespace", "") == "shadowc"]
    lookups = [u for u in users if u.target is aten.embedding.default]
    for lookup in lookups:
        with graph.inserting_before(lookup.next):
            wide = graph.call_function(aten.to.dtype, (lookup, types.compute))
        lookup.replace_all_uses_with(wide, delete_user_cb=lambda user, wide=wide: user is not wide)
    others = [u for u in users if u not in plain and u not in lookups]
    _use(plain + lookups, node, read)
    for user in others:  # cast where it is used: one weight is wide at a time
        with graph.inserting_before(user):
            wide = graph.call_function(aten.to.dtype, (read, types.compute))
        user.replace_input_with(node, wide)


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
    """Give a node another attribute; `value` only stands there, with the old layout and type."""
    owner, _, leaf = name.rpartition(".")
    home = module.get_submodule(owner)
    if hasattr(home, leaf):
        delattr(home, leaf)
    home.register_buffer(leaf, value, persistent=False)
    node.target = name
