"""What each `shadowc` op means, in plain ONNX operators.

Written once and used twice: as the model-local function that a custom node falls back to where no
library is registered, and in line where nothing is skipped (a prompt, the dense model). Activations
are fp32 [B, T, C]; matrices of another type are cast. A keep set is one mask bool [1 or B, N], so
every product is whole and what is not kept is set to zero: the semantics, not the speed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Value = str
"""Name of a tensor in the graph."""

DOMAIN = "shadowc"


class Writer:
    """Nodes of an ONNX graph or function, in order.

    Args:
        prefix: Begins the name of every value made here: a subgraph sees the names around it.
        half: Whether matrices are stored in another type than fp32.
        narrow: Whether a product is then one of that type, as GPUs have them; else the matrix is
            brought to fp32.
    """

    def __init__(self, prefix: str = "", *, half: bool = False, narrow: bool = False) -> None:
        self.prefix, self.half, self.narrow = prefix, half, narrow
        self.nodes: list[onnx.NodeProto] = []
        self._made: dict[object, Value] = {}

    def nodes_of(
        self, kind: str, *inputs: Value | None, results: int, domain: str = "", **attributes: Any
    ) -> list[Value]:
        """Add a node of several results."""
        name = f"{self.prefix}{kind}_{len(self.nodes)}"
        outputs = [name if results == 1 else f"{name}.{i}" for i in range(results)]
        names = [value or "" for value in inputs]
        node = helper.make_node(kind, names, outputs, name=name, domain=domain, **attributes)
        self.nodes.append(node)
        return outputs

    def op(self, kind: str, *inputs: Value | None, **attributes: Any) -> Value:
        """Add a node of one result."""
        return self.nodes_of(kind, *inputs, results=1, **attributes)[0]

    def once(self, key: object, make: Callable[[], Value]) -> Value:
        """A value that is made where it is first needed."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def constant(self, value: Any, dtype: Any) -> Value:
        """A constant tensor."""
        array = np.asarray(value, dtype)
        key = (array.tobytes(), array.shape, array.dtype.str)
        tensor = numpy_helper.from_array(array)
        return self.once(key, lambda: self.op("Constant", value=tensor))

    def ints(self, *values: int) -> Value:
        """A constant int64 [n]."""
        return self.constant(values, np.int64)

    def attribute(self, name: str) -> Value:
        """An integer attribute of the function that is being written, int64 []."""

        def make() -> Value:
            value = self.op("Constant", value_int=0)
            (written,) = self.nodes[-1].attribute
            written.Clear()
            written.name, written.type = "value_int", onnx.AttributeProto.INT
            written.ref_attr_name = name
            return value

        return self.once(("attribute", name), make)

    def size(self, x: Value, dim: int) -> Value:
        """One dimension, int64 [1]."""
        return self.op("Shape", x, start=dim, end=dim + 1)

    def grid(self, x: Value, *tail: int) -> Value:
        """The shape [B, T, *tail]; B and T are those of every activation of a graph."""
        lead = self.once("lead", lambda: self.op("Shape", x, start=0, end=2))
        whole = self.once(("grid", tail), lambda: self.op("Concat", lead, self.ints(*tail), axis=0))
        return whole

    def product(
        self, kind: str, x: Value, weight: Value, bias: Value | None = None, **attributes: Any
    ) -> Value:
        """The Gemm or MatMul of fp32 x with a weight, in fp32."""
        if self.half and self.narrow:
            y = self.op(kind, self.op("CastLike", x, weight), weight, **attributes)
            return self.add(self.op("Cast", y, to=TensorProto.FLOAT), bias)
        matrix = self.op("Cast", weight, to=TensorProto.FLOAT) if self.half else weight
        return self.op(kind, x, matrix, *([bias] if bias else []), **attributes)

    def add(self, *values: Value | None) -> Value:
        """The sum of those that are there."""
        first, *others = (value for value in values if value is not None)
        for other in others:
            first = self.op("Add", first, other)
        return first


def linear(
    w: Writer, x: Value, weight: Value, bias: Value | None, tail: Sequence[int] = (-1,)
) -> Value:
    """x weight^T + bias, weight [O, C], as [B, T, *tail]; Gemm takes the weight as it is stored."""
    flat = w.op("Flatten", x, axis=2)
    y = w.product("Gemm", flat, weight, bias, transB=1)
    return w.op("Reshape", y, w.grid(x, *tail))


def rms_norm(w: Writer, x: Value, weight: Value, eps: float) -> Value:
    """See `kernels/rms_norm.py`; in the form that ONNX Runtime fuses."""
    square = w.op("Pow", x, w.constant(2.0, np.float32))
    mean = w.op("ReduceMean", square, w.ints(-1), keepdims=1)
    root = w.op("Sqrt", w.op("Add", mean, w.constant(eps, np.float32)))
    return w.op("Mul", w.op("Div", x, root), weight)


def activate(w: Writer, x: Value, activation: str) -> Value:
    """relu, silu or the exact gelu."""
    if activation == "relu":
        return w.op("Relu", x)
    if activation == "silu":
        return w.op("Mul", x, w.op("Sigmoid", x))
    erf = w.op("Erf", w.op("Mul", x, w.constant(math.sqrt(0.5), np.float32)))
    half = w.op("Mul", x, w.constant(0.5, np.float32))
    return w.op("Mul", half, w.op("Add", erf, w.constant(1.0, np.float32)))


def mlp(
    w: Writer,
    x: Value,
    w1: Value,
    b1: Value | None,
    w2t: Value,
    b2: Value | None,
    residual: Value | None,
    keep: Value | None = None,
    *,
    activation: str,
    skip_zeros: bool,
) -> tuple[Value, Value | None]:
    """See `kernels/sparse_mlp.py`."""
    hidden = activate(w, linear(w, x, w1, b1), activation)
    return _second(w, hidden, w2t, b2, residual, keep, skip_zeros)


def gated_mlp(
    w: Writer,
    x: Value,
    gate: Value,
    up: Value,
    downt: Value,
    residual: Value | None,
    keep: Value | None = None,
    *,
    activation: str,
    skip_zeros: bool,
) -> tuple[Value, Value | None]:
    """See `kernels/sparse_gated_mlp.py`."""
    hidden = activate(w, linear(w, x, gate, None), activation)
    hidden = w.op("Mul", hidden, linear(w, x, up, None))
    return _second(w, hidden, downt, None, residual, keep, skip_zeros)


def _second(
    w: Writer,
    hidden: Value,
    weight_t: Value,
    bias: Value | None,
    residual: Value | None,
    keep: Value | None,
    skip_zeros: bool,
) -> tuple[Value, Value | None]:
    """Second projection, and rows int32 [1, B] that it reads where not all are kept."""
    rows = None
    if keep is not None:
        zero = w.constant(0.0, np.float32)
        hidden = w.op("Where", w.op("Unsqueeze", keep, w.ints(1)), hidden, zero)
        if skip_zeros:
            kept = w.op("Not", w.op("Equal", hidden, zero))
        else:
            kept = w.op("Expand", w.op("Unsqueeze", keep, w.ints(1)), w.op("Shape", hidden))
        count = w.op("Cast", kept, to=TensorProto.INT32)
        rows = w.op("ReduceSum", count, w.ints(1, 2), keepdims=0)
        rows = w.op("Unsqueeze", rows, w.ints(0))
    return w.add(w.product("MatMul", hidden, weight_t), bias, residual), rows


def attention(
    w: Writer,
    x: Value,
    wq: Value,
    bq: Value | None,
    wk: Value,
    bk: Value | None,
    wv: Value,
    bv: Value | None,
    wot: Value,
    bo: Value | None,
    residual: Value | None,
    cos: Value | None,
    sin: Value | None,
    past_key: Value,
    past_value: Value,
    position: Value,
    allowed: Value,
    keep: Value | None = None,
    *,
    heads: int,
    kv_heads: int,
    head_dim: int,
    scale: float,
    shared: bool = False,
) -> tuple[Value, Value, Value]:
    """See `kernels/sparse_qkv.py`, `decode_attention.py` and `sparse_out_proj.py`.

    Args:
        w: Where to write.
        x: fp32 [B, T, C], and then weights as in `sparse_qkv` and `sparse_out_proj`.
        wq: [H*D, C], and so on.
        bq: [H*D], and so on.
        wk: [G*D, C].
        bk: [G*D].
        wv: [G*D, C].
        bv: [G*D].
        wot: [H*D, C].
        bo: [C].
        residual: fp32 [B, T, C].
        cos: fp32 [B, T, D], with `sin`.
        sin: fp32 [B, T, D].
        past_key: fp32 [B, G, P, D].
        past_value: fp32 [B, G, P, D].
        position: int64 [1], slot of the first new token: how much of the past is filled.
        allowed: bool [B, T, position + T], the slots that each token sees.
        keep: Heads that run; None: all.
        heads: H.
        kv_heads: G.
        head_dim: D.
        scale: Of the scores.
        shared: Whether P may be more than `position`: buffers sized for the whole sequence, with
            present in the place of past. Without it P = position, and present is longer by T.

    Returns:
        y fp32 [B, T, C], present key and value.
    """

    def rotate(y: Value) -> Value:
        if cos is None or sin is None:
            return y
        first, second = w.nodes_of("Split", y, axis=-1, num_outputs=2, results=2)
        turned = w.op("Concat", w.op("Neg", second), first, axis=-1)
        straight, turn = (w.op("Unsqueeze", angle, w.ints(2)) for angle in (cos, sin))
        return w.add(w.op("Mul", y, straight), w.op("Mul", turned, turn))

    def turn(y: Value) -> Value:
        return w.op("Transpose", y, perm=[0, 2, 1, 3])

    query, key, value = (
        linear(w, x, weight, bias, (-1, head_dim))
        for weight, bias in ((wq, bq), (wk, bk), (wv, bv))
    )
    query = w.op("Mul", rotate(query), w.constant(scale, np.float32))
    query, key, value = turn(query), turn(rotate(key)), turn(value)  # [B, heads, T, D]
    seen, present = [], []
    for past, new in ((past_key, key), (past_value, value)):
        filled = w.op("Slice", past, w.ints(0), position, w.ints(2)) if shared else past
        whole = w.op("Concat", filled, new, axis=2)
        seen.append(whole)
        if shared:
            end = w.op("Add", position, w.size(new, 2))
            rest = w.op("Slice", past, end, w.ints(np.iinfo(np.int64).max), w.ints(2))
            whole = w.op("Concat", whole, rest, axis=2)
        present.append(whole)
    may = w.op("Unsqueeze", allowed, w.ints(1))  # [B, 1, T, S]
    if heads > kv_heads:  # the query heads of a group lie one after the other
        query = w.op("Reshape", query, w.ints(0, kv_heads, -1, head_dim))
        may = w.op("Concat", *[may] * (heads // kv_heads), axis=2)
    scores = w.op("MatMul", query, w.op("Transpose", seen[0], perm=[0, 1, 3, 2]))
    # Not -inf: the padding in front of a prompt sees nothing at all.
    lowest = w.constant(np.finfo(np.float32).min, np.float32)
    weights = w.op("Softmax", w.op("Where", may, scores, lowest), axis=-1)
    context = w.op("MatMul", weights, seen[1])
    if heads > kv_heads:
        context = w.op("Reshape", context, w.ints(0, heads, -1, head_dim))
    context = turn(context)  # [B, T, H, D]
    if keep is not None:
        runs = w.op("Unsqueeze", keep, w.ints(1, 3))
        context = w.op("Where", runs, context, w.constant(0.0, np.float32))
    context = w.op("Reshape", context, w.ints(0, 0, heads * head_dim))
    y = w.add(w.product("MatMul", context, wot), bo, residual)
    return y, present[0], present[1]


def select(w: Writer, scores: Value, *, local: bool) -> Value:
    """See `kernels/select.py`: scores fp32 [B, L, N] -> mask bool [L, B, N].

    Only as the body of a function: `keep` and `floor` are its attributes. Equal scores go to the
    lowest index, as TopK has it.
    """
    infinity = w.constant(np.inf, np.float32)
    scores = w.op("Where", w.op("IsNaN", scores), infinity, scores)
    keep, layers = w.op("Reshape", w.attribute("keep"), w.ints(-1)), w.size(scores, 1)
    each = w.op("Div", keep, layers) if local else w.op("Reshape", w.attribute("floor"), w.ints(-1))

    def mark(mask: Value, values: Value, k: Value, updates: Value | None = None) -> Value:
        _, index = w.nodes_of("TopK", values, k, axis=-1, results=2)
        size = w.op("Shape", index)
        if updates is None:
            updates = w.constant([True], np.bool_)
        return w.op("ScatterElements", mask, index, w.op("Expand", updates, size), axis=-1)

    none = w.op("Expand", w.constant([False], np.bool_), w.op("Shape", scores))
    own = mark(none, scores, each)
    others = w.op("Where", own, w.op("Neg", infinity), scores)
    if local:  # one more in the first layers
        zero, one = (w.constant(value, np.int64) for value in (0, 1))
        index = w.op("Range", zero, w.op("Squeeze", layers), one)
        more = w.op("Less", index, w.op("Mod", keep, layers))
        mask = mark(own, others, w.ints(1), w.op("Unsqueeze", more, w.ints(0, 2)))
    else:
        left = w.op("Sub", keep, w.op("Mul", layers, each))
        own, others = (w.op("Reshape", value, w.ints(0, -1)) for value in (own, others))
        mask = w.op("Reshape", mark(own, others, left), w.op("Shape", scores))
    return w.op("Transpose", mask, perm=[1, 0, 2])
