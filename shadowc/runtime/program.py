"""An executable graph as JSON: what a `programs/*.json` file holds and how it runs.

A program is a list of calls to `aten::` and `shadowc::` operators over named weights and inputs.
The format names operators, never code: nothing is imported or evaluated from a file, and an
operator outside a list of those that the passes emit is refused (aten alone has some that read
files or look beyond a tensor). torch.export's own archive is not used because it stores example
inputs as a pickle and takes seconds to load.

A graph becomes a function by fx's generated source text. So every name that reaches it is checked
here: inputs, keywords, and the texts among constants.
"""

from __future__ import annotations

import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shadowc.errors import ArtifactError
from shadowc.native import CPU_LAUNCHERS

#: The operators of aten that programs call: what the passes leave of OPT and Llama (`matmul` with
#: torch 2.11).
_ATEN = frozenset(
    """
    __and__.Tensor __or__.Tensor add.Tensor alias.default amin.default bitwise_not.default
    cat.default clamp.default contiguous.default cos.default cumsum.default embedding.default
    eq.Tensor expand.default expand_as.default flatten.using_ints gather.default gelu.default
    gt.Tensor layer_norm.default le.Tensor linear.default lt.Scalar masked_fill.Scalar
    matmul.default mean.dim mul.Tensor nan_to_num.default neg.default new_empty.default
    new_zeros.default ones_like.default pow.Tensor_Scalar relu.default reshape.default
    rsqrt.default rsub.Scalar scaled_dot_product_attention.default select.int silu.default
    sin.default slice.Tensor split_with_sizes.default stack.default sum.dim_IntList sym_size.int
    t.default to.dtype topk.default transpose.int unbind.int unflatten.int unsqueeze.default
    view.default view_as.default zeros_like.default
    """.split()
)  # fmt: skip
_PYTHON = {"operator.getitem": operator.getitem}
_CONSTANTS = (torch.dtype, torch.memory_format)
_KNOWN_CONSTANTS = {
    str(value).removeprefix("torch."): value
    for value in (
        torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32,
        torch.bool, torch.contiguous_format, torch.preserve_format,
    )
}  # fmt: skip
_PLACES = ("device", "layout", "out")  # keywords: results are where the tensors are
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]{0,200}")
_INTEGERS = range(-(1 << 63), 1 << 63)


@dataclass(frozen=True)
class Program:
    """A graph whose weights are bound by name.

    Attributes:
        inputs: Names of the inputs, in calling order.
        outputs: Names of the results, in order.
        weights: Names of the tensors it reads, in the order of the graph's first placeholders.
        graph: The graph; its placeholders are the weights, then the inputs.
        source: The file that it was read from, for errors.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    graph: fx.Graph
    source: str = "the program"

    def bind(self, tensors: Mapping[str, Tensor]) -> Callable[..., tuple[Any, ...]]:
        """A function of the inputs alone, with the weights looked up once.

        Raises:
            ArtifactError: If a weight is missing.
        """
        missing = [name for name in self.weights if name not in tensors]
        if missing:
            raise ArtifactError(
                f"{self.source} needs tensors that the artifact lacks", got=missing[:3]
            )
        values = tuple(tensors[name] for name in self.weights)
        on_cpu = all(value.device.type == "cpu" for value in values)
        module = fx.GraphModule(torch.nn.Module(), _direct(self.graph) if on_cpu else self.graph)
        run = module.forward  # the generated function itself: no nn.Module call overhead
        return lambda *inputs: run(*values, *inputs)

    def first_not_finite(
        self, tensors: Mapping[str, Tensor], inputs: Sequence[Tensor]
    ) -> str | None:
        """Run operator by operator, and name the first result that is not finite.

        Minus infinity is what masks of attention are made of: it counts only if nothing else does.

        Args:
            tensors: Weights by name.
            inputs: The inputs, which are written as by a run.

        Returns:
            Operator, and the weights by which it is found in the model; None if all are finite.
        """
        found: list[str | None] = [None, None]
        weights = dict(zip(self.graph.find_nodes(op="placeholder"), self.weights, strict=False))

        class Watched(fx.Interpreter):  # type: ignore[misc]
            def run_node(self, node: fx.Node) -> Any:
                value = super().run_node(node)
                parts = value if isinstance(value, (list, tuple)) else (value,)
                for part in parts if node.op == "call_function" else ():
                    if isinstance(part, Tensor) and part.is_floating_point():
                        wrong = part[~part.isfinite()]
                        kind = int(bool((wrong == -torch.inf).all()))
                        if wrong.numel() and found[kind] is None:
                            found[kind] = f"first in {_described(node, weights)}"
                return value

        values = [tensors[name] for name in self.weights]
        Watched(fx.GraphModule(torch.nn.Module(), self.graph)).run(*values, *inputs)
        return found[0] or found[1]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `Program.from_json` reads them back."""
        nodes = [_encode_node(node) for node in self.graph.nodes if node.op == "call_function"]
        (returned,) = self.graph.output_node().args
        return {
            "inputs": list(self.inputs),
            "outputs": list(self.outputs),
            "weights": list(self.weights),
            "nodes": nodes,
            "returns": _encode(returned),
        }

    @staticmethod
    def from_json(value: Mapping[str, Any], source: str = "program") -> Program:
        """Rebuild a program.

        Args:
            value: What `to_json` gave.
            source: Name of the file, for errors.

        Raises:
            ArtifactError: If it is malformed or names an operator that programs may not call.
        """
        graph = fx.Graph()
        names: dict[str, fx.Node] = {}
        try:
            if value.keys() != {"inputs", "outputs", "weights", "nodes", "returns"}:
                raise ValueError(f"entries {', '.join(value)}")
            inputs, outputs, weights = (
                _names(value[key]) for key in ("inputs", "outputs", "weights")
            )
            for i, _ in enumerate(weights):
                names[f"w{i}"] = graph.placeholder(f"w{i}")
            for name in inputs:
                names[_new(name, names)] = graph.placeholder(name)
            for node in _list(value["nodes"]):
                target = _operator(node["target"])
                args = _decode(_list(node["args"]), names)
                kwargs = _decode(node["kwargs"], names)
                if not isinstance(kwargs, dict):
                    raise TypeError(f"keywords {node['kwargs']!r:.80}")
                name = _new(node["name"], names)
                names[name] = graph.call_function(target, tuple(args), kwargs)
            returns = _decode(_list(value["returns"]), names)
            if len(returns) != len(outputs):
                raise ValueError(f"{len(returns)} results for {len(outputs)} names")
            graph.output(tuple(returns))
            return Program(inputs, outputs, weights, graph, source)
        except (
            KeyError, TypeError, AttributeError, ValueError, OverflowError, RecursionError,
        ) as error:  # fmt: skip
            raise ArtifactError(
                f"{source} is not a program that this version can run",
                got=f"{type(error).__name__}: {error}"[:300],
                fix="compile the artifact again with this version of shadowc",
            ) from error


def to_program(module: fx.GraphModule, outputs: Sequence[str]) -> Program:
    """Lift a graph's weights into leading inputs.

    Args:
        module: A packed graph module.
        outputs: Names of its results.

    Returns:
        The program, which holds no tensor.
    """
    weights = list(
        dict.fromkeys(str(n.target) for n in module.graph.nodes if n.op == "get_attr" and n.users)
    )
    graph = fx.Graph()
    lifted = {name: graph.placeholder(f"w{i}") for i, name in enumerate(weights)}
    values: dict[fx.Node, fx.Node] = {}
    inputs = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            if node.users:
                values[node] = lifted[str(node.target)]
        elif node.op == "placeholder":
            values[node] = graph.placeholder(node.name)
            inputs.append(node.name)
        elif node.op == "output":
            graph.output(fx.map_arg(node.args[0], lambda n: values[n]))
        else:
            values[node] = graph.node_copy(node, lambda n: values[n])
    graph.lint()
    return Program(tuple(inputs), tuple(outputs), tuple(weights), graph)


def _described(node: fx.Node, weights: Mapping[fx.Node, str]) -> str:
    """A node by its operator and the closest weights before it."""
    ahead, seen = [node], {node}
    while ahead:
        if names := [weights[one] for one in ahead if one in weights]:
            layer = re.search(r"\blayers\.(\d+)\.", names[0])
            place = f"layer {layer[1]}" if layer else "no layer"
            return f"{place}, at {node.name} ({', '.join(names[:3])})"
        ahead = [one for each in ahead for one in each.all_input_nodes if one not in seen]
        seen.update(ahead)
    name: str = node.name
    return name


def _direct(graph: fx.Graph) -> fx.Graph:
    """The graph with the CPU launchers of our ops in their place.

    A call takes 3.5 us of Python then instead of 5, 10 where it has lists of tensors: a decode step
    of smollm2-135m has 212, so that it takes 0.5 of 10 ms less.
    """
    direct = fx.Graph()
    direct.output(direct.graph_copy(graph, {}))
    for node in direct.nodes:
        if getattr(node.target, "namespace", "") == "shadowc":
            node.target = CPU_LAUNCHERS[node.target._opname]
    return direct


def _encode_node(node: fx.Node) -> dict[str, Any]:
    return {
        "name": node.name,
        "target": _target_name(node.target),
        "args": _encode(node.args),
        "kwargs": _encode(node.kwargs),
    }


def _target_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        name = f"{target._opname}.{target._overloadname}"
        if target.namespace == "shadowc" or (target.namespace == "aten" and name in _ATEN):
            return f"{target.namespace}.{name}"
    for name, function in _PYTHON.items():
        if target is function:
            return name
    raise ArtifactError(
        f"a program cannot call {target}", expected="one of _ATEN, or an op of shadowc"
    )


def _operator(name: str) -> Callable[..., Any]:
    if name in _PYTHON:
        return _PYTHON[name]
    namespace, _, rest = name.partition(".")
    if namespace == "aten" and rest in _ATEN:
        if rest == "new_empty.default":  # what was in that memory is nobody's business
            rest = "new_zeros.default"
        op, _, overload = rest.partition(".")
        found: Callable[..., Any] = getattr(getattr(torch.ops.aten, op), overload)
        return found
    op, _, overload = rest.partition(".")
    if namespace == "shadowc" and op in CPU_LAUNCHERS and overload == "default":
        found = getattr(torch.ops.shadowc, op).default
        return found
    raise ValueError(f"operator {name[:80]}")


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{type(value).__name__} in place of a list")
    return value


def _names(value: Any) -> tuple[str, ...]:
    """Names, each once."""
    found = tuple(_name(name) for name in _list(value))
    if len({*found}) != len(found):
        raise ValueError("a name twice")
    return found


def _name(value: Any) -> str:
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise ValueError(f"name {value!r:.80}")
    return value


def _new(name: Any, names: Mapping[str, Any]) -> str:
    """A name of a node, which none has yet."""
    if name in names or not _name(name).isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"name {name!r:.80}")
    return str(name)


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"map": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, _CONSTANTS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, float) and math.isinf(value):  # JSON has none
        return {"infinity": 1 if value > 0 else -1}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ArtifactError(f"a program cannot hold a {type(value).__name__}", got=value)


def _decode(value: Any, names: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, names) for item in value]
    if isinstance(value, str):
        return _name(value)
    if isinstance(value, int) and value not in _INTEGERS:
        raise ValueError(f"number {value:.20e}")
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return names[inner]
    if kind == "map":
        for key in inner:
            if not _name(key).isidentifier() or keyword.iskeyword(key) or key in _PLACES:
                raise ValueError(f"keyword {key[:80]}")
        return {key: _decode(item, names) for key, item in inner.items()}
    if kind == "infinity" and inner in (1, -1):
        return math.inf * inner
    if kind == "torch":
        return _KNOWN_CONSTANTS[inner]
    raise ValueError(f"constant {kind[:80]}")
