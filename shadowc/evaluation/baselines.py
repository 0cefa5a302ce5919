"""Other ways to run an artifact's weights: what its speed is compared with.

    static   the artifact's budget, spent on the units that score best on average: no predictor runs
    dejavu   the artifact's budget, but a predictor of the published sizes before every attention
             and MLP, with a top-k in every layer. Its weights are random: this is about speed only

Both run the artifact's own decode program, rewritten: the same kernels on the same weights.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, fx

from shadowc.compiler import static_keep
from shadowc.config import ModelShape, Policy, taps_of
from shadowc.errors import OptionError
from shadowc.passes.insert_predictor import StaticScores
from shadowc.passes.manager import eliminate_dead_code
from shadowc.runtime.program import Program
from shadowc.runtime.session import KEEP_PREFIXES, Session
from shadowc.selection import top_k

ops, aten = torch.ops.shadowc, torch.ops.aten

#: Ranks of the predictors in DejaVu's published code.
HEAD_RANK, NEURON_RANK = 1000, 512

#: The ops that skip neurons; where the residual stream, that the predictor reads, stands in them.
_MLPS = {"sparse_mlp": 5, "sparse_gated_mlp": 4, "norm_mlp": 10}


def static_session(session: Session) -> Session:
    """The same artifact with the keep sets of the calibration's mean scores, for every token.

    Raises:
        OptionError: If the artifact skips nothing, or has these keep sets already.
    """
    _check_decodes(session, "static")
    scores = (session.tensors[f"scores.{kind}"].cpu() for kind in ("heads", "neurons"))
    (whole,) = taps_of(session.shape.layers, (0,))
    chosen = top_k(session.shape, session.policy, whole)
    keep = static_keep(StaticScores(*scores), (whole, *chosen))
    hold = session.programs.get("hold") or with_given_keep(session.programs["decode"])
    other = session.with_program("hold", hold)
    other.static_keep = {name: value.to(session.device) for name, value in keep.items()}
    other.predictor_bytes = 0.0
    return other


def with_given_keep(program: Program) -> Program:
    """A decode program with its keep sets as inputs: the `hold` that the artifact does not have."""
    graph = copy.deepcopy(program.graph)
    (returned,) = graph.output_node().args
    placeholders = graph.find_nodes(op="placeholder")
    caches = program.inputs.index("k_cache_0")
    names = []
    with graph.inserting_before(placeholders[len(program.weights) + caches]):
        for name, node in zip(program.outputs, returned, strict=True):
            if name.startswith(KEEP_PREFIXES):
                node.replace_all_uses_with(graph.placeholder(name))
                names.append(name)
    eliminate_dead_code(graph)
    graph.lint()
    inputs = (*program.inputs[:caches], *names, *program.inputs[caches:])
    return replace(program, inputs=inputs, graph=graph)


def dejavu_session(session: Session) -> tuple[Session, dict[str, Tensor]]:
    """The artifact with DejaVu's predictors; their weights have no memory yet.

    Returns:
        The session, to be run with its program `decode`, and the new weights (on `meta`).

    Raises:
        OptionError: If the artifact predicts nothing that could be predicted in another way.
    """
    _check_decodes(session, "dejavu")
    dtype = next(t.dtype for name, t in session.tensors.items() if name.endswith("_t"))
    program, new = dejavu(session.programs["decode"], session.shape, session.policy, dtype)
    other = session.with_program("decode", program)
    other.predictor_bytes = float(sum(value.nbytes for value in new.values()))
    other.tensors = {**session.tensors, **new}
    return other, new


def dejavu(
    program: Program, shape: ModelShape, policy: Policy, dtype: torch.dtype
) -> tuple[Program, dict[str, Tensor]]:
    """A decode program with a predictor before every attention and MLP instead of one for all.

    Each reads the residual stream where it stands: relu(x A^T) B^T of rank 1000 for heads and 512
    for neurons, then the best units of the layer. Source: DejaVu, Liu et al. 2023 (sizes as in the
    code that was published with it).

    Args:
        program: A `decode` program.
        shape: Of the model.
        policy: Its budget is what the layers share equally.
        dtype: Of the weights.

    Returns:
        The program, and its new weights without memory.
    """
    graph = copy.deepcopy(program.graph)
    made: dict[str, Tensor] = {}
    chosen: dict[fx.Node, tuple[fx.Node, ...]] = {}
    inputs = graph.find_nodes(op="placeholder")
    last_weight = inputs[len(program.weights) - 1]
    heads, neurons = dejavu_kept(shape, policy)

    def choose(
        feature: fx.Node, before: fx.Node, units: int, kept: int, rank: int
    ) -> tuple[fx.Node, ...]:
        nonlocal last_weight
        weights = []
        for size in ((rank, shape.hidden), (units, rank)):
            name = f"dejavu.{len(made)}"
            made[name] = torch.empty(size, dtype=dtype, device="meta")
            with graph.inserting_after(last_weight):
                last_weight = graph.placeholder(name.replace(".", "_"))
            weights.append(last_weight)
        call = graph.call_function
        with graph.inserting_before(before):
            code = call(aten.relu.default, (call(ops.linear.default, (feature, weights[0], None)),))
            scores = call(ops.linear.default, (code, weights[1], None))
            best = call(ops.select.default, (scores, kept, 0, True))
            parts = [call(operator.getitem, (best, i)) for i in range(2)]
            return tuple(call(aten.select.int, (part, 0, 0)) for part in parts)

    for node in list(graph.nodes):
        if getattr(node.target, "namespace", "") != "shadowc" or node.args[-2] is None:
            continue
        name = node.target._opname
        if name in _MLPS:
            residual = node.args[_MLPS[name]]
            sets = choose(residual, node, shape.ffn, neurons, NEURON_RANK)
        elif name in ("sparse_qkv", "norm_qkv"):
            stream = node.args[0].args[0]  # what the norm in front of it reads ...
            if name == "norm_qkv":  # ... or its sum, beside which its maker put what is scaled
                stream = next(user for user in stream.users if user.args[1] == 0)
            sets = choose(stream, node, shape.heads, heads, HEAD_RANK)
            chosen[node.args[-2]] = sets
        elif name in ("decode_attention", "sparse_out_proj", "scaled_out_proj"):
            sets = chosen[node.args[-2]]
        else:
            continue
        node.args = (*node.args[:-2], *sets)
    (returned,) = graph.output_node().args
    kept = [i for i, name in enumerate(program.outputs) if not name.startswith(KEEP_PREFIXES)]
    graph.output_node().args = (tuple(returned[i] for i in kept),)
    eliminate_dead_code(graph)
    graph.lint()
    selects = graph.find_nodes(op="call_function", target=ops.select.default)
    if not made or 2 * len(selects) != len(made):  # one that chose before is still in use
        raise OptionError("'dejavu' does not apply: the decode program has ops that it cannot read")
    return replace(
        program,
        graph=graph,
        weights=(*program.weights, *made),
        outputs=tuple(program.outputs[i] for i in kept),
    ), made


def dejavu_kept(shape: ModelShape, policy: Policy) -> tuple[int, int]:
    """Heads of each layer but the first, and neurons of each layer, that the program keeps."""
    heads = round(policy.heads_kept(shape) / max(shape.layers - 1, 1))
    return heads, round(policy.neurons_kept(shape) / shape.layers)


def dejavu_counts(session: Session, batch: int) -> Mapping[str, Tensor]:
    """What a step of `dejavu` keeps, as programs that return their keep sets say it."""
    shape, (heads, neurons) = session.shape, dejavu_kept(session.shape, session.policy)
    found = {}
    if session.policy.head_sparsity:
        found["head_count"] = torch.full((shape.layers - 1, batch), heads)
    if session.policy.neuron_sparsity:
        found["neuron_count"] = torch.full((shape.layers, batch), neurons)
    return found


def _check_decodes(session: Session, name: str) -> None:
    if "decode" in session.programs:
        return
    if session.static_keep:
        reason = "the artifact itself runs the keep sets of the mean scores, it predicts nothing"
    else:
        reason = "the artifact skips no units"
    raise OptionError(f"{name!r} does not apply: {reason}")
