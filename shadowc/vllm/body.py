"""A program of an artifact -> what runs inside vLLM: no cache, no head, any mix of tokens.

    decode_attention(q, k, v, cos, sin, k_cache_l, ...)   ->  attend(l, rotary q, rotary k, v)
    sparse_qkv | sparse_out_proj | sparse_mlp | ...        ->  the same for mixed tokens (`cut.py`)
    what leads to keep sets alone, of x [T, 1, C]          ->  the same, of the decoded rows of x
    logits = linear(x[:, -1:])                             ->  x; the head is called for what is
                                                               sampled from

So what vLLM runs is the artifact's own graph, whatever the model, predictor and selection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shadowc.errors import ArtifactError
from shadowc.kernels.decode_attention import rotate
from shadowc.native import CPU_LAUNCHERS
from shadowc.runtime.program import Program
from shadowc.runtime.session import KEEP_PREFIXES
from shadowc.vllm.cut import SPLIT, Cut

#: attend(layer, q [T, H, D], k [T, G, D], v [T, G, D]) -> context [T, H * D], float32.
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
_SIZE = torch.ops.aten.sym_size.int


@dataclass(frozen=True)
class Body:
    """A program without its cache and its head.

    Attributes:
        run: From its inputs to the last hidden states [T, 1, C], then the keep sets.
        inputs: Names of `input_ids` [T, 1], `position_ids` [T, 1], and keep sets that are given.
        kept: Names of the keep sets among its results.
        head: Name of the matrix [V, C] that turns hidden states into logits.
        scales: Factor of the attention scores in each layer.
    """

    run: Callable[..., tuple[Tensor, ...]]
    inputs: tuple[str, ...]
    kept: tuple[str, ...]
    head: str
    scales: tuple[float, ...]


def make_body(
    program: Program, tensors: Mapping[str, Tensor], cut: Cut, attend: Attend, head_dim: int
) -> Body:
    """Rewrite a program.

    Args:
        program: Of one token a row, or `dense`; of the `cpu` target.
        tensors: The artifact's tensors.
        cut: Runs the ops that skip units.
        attend: Runs a layer's attention over vLLM's cache.
        head_dim: D.

    Raises:
        ArtifactError: If the program does not look as this version's do.
    """
    graph = fx.Graph()
    results: Any = graph.graph_copy(program.graph, {})
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    weights = dict(zip(placeholders, program.weights, strict=False))
    hidden, head = _split_head(results[0], weights)
    found = {
        name: node
        for name, node in zip(program.outputs, results, strict=True)
        if name.startswith(KEEP_PREFIXES)
    }
    graph.output((hidden, *found.values()))
    scales = _replace_attention(graph, attend, head_dim)
    _narrow_predictor(graph, hidden, weights, cut)
    for node in reversed(list(graph.nodes)):  # not fx's own sweep: a placeholder stays there
        if not node.users and node.op != "output" and "choose_into" not in str(node.target):
            graph.erase_node(node)
    for node in graph.nodes:
        name = _name(node)
        if name in SPLIT:
            node.target = cut.op(name)
        elif getattr(node.target, "namespace", "") == "shadowc":
            node.target = CPU_LAUNCHERS[name]
    left = [node for node in graph.nodes if node.op == "placeholder"]
    bound = [tensors[weights[node]] for node in left if node in weights]
    run = fx.GraphModule(torch.nn.Module(), graph).forward
    return Body(
        run=lambda *inputs: run(*bound, *inputs),
        inputs=tuple(str(node.target) for node in left if node not in weights),
        kept=tuple(found),
        head=head,
        scales=scales,
    )


def _name(node: fx.Node) -> str:
    """Name of an op of ours."""
    return node.target._opname if getattr(node.target, "namespace", "") == "shadowc" else ""


def _split_head(logits: Any, weights: Mapping[fx.Node, str]) -> tuple[Any, str]:
    """The hidden states, and the name of the matrix that makes logits of them."""
    if _name(logits) != "linear" or logits.args[2] is not None or logits.args[1] not in weights:
        raise ArtifactError(
            "the logits are not a projection",
            expected="a program of this version",
            got=logits.target,
            fix="compile the artifact again with this version of shadowc",
        )
    aten, hidden = torch.ops.aten, logits.args[0]
    while hidden.target in (aten.slice.Tensor, aten.contiguous.default):
        hidden = hidden.args[0]
    return hidden, weights[logits.args[1]]


def _replace_attention(graph: fx.Graph, attend: Attend, head_dim: int) -> tuple[float, ...]:
    """Attention over the cache of vLLM; returns the layers' scales."""
    scales = []
    for node in list(graph.nodes):
        if _name(node) != "decode_attention":
            continue
        q, k, v, cos, sin = node.args[:5]
        scales.append(float(node.args[9]))
        with graph.inserting_before(node):
            layer = _attention(attend, len(scales) - 1, head_dim)
            new = graph.call_function(layer, (q, k, v, cos, sin))
        node.replace_all_uses_with(new)
        graph.erase_node(node)
    return tuple(scales)


def _attention(attend: Attend, layer: int, head_dim: int) -> Callable[..., Tensor]:
    def attention(
        q: Tensor, k: Tensor, v: Tensor, cos: Tensor | None, sin: Tensor | None
    ) -> Tensor:
        heads = (x.view(len(x), 1, -1, head_dim) for x in (q, k, v))
        query, key, value = heads
        if cos is not None:
            query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return attend(layer, query[:, 0], key[:, 0], value[:, 0]).view(q.shape)

    return attention


def _narrow_predictor(
    graph: fx.Graph, hidden: fx.Node, weights: Mapping[fx.Node, str], cut: Cut
) -> None:
    """Give what leads to keep sets alone the decoded rows of what it reads."""
    trunk, todo = {hidden}, [hidden]
    while todo:
        node = todo.pop()
        read = node.all_input_nodes
        if _name(node) in SPLIT:
            keep = {argument for argument in node.args[-2:] if isinstance(argument, fx.Node)}
            read = [other for other in read if other not in keep]
        todo += [other for other in read if other not in trunk]
        trunk.update(read)
    narrow: dict[fx.Node, fx.Node] = {}

    def rows(node: fx.Node) -> fx.Node:
        """Of a node of the trunk, what the predictor reads instead."""
        if node not in trunk or node in weights:
            return node
        if node not in narrow:
            size = node.target is _SIZE
            target, arguments = (
                (_SIZE, (rows(node.args[0]), node.args[1])) if size else (cut.rows, (node,))
            )
            with graph.inserting_after(node):
                narrow[node] = graph.call_function(target, arguments)
        return narrow[node]

    for node in list(graph.nodes):
        if node.op == "call_function" and node not in trunk:
            node.args, node.kwargs = fx.map_arg((node.args, node.kwargs), rows)
