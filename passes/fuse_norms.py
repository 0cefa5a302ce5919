"""norm -> projection  ->  one op; and whoever makes the norm's input also prepares the norm.

    x = sparse_out_proj(..), y = sparse_mlp(norm(x), ..)
        ->  x, scaled, stats = scaled_out_proj(.., gamma), y, .. = norm_mlp(scaled, stats, ..)
    x = sparse_mlp(..), q, k, v = sparse_qkv(norm(x), ..)
        ->  x, scaled, stats, rows = norm_mlp(.., gamma), q, k, v = norm_qkv(scaled, stats, ..)
    x = embedding, q, k, v = sparse_qkv(norm(x), ..)
        ->  scaled, stats = scale(x, gamma), q, k, v = norm_qkv(scaled, stats, ..)
    linear(norm(x))
        ->  norm_linear(scaled, stats, ..)                                       (the output head)

For decode steps of one token. A layer norm leaves two constants a row behind, `gain` and `shift`
(see `norm_linear`), computed here from the weights as they are stored.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from shadowc.errors import PassError
from shadowc.kernels import norm_linear, norm_mlp, norm_qkv, rms_norm, scale, scaled_out_proj
from shadowc.passes.fuse_sparse_attention import unpack

# Importing registers the ops.
_ = (norm_linear, norm_mlp, norm_qkv, rms_norm, scale, scaled_out_proj)
aten, ops = torch.ops.aten, torch.ops.shadowc

_ROWS = 64  # of a weight are widened at a time: they stay in the cache
_NORMS = {aten.layer_norm.default: "layer", ops.rms_norm.default: "rms"}


def fuse_norms(
    module: fx.GraphModule, *, dtype: torch.dtype, known: dict[str, Tensor] | None = None
) -> bool:
    """Fold every norm into the projections around it.

    Args:
        module: A graph whose attention and MLP blocks are fused.
        dtype: Type in which matrices will be stored.
        known: Gains and shifts by name, of other graphs of the model; new ones are added.

    Returns:
        Whether anything changed.

    Raises:
        PassError: If a norm does not stand where a decoder layer has its norms.
    """
    known = {} if known is None else known
    norms = [n for n in module.graph.nodes if n.target in _NORMS]
    if "rows" not in module.meta:
        raise PassError("fuse_norms needs the fuse passes before it")
    for norm in norms:
        for user in list(norm.users):
            _consume(module, norm, user, dtype, known)
        x, (scaled, stats) = norm.args[0], norm.meta["made"]
        _produce(module, x, _norm_of(norm)[1], scaled, stats)
    for norm in norms:
        module.graph.erase_node(norm)
    return bool(norms)


def _norm_of(norm: fx.Node) -> tuple[str, fx.Node, fx.Node | None, float]:
    """Kind, gamma, beta and eps."""
    kind = _NORMS[norm.target]
    if kind == "rms":
        return kind, norm.args[1], None, norm.args[2]
    gamma, beta = norm.args[2], norm.args[3] if len(norm.args) > 3 else None
    eps = norm.args[4] if len(norm.args) > 4 else 1e-5
    if gamma is None:
        raise PassError("fuse_norms: a layer norm without weight", got=norm.name)
    return kind, gamma, beta, eps


def _consume(
    module: fx.GraphModule,
    norm: fx.Node,
    user: fx.Node,
    dtype: torch.dtype,
    known: dict[str, Tensor],
) -> None:
    """Replace a projection of norm(x) by one of (scaled, stats), which `_produce` will make."""
    graph, (kind, gamma, beta, eps) = module.graph, _norm_of(norm)
    if "made" not in norm.meta:
        with graph.inserting_before(norm):
            norm.meta["made"] = [
                graph.call_function(aten.alias.default, (norm.args[0],)) for _ in range(2)
            ]
    head = (*norm.meta["made"], kind, eps)

    def constants(weight: fx.Node, bias: fx.Node | None) -> tuple[fx.Node | None, ...]:
        if kind == "rms":
            return weight, None, bias
        named = [f"{weight.target}_{end}".replace(".", "_") for end in ("gain", "shift")]
        if named[0] not in known:
            made = _constants(module, weight, bias, gamma, beta, dtype)
            known.update(zip(named, made, strict=True))
        for name in named:
            module.register_buffer(name, known[name])
        return weight, *(graph.get_attr(name) for name in named)

    with graph.inserting_before(user):
        if user.target is ops.sparse_qkv.default:
            _, wq, bq, wk, bk, wv, bv, *rest = user.args
            matrices = (*constants(wq, bq), *constants(wk, bk), *constants(wv, bv))
            new = graph.call_function(ops.norm_qkv.default, (*head, *matrices, *rest))
            user.replace_all_uses_with(new)
        elif user.target is ops.sparse_mlp.default:
            _, w1, b1, second, b2, residual, *rest = user.args
            first = (*constants(w1, b1), None)
            _replace_mlp(module, user, (*head, *first, second, b2, residual, None, *rest))
        elif user.target is ops.sparse_gated_mlp.default and kind == "rms":
            _, gate, up, second, residual, *rest = user.args
            first = (gate, None, None, up)
            _replace_mlp(module, user, (*head, *first, second, None, residual, None, *rest))
        elif user.target is aten.linear.default:
            weight, bias = user.args[1], user.args[2] if len(user.args) > 2 else None
            new = graph.call_function(ops.norm_linear.default, (*head, *constants(weight, bias)))
            user.replace_all_uses_with(new)
        else:
            raise PassError(
                "fuse_norms: a norm that no projection follows",
                expected="sparse_qkv, sparse_mlp, sparse_gated_mlp (after an RMS norm) or linear",
                got=f"{norm.name} -> {user.target}",
            )
    graph.erase_node(user)


def _replace_mlp(module: fx.GraphModule, old: fx.Node, args: tuple[object, ...]) -> None:
    """A fused MLP in place of one that returned (y, rows)."""
    graph = module.graph
    y, rows = sorted(old.users, key=lambda node: node.args[1])
    new = graph.call_function(ops.norm_mlp.default, args)
    made = unpack(graph, new, 4)
    y.replace_all_uses_with(made[0])
    rows.replace_all_uses_with(made[3])
    module.meta["rows"] = [made[3] if node is rows else node for node in module.meta["rows"]]
    for node in (y, rows):
        graph.erase_node(node)


def _produce(
    module: fx.GraphModule, x: fx.Node, gamma: fx.Node, scaled: fx.Node, stats: fx.Node
) -> None:
    """Let the op that makes x also make what the norm of x needs."""
    graph = module.graph
    source = x.args[0] if x.target is not ops.sparse_out_proj.default else x
    if x.target is ops.sparse_out_proj.default and x.args[3] is not None:
        ctx, second, bias, residual, *rest = x.args
        weight = second.args[0].args[0]  # contiguous(t(weight)): this op wants it as it is
        with graph.inserting_before(x):
            new = graph.call_function(
                ops.scaled_out_proj.default, (ctx, weight, bias, residual, gamma, *rest)
            )
            y, made, sums = unpack(graph, new, 3)
        x.replace_all_uses_with(y)
        graph.erase_node(x)
    elif isinstance(source, fx.Node) and source.target is ops.norm_mlp.default:
        position = _GAMMA
        source.args = (*source.args[:position], gamma, *source.args[position + 1 :])
        made, sums = sorted(
            (n for n in source.users if n.args[1] in (1, 2)), key=lambda node: node.args[1]
        )
    else:
        with graph.inserting_after(x):
            new = graph.call_function(ops.scale.default, (x, gamma))
        with graph.inserting_after(new):
            made, sums = unpack(graph, new, 2)
    for placeholder, real in ((scaled, made), (stats, sums)):
        placeholder.replace_all_uses_with(real)
        graph.erase_node(placeholder)


_GAMMA = [a.name for a in ops.norm_mlp.default._schema.arguments].index("gamma")


def _constants(
    module: fx.GraphModule,
    weight: fx.Node,
    bias: fx.Node | None,
    gamma: fx.Node,
    beta: fx.Node | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Gain and shift of a projection that follows a layer norm."""
    matrix = _value(module, weight)
    vectors = [
        _value(module, vector).to(dtype).float() for vector in (gamma, beta) if vector is not None
    ]
    gain, shift = torch.zeros(2, len(matrix), device=matrix.device)
    for begin in range(0, len(matrix), _ROWS):
        rows = matrix[begin : begin + _ROWS].to(dtype).float()
        for product, vector in zip((gain, shift), vectors, strict=False):
            torch.mv(rows, vector, out=product[begin : begin + _ROWS])
    if bias is not None:
        shift += _value(module, bias).to(dtype).float()
    return gain, shift


def _value(module: fx.GraphModule, node: fx.Node) -> Tensor:
    owner, _, leaf = str(node.target).rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), leaf)
    return value.detach()
