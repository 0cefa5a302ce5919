"""canonical graph -> the same graph, with its attention and MLP blocks found and written down.

    attention   linear q, k, v -> [rotary] -> scaled_dot_product_attention -> linear out
    mlp         linear fc1 -> act -> linear fc2      or  act(linear gate) * linear up -> linear down

Blocks are found by operators and structure; the exported module stack (`...layers.3...`) is the
evidence that the structure belongs to that layer. The result is kept in `module.meta["blocks"]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import fx

from shadowc.config import ModelShape
from shadowc.errors import PassError
from shadowc.selection import Selection

aten = torch.ops.aten

ACTIVATIONS = {
    aten.relu.default: "relu",
    aten.silu.default: "silu",
    aten.gelu.default: "gelu",
}
_MOVES = {
    aten.view.default, aten.reshape.default, aten.transpose.int, aten.expand.default,
    aten.unsqueeze.default, aten.clone.default,
}  # fmt: skip


@dataclass
class Attention:
    """One attention block. `context` [B, T, H*D] is what the units' activations are slices of."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    rotary: tuple[fx.Node, fx.Node] | None
    context: fx.Node
    output: fx.Node
    mask: fx.Node | None = None


@dataclass
class MLP:
    """One MLP block. `hidden` [B, T, F] is what the units' activations are elements of."""

    gate: fx.Node | None
    up: fx.Node
    activation: str
    hidden: fx.Node
    output: fx.Node
    mask: fx.Node | None = None


@dataclass
class Choice:
    """What one tap chooses of one kind.

    Attributes:
        kind: `head` or `neuron`.
        layers: Those whose units it scores.
        scores: fp32 [B, T, L', N].
        selection: How it chooses.
        threshold: The thresholds fp32 [L'], where `selection` has them.
    """

    kind: str
    layers: range
    scores: fx.Node
    selection: Selection
    threshold: fx.Node | None = None


@dataclass
class Keep:
    """The nodes that say which units run.

    Attributes:
        choices: Of all taps, in the order of the layers.
        masks: Of each kind, by layer: bool [B, T, N].
        readers: For each tap the nodes of its predictor that use the feature.
    """

    choices: list[Choice]
    masks: dict[str, dict[int, fx.Node]]
    readers: list[list[fx.Node]]


@dataclass
class Blocks:
    """All blocks of a graph, by layer."""

    shape: ModelShape
    attention: list[Attention] = field(default_factory=list)
    mlp: list[MLP] = field(default_factory=list)
    keep: Keep | None = None

    def residual(self, layer: int) -> fx.Node:
        """The residual stream after a layer's attention, [B, T, C]."""
        users = [u for u in self.attention[layer].output.users if u.target is aten.add.Tensor]
        if len(users) != 1:
            raise PassError(
                f"find_blocks found no residual add after layer {layer}'s attention",
                expected="one aten.add that uses its output projection",
                got=f"{len(users)}",
            )
        return users[0]


def blocks_of(module: fx.GraphModule) -> Blocks:
    """The blocks that `find_blocks` wrote down.

    Raises:
        PassError: If it has not run on this module.
    """
    blocks = module.meta.get("blocks")
    if not isinstance(blocks, Blocks):
        raise PassError("this pass needs find_blocks before it")
    return blocks


def find_blocks(module: fx.GraphModule, *, shape: ModelShape) -> bool:
    """Find every attention and MLP block.

    Args:
        module: A canonical graph.
        shape: The model's shape, against which what is found is checked.

    Returns:
        False: the graph is not changed, only `module.meta["blocks"]` is set.

    Raises:
        PassError: If the graph is not that of an understood architecture; says what was looked for.
    """
    if "blocks" in module.meta:
        return False
    blocks = Blocks(shape)
    for node in module.graph.nodes:
        if node.target is aten.scaled_dot_product_attention.default:
            blocks.attention.append(_attention(node, shape))
        elif node.target is aten.linear.default and (mlp := _mlp(node)) is not None:
            blocks.mlp.append(mlp)
    _check(blocks)
    module.meta["blocks"] = blocks
    return False


def _check(blocks: Blocks) -> None:
    shape = blocks.shape
    kinds: tuple[tuple[str, Sequence[Attention | MLP]], ...] = (
        ("attention", blocks.attention),
        ("MLP", blocks.mlp),
    )
    for kind, found in kinds:
        looked_for = {
            "attention": "linear q, k, v -> scaled_dot_product_attention -> linear",
            "MLP": "linear -> activation -> linear, or act(linear) * linear -> linear",
        }[kind]
        if len(found) != shape.layers:
            raise PassError(
                f"find_blocks found {len(found)} {kind} blocks in a model of {shape.layers} layers",
                expected=looked_for,
                fix="shadowc understands OPT and Llama; see `shadowc targets`",
            )
        for layer, block in enumerate(found):
            stack = block.output.meta.get("nn_module_stack", {}).values()
            paths = [str(path) for path, _ in stack]
            if paths and not any(path.endswith(f"layers.{layer}") for path in paths):
                raise PassError(
                    f"find_blocks: {kind} block {layer} does not lie in layer {layer}",
                    got=paths[-1],
                )
    for mlp in blocks.mlp:
        units = mlp.up.meta["val"].shape[-1]
        if units != shape.ffn or (mlp.gate is None) == shape.gated:
            raise PassError("find_blocks: an MLP of another shape", expected=shape.ffn, got=units)


def _mlp(output: fx.Node) -> MLP | None:
    hidden = output.args[0]
    if not isinstance(hidden, fx.Node):
        return None
    if hidden.target in ACTIVATIONS:
        up = hidden.args[0]
        if isinstance(up, fx.Node) and up.target is aten.linear.default:
            return MLP(None, up, ACTIVATIONS[hidden.target], hidden, output)
    if hidden.target is aten.mul.Tensor:
        for act, up in (hidden.args, hidden.args[::-1]):
            if not (isinstance(act, fx.Node) and isinstance(up, fx.Node)):
                continue
            if act.target not in ACTIVATIONS or up.target is not aten.linear.default:
                continue
            gate = act.args[0]
            if isinstance(gate, fx.Node) and gate.target is aten.linear.default:
                return MLP(gate, up, ACTIVATIONS[act.target], hidden, output)
    return None


def _attention(sdpa: fx.Node, shape: ModelShape) -> Attention:
    query, query_scale, query_rotary = _projection(sdpa.args[0], shape.heads * shape.head_dim)
    key, key_scale, key_rotary = _projection(sdpa.args[1], shape.kv_heads * shape.head_dim)
    value, value_scale, value_rotary = _projection(sdpa.args[2], shape.kv_heads * shape.head_dim)
    if query_rotary != key_rotary or value_rotary is not None or value_scale != 1.0:
        raise PassError("find_blocks: query, key and value are not prepared as expected")
    scale = sdpa.kwargs.get("scale")
    if scale is None:
        scale = shape.head_dim**-0.5
    context = _only_user(sdpa)
    while context.target in _MOVES and next(iter(context.users)).target in _MOVES:
        context = _only_user(context)
    output = _only_user(context)
    if output.target is not aten.linear.default:
        raise PassError(
            "find_blocks: attention does not end in a projection",
            expected="aten.linear",
            got=str(output.target),
        )
    return Attention(
        query, key, value, float(scale) * query_scale * key_scale, query_rotary, context, output
    )


def _projection(
    node: object, features: int
) -> tuple[fx.Node, float, tuple[fx.Node, fx.Node] | None]:
    """Walk up from an input of attention to the linear that made it."""
    scale, rotary = 1.0, None
    while isinstance(node, fx.Node) and node.target is not aten.linear.default:
        if node.target in _MOVES:
            node = node.args[0]
        elif node.target is aten.mul.Tensor and isinstance(node.args[1], float):
            scale *= node.args[1]
            node = node.args[0]
        elif rotary is None and (found := _rotary(node)) is not None:
            node, rotary = found
        else:
            break
    if not (isinstance(node, fx.Node) and node.target is aten.linear.default):
        raise PassError(
            "find_blocks: an input of attention is not a projection",
            expected="linear -> [scale] -> view -> transpose -> [rotary] -> [repeat of K and V]",
            got=str(getattr(node, "target", node)),
        )
    if node.meta["val"].shape[-1] != features:
        raise PassError(
            "find_blocks: a projection of another width",
            expected=features,
            got=node.meta["val"].shape[-1],
        )
    return node, scale, rotary


def _rotary(node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, fx.Node]] | None:
    """x * cos + cat(-x[D/2:], x[:D/2]) * sin  ->  (x, (cos, sin)), both [B, T, D]."""
    if node.target is not aten.add.Tensor:
        return None
    straight, rotated = node.args[:2]
    for product in (straight, rotated):
        if not (isinstance(product, fx.Node) and product.target is aten.mul.Tensor):
            return None
    x, cos = straight.args
    half, sin = rotated.args
    if half.target is not aten.cat.default or any(
        f.target is not aten.unsqueeze.default for f in (cos, sin)
    ):
        return None
    minus, plus = half.args[0]
    if minus.target is not aten.neg.default or plus.target is not aten.slice.Tensor:
        return None
    if minus.args[0].target is not aten.slice.Tensor or minus.args[0].args[0] is not x:
        return None
    if plus.args[0] is not x or plus.args[2] != 0 or minus.args[0].args[2] != plus.args[3]:
        return None
    return x, (cos.args[0], sin.args[0])


def _only_user(node: fx.Node) -> fx.Node:
    if len(node.users) != 1:
        raise PassError(f"find_blocks: expected one user after {node.target}", got=len(node.users))
    return next(iter(node.users))
