"""blocks -> blocks, scores, and the masks that follow from them.

    feature -> predictor -> scores [B, T, L', N] -> top-k by the policy -> masks [B, T, L, N]
                                     masks[t] = masks[mask_source[t]]   (all ones where it is < 0)

A new input `mask_source` int64 [B, T] names, for every token, the token whose mask it runs with:
itself (refresh every token), an earlier one, or none (-1: a prompt token, which runs dense). That
one input states every refresh mode, and a mask can never come from a later token.

The predictor is the very module that was fitted, exported and inlined, so what the artifact
computes is what calibration measured. For `static` scores the masks are constants.
The graph then returns (logits, head mask, neuron mask).
"""

from __future__ import annotations

import torch
from torch import Tensor, fx, nn
from torch.export import Dim

from shadowc.calibration.predictor import ShadowPredictor
from shadowc.config import ModelShape, Policy
from shadowc.errors import PassError
from shadowc.kernels.select import select_reference
from shadowc.passes.find_blocks import Keep, blocks_of

PREFIX = "predictor"


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

    def __init__(self, predictor: nn.Module, shape: ModelShape, policy: Policy) -> None:
        super().__init__()
        self.predictor = predictor
        self.local = policy.scope == "local"
        self.heads = policy.heads_kept(shape), policy.min_heads
        self.neurons = policy.neurons_kept(shape), policy.min_neurons

    def forward(
        self, feature: Tensor, mask_source: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores and masks.

        Args:
            feature: fp32 [B, T, C].
            mask_source: int64 [B, T].

        Returns:
            Head scores [B, T, L-1, H], neuron scores [B, T, L, F], head mask bool [B, T, L, H]
            (layer 0 all ones), neuron mask bool [B, T, L, F].
        """
        head_scores, neuron_scores = self.predictor(feature)
        heads = select_reference(head_scores, *self.heads, self.local)
        heads = torch.cat((torch.ones_like(heads[:, :, :1]), heads), dim=2)
        neurons = select_reference(neuron_scores, *self.neurons, self.local)
        return (
            head_scores,
            neuron_scores,
            _from_source(heads, mask_source),
            _from_source(neurons, mask_source),
        )


def _from_source(mask: Tensor, source: Tensor) -> Tensor:
    index = source.clamp(min=0)[:, :, None, None].expand_as(mask)
    return mask.gather(1, index) | (source < 0)[:, :, None, None]


def export_masks(
    predictor: ShadowPredictor | StaticScores, shape: ModelShape, policy: Policy, width: int
) -> fx.GraphModule:
    """Export predictor and selection, once for all graphs that they are inserted into.

    Args:
        predictor: What scores the units.
        shape: The model's shape.
        policy: How many units run.
        width: Features of a token: C, or H*D for `context`.

    Returns:
        A graph of feature and mask_source to (head scores, neuron scores, head mask, neuron mask).

    Raises:
        PassError: If torch.export cannot trace the predictor.
    """
    grid = {0: Dim("B", min=1, max=1024), 1: Dim("T", min=1, max=1 << 20)}
    maker = MaskMaker(predictor, shape, policy).eval()
    try:
        program = torch.export.export(
            maker,
            (torch.zeros(2, 3, width), torch.zeros(2, 3, dtype=torch.int64)),
            dynamic_shapes=(grid, grid),
            strict=False,
        )
    except Exception as error:
        raise PassError("insert_predictor cannot export the predictor", got=error) from error
    masks = program.module(check_guards=False)
    masks.graph.set_codegen(fx.graph.CodeGen())
    return masks


def insert_predictor(
    module: fx.GraphModule, *, masks: fx.GraphModule, feature: str = "residual"
) -> bool:
    """Insert scores and masks after layer 0's attention.

    Args:
        module: A graph with blocks.
        masks: What `export_masks` gave.
        feature: `residual` (the stream after layer 0's attention) or `context` (its attention
            output before the projection).

    Returns:
        Whether anything changed.

    Raises:
        PassError: If blocks are missing.
    """
    blocks = blocks_of(module)
    if blocks.keep is not None:
        return False
    graph = module.graph
    source = blocks.residual if feature == "residual" else blocks.attention[0].context

    last_input = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(last_input):
        mask_source = graph.placeholder("mask_source")
    module.add_submodule(PREFIX, getattr(masks, PREFIX))
    nodes: dict[fx.Node, fx.Node] = {}
    returned: tuple[fx.Node, ...] = ()
    with graph.inserting_after(source):
        anchor = graph.call_function(torch.ops.aten.alias.default, (source,))
    arguments = iter((source, mask_source))
    with graph.inserting_before(anchor):
        for node in masks.graph.nodes:
            if node.op == "placeholder":
                nodes[node] = next(arguments)
            elif node.op == "output":
                returned = node.args[0]
            else:
                nodes[node] = graph.node_copy(node, lambda n: nodes[n])
                if node.target is torch.ops.aten.sym_size.int:
                    nodes[node].replace_input_with(mask_source, source)  # B and T are the same
                if node.op == "get_attr" and "." not in str(node.target):
                    _adopt_constant(module, masks, nodes[node])
    graph.erase_node(anchor)
    made = list(nodes.values())
    readers = [node for node in made if source in node.all_input_nodes]
    head_scores, neuron_scores, head_mask, neuron_mask = (nodes[node] for node in returned)
    blocks.keep = Keep(head_scores, neuron_scores, head_mask, neuron_mask, readers)
    output = graph.output_node()
    (logits,) = output.args[0]
    output.args = ((logits, blocks.keep.head_mask, blocks.keep.neuron_mask),)
    return True


def _adopt_constant(module: fx.GraphModule, masks: fx.GraphModule, node: fx.Node) -> None:
    name = f"{PREFIX}_{node.target}"
    module.register_buffer(name, getattr(masks, str(node.target)))
    node.target = name
