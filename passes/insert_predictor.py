"""blocks -> blocks, scores, and the masks that follow from them.

    at each tap:  feature -> predictor -> scores [B, T, L', N] -> selection -> masks [B, T, L', N]
                                     masks[t] = masks[mask_source[t]]   (all ones where it is < 0)

A new input `mask_source` int64 [B, T] names, for every token, the token whose mask it runs with:
itself (refresh every token), an earlier one, or none (-1: a prompt token, which runs dense). That
one input states every refresh mode, and a mask can never come from a later token.

The predictors are the very modules that were fitted, exported and inlined, so what the artifact
computes is what calibration measured. For `static` scores the masks are constants.
The graph then returns (logits, head mask [B, T, L, H], neuron mask [B, T, L, F]).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from shadowc.calibration.predictor import Predictor
from shadowc.config import Tap
from shadowc.errors import PassError
from shadowc.kernels.select import select_reference
from shadowc.kernels.select_above import select_above_reference
from shadowc.passes.find_blocks import Choice, Keep, blocks_of
from shadowc.selection import Selection, TopK

PREFIX = "predictor"
KINDS = ("head", "neuron")
aten = torch.ops.aten


class StaticScores(nn.Module):
    """The `static` predictor: the same mean scores for every token."""

    def __init__(self, heads: Tensor, neurons: Tensor) -> None:
        super().__init__()
        self.heads: Tensor
        self.neurons: Tensor
        self.register_buffer("heads", heads[1:].clone())
        self.register_buffer("neurons", neurons.clone())

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Scores of layers 1.. (heads) and of all layers (neurons), expanded to [B, T, ...]."""
        b, t, _ = feature.shape
        return self.heads.expand(b, t, -1, -1), self.neurons.expand(b, t, -1, -1)


class MaskMaker(nn.Module):
    """Feature -> scores -> masks, in plain aten: the semantics of selection."""

    def __init__(self, predictor: nn.Module, heads: Selection, neurons: Selection) -> None:
        super().__init__()
        self.predictor = predictor
        self.top_k: dict[str, TopK] = {}
        for kind, selection in zip(KINDS, (heads, neurons), strict=True):
            if isinstance(selection, TopK):
                self.top_k[kind] = selection
            else:
                self.register_buffer(f"{kind}_threshold", selection)

    def forward(
        self, feature: Tensor, mask_source: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores and masks.

        Args:
            feature: fp32 [B, T, C].
            mask_source: int64 [B, T].

        Returns:
            Head scores [B, T, L', H], neuron scores [B, T, L'', F] and their masks, bool.
        """
        scores = self.predictor(feature)
        masks = (self._masks(*one, mask_source) for one in zip(KINDS, scores, strict=True))
        return (*scores, *masks)

    def _masks(self, kind: str, scores: Tensor, source: Tensor) -> Tensor:
        if kind in self.top_k:
            best = self.top_k[kind]
            mask = select_reference(scores, best.keep, best.floor, best.local)
        else:
            mask = select_above_reference(scores, getattr(self, f"{kind}_threshold"))
        index = source.clamp(min=0)[:, :, None, None].expand_as(mask)
        return mask.gather(1, index) | (source < 0)[:, :, None, None]


@dataclass(frozen=True)
class TapMasks:
    """One tap's predictor and selection.

    Attributes:
        tap: Where it reads and what it scores.
        graph: Feature and mask_source to (head scores, neuron scores, head mask, neuron mask).
        heads: How heads are chosen.
        neurons: How neurons are chosen.
    """

    tap: Tap
    graph: fx.GraphModule
    heads: Selection
    neurons: Selection


def export_masks(
    predictors: Sequence[Predictor | StaticScores],
    chosen: Iterable[tuple[Tap, Selection, Selection]],
    width: int,
) -> list[TapMasks]:
    """Export predictors and selections, once for all graphs that they are inserted into.

    Args:
        predictors: What scores the units, a tap each.
        chosen: For each tap, how it chooses heads and neurons.
        width: Features of a token: C, or H*D for `context`.

    Raises:
        PassError: If torch.export cannot trace a predictor.
    """
    grid = {0: Dim("B", min=1, max=1024), 1: Dim("T", min=1, max=1 << 20)}
    made = []
    for predictor, (tap, heads, neurons) in zip(predictors, chosen, strict=True):
        try:
            program = torch.export.export(
                MaskMaker(predictor, heads, neurons).eval(),
                (torch.zeros(2, 3, width), torch.zeros(2, 3, dtype=torch.int64)),
                dynamic_shapes=(grid, grid),
                strict=False,
            )
        except Exception as error:
            raise PassError("insert_predictor cannot export the predictor", got=error) from error
        graph = program.module(check_guards=False)
        graph.graph.set_codegen(fx.graph.CodeGen())
        made.append(TapMasks(tap, graph, heads, neurons))
    return made


def insert_predictor(
    module: fx.GraphModule, *, masks: Sequence[TapMasks], feature: str = "residual"
) -> bool:
    """Insert scores and masks after the attention of every tap's layer.

    Args:
        module: A graph with blocks.
        masks: What `export_masks` gave.
        feature: `residual` (the stream after a layer's attention), `normed` (what its MLP reads),
            `entry` (what its attention reads: a layer's neurons are known before it runs) or
            `context` (its attention's output before the projection).

    Returns:
        Whether anything changed.

    Raises:
        PassError: If blocks are missing.
    """
    blocks = blocks_of(module)
    if blocks.keep is not None:
        return False
    graph, shape = module.graph, blocks.shape
    last_input = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last_input):
        mask_source = graph.placeholder("mask_source")
    keep = Keep([], {kind: {} for kind in KINDS}, [])
    call = graph.call_function
    with graph.inserting_before(mask_source.next):  # layer 0's heads always run: ones [B, T, H]
        one = call(aten.ones_like.default, (mask_source,), {"dtype": torch.bool})
        column = call(aten.unsqueeze.default, (one, -1))
        keep.masks["head"][0] = call(aten.expand.default, (column, [-1, -1, shape.heads]))
    for made in masks:
        layer = made.tap.layer
        if feature == "residual":
            source = blocks.residual(layer)
        elif feature == "normed":
            source = blocks.mlp[layer].up.args[0]
        elif feature == "entry":
            source = blocks.attention[layer].query.args[0]
        else:
            source = blocks.attention[layer].context
        _insert(module, made, source, mask_source, keep)
    blocks.keep = keep
    output = graph.output_node()
    (logits,) = output.args[0]
    layers = range(shape.layers)
    with graph.inserting_before(output):
        whole = [call(aten.stack.default, ([keep.masks[k][i] for i in layers], 2)) for k in KINDS]
    output.args = ((logits, *whole),)
    return True


def _insert(
    module: fx.GraphModule, masks: TapMasks, source: fx.Node, mask_source: fx.Node, keep: Keep
) -> None:
    """Inline one tap's graph after what it reads, and note what it chooses."""
    graph, tap = module.graph, masks.tap
    home = f"{PREFIX}.{tap.layer}"
    nodes: dict[fx.Node, fx.Node] = {}
    constants: dict[str, fx.Node] = {}
    returned: tuple[fx.Node, ...] = ()
    with graph.inserting_after(source):
        anchor = graph.call_function(aten.alias.default, (source,))
    arguments = iter((source, mask_source))
    with graph.inserting_before(anchor):
        for node in masks.graph.graph.nodes:
            if node.op == "placeholder":
                nodes[node] = next(arguments)
            elif node.op == "output":
                returned = node.args[0]
            elif node.op == "get_attr":
                name = f"{home}.{str(node.target).removeprefix(f'{PREFIX}.')}"
                _adopt(module, name, masks.graph.get_buffer(str(node.target)))
                nodes[node] = constants[name] = graph.get_attr(name)
            else:
                nodes[node] = graph.node_copy(node, lambda n: nodes[n])
                if node.target is aten.sym_size.int:
                    nodes[node].replace_input_with(mask_source, source)  # B and T are the same
        scores, made = returned[:2], returned[2:]
        for kind, layers, selection, score, mask in zip(
            KINDS, (tap.heads, tap.neurons), (masks.heads, masks.neurons), scores, made, strict=True
        ):
            if not layers:
                continue
            threshold = constants.get(f"{home}.{kind}_threshold")
            keep.choices.append(Choice(kind, layers, nodes[score], selection, threshold))
            for i, layer in enumerate(layers):
                one = graph.call_function(aten.select.int, (nodes[mask], 2, i))
                keep.masks[kind][layer] = one
    graph.erase_node(anchor)
    keep.readers.append([node for node in nodes.values() if source in node.all_input_nodes])


def _adopt(module: fx.GraphModule, name: str, value: Tensor) -> None:
    """Register a buffer under a dotted name."""
    home: nn.Module = module
    *owners, leaf = name.split(".")
    for owner in owners:
        if not hasattr(home, owner):
            home.add_module(owner, nn.Module())
        home = getattr(home, owner)
    home.register_buffer(leaf, value)
