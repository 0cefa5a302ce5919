"""Teacher-forced runs of the masked program: the same tokens and masks as decoding, all at once."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, fx

from shadowc.passes.manager import eliminate_dead_code
from shadowc.runtime.program import Program
from shadowc.runtime.session import Session

select = torch.ops.aten.select.int


def mask_source(tokens: int, *, prompt: int, refresh: int) -> Tensor:
    """For every token, the token whose mask a decoder would run it with.

    Args:
        tokens: T.
        prompt: Tokens at the beginning that run dense, at least 1.
        refresh: As in `Policy`: a new mask every n decoded tokens, or 0 for the prompt's last.

    Returns:
        int64 [T]; -1 means dense. Never later than the token itself.
    """
    step = torch.arange(tokens) - prompt
    if refresh == 0:
        source = torch.full((tokens,), prompt - 1)
    else:
        source = prompt + step - step % refresh
    return torch.where(step < 0, -1, source)


@torch.inference_mode()
def teacher_forced(
    session: Session,
    ids: Tensor,
    *,
    prompt: int = 1,
    masks: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Tensor]:
    """Run the masked program over whole sequences.

    Args:
        session: The artifact.
        ids: int64 [B, T].
        prompt: Tokens that run dense, as a prompt does.
        masks: Masks to use instead of the artifact's: bool [B, T, L, H] and [B, T, L, F]. Prompt
            tokens must then be all ones in them.

    Returns:
        `logits` fp32 [B, T, V] and, where units are skipped, `head_mask` and `neuron_mask`.
    """
    batch, tokens = ids.shape
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
    inputs = [ids, torch.arange(tokens).expand(batch, -1), causal]
    if masks is not None:
        results = session.run("given_masks", *inputs, *masks)
        return {name: value.to(ids.device) for name, value in results.items()}
    if "mask_source" in session.programs["masked"].inputs:
        source = mask_source(tokens, prompt=prompt, refresh=session.policy.refresh)
        inputs.append(source.expand(batch, -1))
    results = session.run("masked", *inputs)
    return {name: value.to(ids.device) for name, value in results.items()}


def with_given_masks(program: Program) -> Program:
    """The masked program with its masks as inputs instead of a predictor: for any other predictor.

    Args:
        program: A masked program that returns (logits, head mask, neuron mask, ...).

    Returns:
        The same graph with inputs `head_mask` and `neuron_mask`.
    """
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    (returned,) = program.graph.output_node().args
    stacked = returned[1:3]  # one mask a layer
    placeholders = program.graph.find_nodes(op="placeholder")
    for node in placeholders:
        values[node] = graph.node_copy(node, lambda n: values[n])
    given = {}
    for node, name in zip(stacked, ("head_mask", "neuron_mask"), strict=True):
        given[node] = graph.placeholder(name)
    for node in stacked:
        for layer, mask in enumerate(node.args[0]):
            given[mask] = graph.call_function(select, (given[node], 2, layer))
    for node in program.graph.nodes:
        if node.op == "call_function":
            values[node] = given.get(node) or graph.node_copy(node, lambda n: values[n])
    graph.output(tuple(values[node] for node in returned))
    eliminate_dead_code(graph)
    source = [n for n in graph.find_nodes(op="placeholder") if n.name == "mask_source"]
    for node in source:
        graph.erase_node(node)
    inputs = tuple(n for n in program.inputs if n != "mask_source") + ("head_mask", "neuron_mask")
    return replace(program, inputs=inputs, graph=graph)
