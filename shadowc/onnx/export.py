"""Lowered programs -> one ONNX model for prompt and decode.

    model(input_ids, attention_mask, position_ids, past_key_values.N.key / .value)
        = If(several tokens, or nothing in the cache,  dense program,  step program)
        -> logits, present.N.key / .value [, head_keep, neuron_keep, rows]

The dense branch is plain ONNX. In the step's branch every block is one custom node of the domain
`shadowc`, with a model-local function of the same meaning (`bodies.py`) for sessions that have no
library of ours registered. Weights are external data at their places in the artifact's safetensors
files, so that there is one copy of them.

The graph is written from the program's few kinds of nodes by the table below, not by
`torch.onnx.export`: that traces a module anew, while a program is a graph already, whose calls to
`shadowc` write caches in place. It would decompose `linear` into a transposition that ONNX Runtime
folds into a second copy of each weight, and two programs over one set of weights would have to be
one module with `torch.cond`.
"""

from __future__ import annotations

import inspect
import json
import operator
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, fx

from shadowc.errors import PassError
from shadowc.kernels import (
    decode_attention,
    linear,
    rms_norm,
    select,
    select_above,
    sparse_gated_mlp,
    sparse_mlp,
    sparse_out_proj,
    sparse_qkv,
)
from shadowc.native import keep_mask
from shadowc.onnx import bodies
from shadowc.onnx.bodies import DOMAIN, Value, Writer
from shadowc.onnx.names import DENSE, INPUTS, KERNELS, KINDS, MODEL, PAST, PRESENT
from shadowc.onnx.plan import TYPES, Node, Plans
from shadowc.runtime.program import Program
from shadowc.runtime.session import Session
from shadowc.versions import versions

OPSET = 18
IR_VERSION = 8
ABI = 1
"""Contract of the custom nodes, counted up with every change: the library refuses another one."""

# Importing registers the ops.
_ = (decode_attention, linear, rms_norm, select, select_above, sparse_gated_mlp, sparse_mlp,
     sparse_out_proj, sparse_qkv)  # fmt: skip
aten, ops = torch.ops.aten, torch.ops.shadowc


def export(session: Session, *, cuda: bool = False) -> dict[str, onnx.ModelProto]:
    """The models of an artifact by file name, without the data of their weights.

    Args:
        session: An artifact's programs, those of the `cpu` target with logits of all tokens.
        cuda: Make it one for GPUs: with their kernels, products in the type of the weights, and
            nothing skipped for batches, whose rows share what they read.

    Returns:
        `model.onnx`, and `dense.onnx` where the former skips anything.

    Raises:
        PassError: If a program calls something that has no form here.
    """
    step = next((name for name in ("decode", "hold", "exact") if name in session.programs), None)
    if step is None:
        return {MODEL: _dense_model(session, cuda)}
    return {MODEL: _step_model(session, step, cuda), DENSE: _dense_model(session, cuda)}


def save(models: Mapping[str, onnx.ModelProto], directory: Path) -> None:
    """Write models whose weights are in the safetensors files of that directory.

    Raises:
        PassError: If ONNX's own checker refuses a model.
    """
    places: dict[str, tuple[str, int, int]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with file.open("rb") as opened:
            size = int.from_bytes(opened.read(8), "little")
            header = json.loads(opened.read(size))
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                places[name] = file.name, 8 + size + begin, end - begin
    for name, model in models.items():
        for tensor in model.graph.initializer:
            del tensor.external_data[:]
            for key, value in zip(("location", "offset", "length"), places[tensor.name],
                                  strict=True):  # fmt: skip
                tensor.external_data.add(key=key, value=str(value))
        (directory / name).write_bytes(model.SerializeToString())
        try:
            onnx.checker.check_model(directory / name, full_check=True)
        except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
            raise PassError(f"onnx.checker refuses {name}", got=error) from error


def _dense_model(session: Session, cuda: bool) -> onnx.ModelProto:
    """Every unit, in plain ONNX, with a cache that grows."""
    w = Writer(half=_half(session), narrow=cuda)
    program = session.program("dense")
    made = _Converter(session, w, _frame(w)).convert(program)
    names = ["logits", *_presents(session)]
    for name in names:
        w.nodes.append(helper.make_node("Identity", [made[name]], [name]))
    return _model(session, w, names, program.weights, {})


def _step_model(session: Session, step: str, cuda: bool) -> onnx.ModelProto:
    """A prompt dense, then token by token what the policy keeps."""
    w = Writer(half=_half(session), narrow=cuda)
    frame = _frame(w)
    many = w.op("Greater", frame["tokens"], w.ints(1))
    first = w.op("Equal", frame["position"], w.ints(0))
    whole_model = w.op("Or", many, first)
    if cuda:
        rows = w.op("Greater", w.size("input_ids", 0), w.ints(1))
        whole_model = w.op("Or", whole_model, rows)
    prompt = w.op("Squeeze", whole_model)

    program, dense = session.program(step), session.program("dense")
    plans = Plans() if cuda else None
    within = Writer("step/", half=w.half, narrow=cuda)
    stepper = _Converter(session, within, frame, step=True, plans=plans)
    made = stepper.convert(program)
    names = ["logits", *_presents(session), *(k for k in ("head_keep", "neuron_keep") if k in made)]
    names.append("rows")
    within = Writer("prompt/", half=w.half, narrow=cuda)
    whole = _Converter(session, within, frame, shared=True)
    every = whole.convert(dense) | whole.every_unit(names)

    branches = {
        "then_branch": _graph(session, "prompt", whole.w, [every[n] for n in names], names),
        "else_branch": _graph(session, "step", stepper.w, [made[n] for n in names], names),
    }
    if plans is not None:  # in the branch, where ONNX Runtime tells its nodes that it is constant
        brought = numpy_helper.from_array(plans.tensor(), KERNELS)
        branches["else_branch"].initializer.append(brought)
    w.nodes.append(helper.make_node("If", [prompt], names, name="prompt_or_step", **branches))
    weights = dict.fromkeys((*program.weights, *dense.weights))
    return _model(session, w, names, weights, stepper.functions)


def _half(session: Session) -> bool:
    return session.weight_dtype is not torch.float32


def _presents(session: Session) -> list[str]:
    return [PRESENT.format(i, kind) for i in range(session.shape.layers) for kind in KINDS]


def _frame(w: Writer) -> dict[str, Value]:
    """What both branches need to know of the inputs.

    `tokens` int64 [1] T, `position` int64 [1] slots filled before, `allowed` bool [B, T, position
    + T]: the slots up to a token's own that are not padding. The library takes padding on the left.
    """
    tokens, total = w.size("input_ids", 1), w.size("attention_mask", 1)
    position = w.op("Sub", total, tokens)
    zero, one = (w.constant(value, np.int64) for value in (0, 1))
    slots = w.op("Range", zero, w.op("Squeeze", total), one)
    own = w.op("Range", w.op("Squeeze", position), w.op("Squeeze", total), one)
    causal = w.op("LessOrEqual", slots, w.op("Unsqueeze", own, w.ints(1)))  # [T, S]
    text = w.op("Cast", "attention_mask", to=TensorProto.BOOL)
    allowed = w.op("And", causal, w.op("Unsqueeze", text, w.ints(1)))
    return {"tokens": tokens, "position": position, "allowed": allowed}


class _Layers:
    """A keep set of several layers [L, B, N], from which single layers are taken."""

    def __init__(self, mask: Value) -> None:
        self.mask = mask


class _Converter:
    """Writes one program as ONNX.

    A keep set is one mask here, the value of `index`; that of `count` is None. Queries, keys and
    values stay the arguments of `sparse_qkv` until `sparse_out_proj` ends the block.

    Args:
        session: The artifact.
        w: Where to write.
        frame: See `_frame`.
        step: Whether blocks become custom nodes; else plain ONNX in line.
        shared: See `bodies.attention`; of the plain form.
        plans: Gets what custom nodes run on a GPU, if they shall.
    """

    def __init__(
        self,
        session: Session,
        w: Writer,
        frame: Mapping[str, Value],
        *,
        step: bool = False,
        shared: bool = False,
        plans: Plans | None = None,
    ) -> None:
        self.session, self.shape, self.w, self.frame = session, session.shape, w, frame
        self.step, self.shared, self.plans = step, shared, plans
        self._shapes: dict[Value, Tensor] = {}
        self.functions: dict[str, onnx.FunctionProto] = {}
        self._meanings: dict[str, object] = {}
        self._present: dict[str, Value] = {}

    def convert(self, program: Program) -> dict[str, Value]:
        """Write the program; returns its results by the names of the model's outputs."""
        values: dict[fx.Node, Any] = {}
        placeholders = program.graph.find_nodes(op="placeholder")
        given = (*program.weights, *(self._input(name) for name in program.inputs))
        values |= zip(placeholders, given, strict=True)
        shapes = {} if self.plans is None else one_token(self.session, program)
        results: Sequence[Any] = ()
        for node in program.graph.nodes:
            if node.op == "call_function":
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                self._shapes |= {
                    values[source]: shapes[source]
                    for source in node.all_input_nodes
                    if source in shapes and isinstance(values[source], str)
                }
                values[node] = self._call(node.target, args, kwargs)
            elif node.op == "output":
                results = fx.map_arg(node.args[0], values.__getitem__)
        named = dict(zip(program.outputs, results, strict=True))
        made = {"logits": named["logits"], **self._present}
        for kind in ("head", "neuron"):
            if (mask := named.get(f"{kind}_index")) is not None:
                made[f"{kind}_keep"] = mask
        if self.step:
            rows = [named[f"rows_{layer}"] for layer in range(self.shape.layers)]
            made["rows"] = self.w.op("Concat", *rows, axis=0)
        return made

    def every_unit(self, names: Sequence[str]) -> dict[str, Value]:
        """What a prompt says of its keep sets, of those outputs: all ones."""
        shape, w = self.shape, self.w
        made = {}
        for name, layers, units in (
            ("head_keep", shape.layers - 1, shape.heads),
            ("neuron_keep", shape.layers, shape.ffn),
        ):
            if name in names:
                size = w.op("Concat", w.ints(layers), w.size("input_ids", 0), w.ints(units), axis=0)
                made[name] = w.op("Expand", w.constant([True], np.bool_), size)
        size = w.op("Concat", w.ints(shape.layers), w.size("input_ids", 0), axis=0)
        return made | {"rows": w.op("Expand", w.constant([shape.ffn], np.int32), size)}

    def _input(self, name: str) -> Any:
        """The value of a program's input."""
        kind, is_cache, layer = name.partition("_cache_")
        if is_cache:
            return PAST.format(layer, {"k": "key", "v": "value"}[kind])
        if name.endswith("_index"):  # keep sets that never change: [L, 1, N] and [L, 1]
            sets = self.session.static_keep
            index, count = sets[name], sets[name.replace("_index", "_count")]
            rows = [keep_mask(i, n, i.shape[-1]) for i, n in zip(index, count, strict=True)]
            mask = self.w.constant(torch.stack([m for m in rows if m is not None]).numpy(), bool)
            batch = self.w.op("Concat", self.w.ints(1), self.w.size("input_ids", 0), self.w.ints(1),
                              axis=0)  # fmt: skip
            return self.w.op("Expand", mask, batch)
        if name == "start" or name.endswith("_count"):
            return None  # `allowed` says it; see the class
        return self.frame.get(name, name)

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.getitem:
            parts, place = args
            if isinstance(parts, _Layers):
                at = self.w.constant(place, np.int64)
                return self.w.op("Gather", parts.mask, at, axis=0)
            return None if parts is None else parts[place]
        write = _TABLE.get(target)
        if write is None:
            raise PassError(
                "the program calls an operator that has no ONNX form here",
                expected="the operators of OPT and Llama, and of the predictors",
                got=target,
            )
        return write(self, *args, **kwargs)

    def node(
        self,
        kind: str,
        body: Callable[..., Any],
        inputs: Sequence[Value | None],
        results: int,
        fixed: Mapping[str, Any],
        own: Mapping[str, int] | None = None,
        optional: bool = False,
    ) -> list[Value]:
        """A custom node, and the function that it falls back to.

        Args:
            kind: Name of the op.
            body: Writes its meaning, from a writer, the inputs, and `fixed`.
            inputs: Those of the node, None for those that this model does not have.
            results: How many.
            fixed: Attributes that are the same in the whole model: the function is made for them.
            own: Attributes that this node has by itself.
            optional: Whether the body is the same with and without its optional inputs.
        """
        attributes = {"abi": ABI, **fixed, **(own or {})}
        names = [*inspect.signature(body).parameters][1 : 1 + len(inputs)]
        if self.plans is not None:
            node = self._planned(kind, dict(zip(names, inputs, strict=True)), attributes)
            attributes["plan"] = self.plans.add(node)
        given = [optional or value is not None for value in inputs]
        meaning = (given, dict(fixed))
        if self._meanings.setdefault(kind, meaning) != meaning:
            raise PassError(f"{kind} differs between layers", expected=self._meanings[kind],
                            got=meaning)  # fmt: skip
        kernels = [] if self.plans is None else [KERNELS]
        if kind not in self.functions:
            w = Writer(half=self.w.half, narrow=self.w.narrow)
            formal = (n if there else None for n, there in zip(names, given, strict=True))
            made = body(w, *formal, **fixed)
            self.functions[kind] = helper.make_function(
                DOMAIN, kind, [*names, *kernels], [made] if isinstance(made, str) else [*made],
                w.nodes,
                [helper.make_opsetid("", OPSET)], [*attributes],
            )  # fmt: skip
        values = {k: int(v) if isinstance(v, bool) else v for k, v in attributes.items()}
        return self.w.nodes_of(
            kind, *inputs, *kernels, results=results, domain=DOMAIN, **values
        )  # fmt: skip

    def _planned(
        self, op: str, inputs: Mapping[str, Value | None], attributes: Mapping[str, Any]
    ) -> Node:
        """A node of one token for its plan."""
        shape, slots = self.shape, self.session.max_seq_len
        known = {
            "position": torch.empty(1, dtype=torch.int64, device="meta"),
            "allowed": torch.empty(1, 1, slots, dtype=torch.bool, device="meta"),
        }
        units = shape.heads if op == "SparseAttention" else shape.ffn
        known["keep"] = torch.empty(1, units, dtype=torch.bool, device="meta")
        tensors = {
            name: None if value is None else known.get(name, self._shapes.get(value))
            for name, value in inputs.items()
        }
        return Node(op, tensors, {k: v for k, v in attributes.items() if k != "abi"})

    def _kept(self, mask: Value | None, units: int) -> Value:
        """A keep set, or that of all units."""
        return mask or self.w.constant(np.ones((1, units)), np.bool_)

    # One method for each `shadowc` op.

    def linear(self, x: Value, weight: Value, bias: Value | None) -> Value:
        """See `bodies.linear`."""
        if not isinstance(x, str):  # see `attention`
            raise PassError(
                "the predictor reads what lies inside of an attention node",
                expected="a calibration with --feature residual, normed or entry",
                got="context",
            )
        if not self.step:
            return bodies.linear(self.w, x, weight, bias)
        if self.w.narrow:  # whose sum with a bias is one of fp32, by an operator that needs both
            product = self.node("Linear", bodies.linear, (x, weight, None), 1, {})[0]
            return self.w.add(product, bias)
        # Gemm may do without its bias, and so may this node.
        return self.node("Linear", bodies.linear, (x, weight, bias), 1, {}, optional=True)[0]

    def rms_norm(self, x: Value, weight: Value, eps: float) -> Value:
        """See `bodies.rms_norm`."""
        return bodies.rms_norm(self.w, x, weight, eps)

    def select(self, scores: Value, keep: int, floor: int, local: bool) -> tuple[Value, None]:
        """See `bodies.select`."""
        own = {"keep": keep, "floor": floor}
        return self.node("Select", bodies.select, (scores,), 1, {"local": local}, own)[0], None

    def select_above(self, scores: Value, threshold: Value) -> tuple[Value, None]:
        """A comparison: needs no op of ours."""
        w = self.w
        above = w.op("Greater", scores, w.op("Unsqueeze", threshold, w.ints(1)))
        kept = w.op("Or", above, w.op("IsNaN", scores))
        return w.op("Transpose", kept, perm=[1, 0, 2]), None

    def qkv(self, *args: Any) -> list[tuple[Any, ...]]:
        """Kept for `out_proj`."""
        return [args[:7]] * 3

    def attention(self, q: Any, k: Any, v: Any, *args: Any) -> tuple[Any, ...]:
        """Kept for `out_proj`."""
        return (*q, *args)

    def out_proj(
        self, ctx: Any, weight_t: Value, bias: Value | None, residual: Value | None,
        head_dim: int, index: Value | None, count: None,
    ) -> Value:  # fmt: skip
        """A whole attention block."""
        *first, cos, sin, past_key, past_value, _, position, scale, _, _ = ctx
        inputs = (*first, weight_t, bias, residual, cos, sin, past_key, past_value, position,
                  self.frame["allowed"])  # fmt: skip
        shape = self.shape
        fixed = {"heads": shape.heads, "kv_heads": shape.kv_heads, "head_dim": head_dim,
                 "scale": scale}  # fmt: skip
        made: Sequence[Value]
        if self.step:
            kept = self._kept(index, shape.heads)
            made = self.node("SparseAttention", bodies.attention, (*inputs, kept), 3, fixed)
        else:
            made = bodies.attention(self.w, *inputs, **fixed, shared=self.shared)
        layer = past_key.split(".")[1]
        self._present |= {PRESENT.format(layer, kind): made[i + 1] for i, kind in enumerate(KINDS)}
        return made[0]

    def mlp(self, *args: Any) -> tuple[Value, Value | None]:
        """See `bodies.mlp`."""
        return self._mlp("SparseMLP", bodies.mlp, *args)

    def gated_mlp(self, *args: Any) -> tuple[Value, Value | None]:
        """See `bodies.gated_mlp`."""
        return self._mlp("SparseGatedMLP", bodies.gated_mlp, *args)

    def _mlp(self, kind: str, body: Callable[..., Any], *args: Any) -> tuple[Value, Value | None]:
        *inputs, activation, skip_zeros, index, _ = args
        fixed = {"activation": activation, "skip_zeros": skip_zeros}
        if not self.step:
            made: tuple[Value, Value | None] = body(self.w, *inputs, **fixed)
            return made
        y, rows = self.node(kind, body, (*inputs, self._kept(index, self.shape.ffn)), 2, fixed)
        return y, rows

    # And for what aten ops need more than a name.

    def shape_of(self, sizes: Sequence[Any]) -> Value:
        """A shape of numbers and of sizes int64 [1]."""
        if all(isinstance(size, int) for size in sizes):
            return self.w.ints(*sizes)
        parts = [self.w.ints(s) if isinstance(s, int) else s for s in sizes]
        return self.w.op("Concat", *parts, axis=0)

    def binary(self, kind: str, left: Value, right: Any) -> Value:
        """An operator of two tensors, or of one and a number."""
        if not isinstance(right, str):
            right = self.w.constant(right, np.int64 if isinstance(right, int) else np.float32)
        return self.w.op(kind, left, right)

    def cat(self, parts: Sequence[Any], dim: int = 0) -> Value | None:
        """Concatenation; of counts (see the class) nothing."""
        return None if None in parts else self.w.op("Concat", *parts, axis=dim)


def _unflatten(c: _Converter, x: Value, dim: int, sizes: Sequence[int]) -> Value:
    if dim != -1:
        raise PassError("only the last dimension is unflattened", got=dim)
    return c.w.op("Reshape", x, c.w.ints(0, 0, *sizes))


def _split(c: _Converter, x: Value, sizes: Sequence[int], dim: int) -> list[Value]:
    return c.w.nodes_of("Split", x, c.w.ints(*sizes), axis=dim, results=len(sizes))


#: How each operator of a program is written.
_TABLE: dict[Any, Callable[..., Any]] = {
    ops.linear.default: _Converter.linear,
    ops.rms_norm.default: _Converter.rms_norm,
    ops.select.default: _Converter.select,
    ops.select_above.default: _Converter.select_above,
    ops.sparse_qkv.default: _Converter.qkv,
    ops.decode_attention.default: _Converter.attention,
    ops.sparse_out_proj.default: _Converter.out_proj,
    ops.sparse_mlp.default: _Converter.mlp,
    ops.sparse_gated_mlp.default: _Converter.gated_mlp,
    aten.embedding.default: lambda c, weight, ids, *_: c.w.op("Gather", weight, ids),
    aten.layer_norm.default: lambda c, x, _, weight, bias, eps, *__: c.w.op(
        "LayerNormalization", x, weight, bias, axis=-1, epsilon=eps
    ),
    aten.to.dtype: lambda c, x, dtype: c.w.op("Cast", x, to=TYPES[dtype]),
    aten.add.Tensor: lambda c, *args: c.binary("Add", *args),
    aten.mul.Tensor: lambda c, *args: c.binary("Mul", *args),
    aten.relu.default: lambda c, x: c.w.op("Relu", x),
    aten.cos.default: lambda c, x: c.w.op("Cos", x),
    aten.sin.default: lambda c, x: c.w.op("Sin", x),
    aten.contiguous.default: lambda c, x: x,
    aten.cat.default: _Converter.cat,
    aten.unsqueeze.default: lambda c, x, dim: c.w.op("Unsqueeze", x, c.w.ints(dim)),
    aten.unflatten.int: _unflatten,
    aten.split_with_sizes.default: _split,
    aten.select.int: lambda c, x, dim, at: c.w.op(
        "Gather", x, c.w.constant(at, np.int64), axis=dim
    ),
    aten.unbind.int: lambda c, mask: None if mask is None else _Layers(mask),
    aten.sym_size.int: lambda c, x, dim: c.w.size(x, dim),
    aten.view.default: lambda c, x, sizes: c.w.op("Reshape", x, c.shape_of(sizes)),
}  # fmt: skip


def one_token(session: Session, program: Program) -> dict[fx.Node, Any]:
    """A program's values on meta tensors, for one token of one row."""
    shape, meta = session.shape, torch.device("meta")
    cache = torch.empty(1, shape.kv_heads, session.max_seq_len, shape.head_dim, device=meta)
    one = torch.empty(1, dtype=torch.int64, device=meta)
    values = {"input_ids": one[None], "position_ids": one[None], "start": one, "position": one}
    values |= {name: sets.to(meta) for name, sets in session.static_keep.items()}
    given = [session.tensors[name].to(meta) for name in program.weights]
    given += [values.get(name, cache) for name in program.inputs]
    placeholders = program.graph.find_nodes(op="placeholder")
    known: dict[fx.Node, Any] = dict(zip(placeholders, given, strict=True))
    for node in program.graph.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
    return known


def _value_infos(session: Session, names: Sequence[str]) -> list[onnx.ValueInfoProto]:
    """Types and shapes of the model's inputs and outputs."""
    shape = session.shape
    grid = ("batch", "sequence")
    known: dict[str, tuple[int, Sequence[str | int]]] = {
        "input_ids": (TensorProto.INT64, grid),
        "attention_mask": (TensorProto.INT64, ("batch", "total")),
        "position_ids": (TensorProto.INT64, grid),
        "logits": (TensorProto.FLOAT, (*grid, shape.vocab)),
        "head_keep": (TensorProto.BOOL, (shape.layers - 1, "batch", shape.heads)),
        "neuron_keep": (TensorProto.BOOL, (shape.layers, "batch", shape.ffn)),
        "rows": (TensorProto.INT32, (shape.layers, "batch")),
    }
    found = []
    for name in names:
        length = "past" if name.startswith("past") else "present"
        cache = (TensorProto.FLOAT, ("batch", shape.kv_heads, length, shape.head_dim))
        found.append(helper.make_tensor_value_info(name, *known.get(name, cache)))
    return found


def _graph(
    session: Session, title: str, w: Writer, values: Sequence[Value], names: Sequence[str]
) -> onnx.GraphProto:
    """A branch; its results are told by their place."""
    outputs = _value_infos(session, names)
    for output, value in zip(outputs, values, strict=True):
        output.name = value
    return helper.make_graph(w.nodes, title, [], outputs)


def _model(
    session: Session,
    w: Writer,
    names: Sequence[str],
    weights: Sequence[str] | Mapping[str, Any],
    functions: Mapping[str, onnx.FunctionProto],
) -> onnx.ModelProto:
    shape = session.shape
    pasts = [PAST.format(i, kind) for i in range(shape.layers) for kind in KINDS]
    inputs = _value_infos(session, [*INPUTS, *pasts])
    tensors = []
    for name in weights:
        value = session.tensors[name]
        tensor = TensorProto(name=name, data_type=TYPES[value.dtype], dims=[*value.shape])
        tensor.data_location = TensorProto.EXTERNAL
        tensors.append(tensor)
    graph = helper.make_graph(
        w.nodes, "shadowc", inputs, _value_infos(session, names), initializer=tensors
    )
    opsets = [helper.make_opsetid("", OPSET)]
    if functions:
        opsets.append(helper.make_opsetid(DOMAIN, ABI))
    model = helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSION, functions=[*functions.values()],
        producer_name=DOMAIN, producer_version=versions()["shadowc"],
    )  # fmt: skip
    return model
