"""An executable graph as JSON: what a `programs/*.json` file holds and how it runs.

A program is a list of calls to `aten::` and `shadowc::` operators (and Python arithmetic on sizes)
over named weights and inputs. The format names operators, never code: nothing is imported or
evaluated from a file, and an operator outside these namespaces is refused. torch.export's own
archive is not used because it stores example inputs as a pickle and takes seconds to load.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from shadowc.errors import ArtifactError
from shadowc.native import CPU_LAUNCHERS

_NAMESPACES = ("aten", "shadowc")
_PYTHON = {
    f"operator.{f.__name__}": f
    for f in (operator.getitem, operator.add, operator.sub, operator.mul, operator.floordiv,
              operator.neg, operator.mod)
}  # fmt: skip
_CONSTANTS = (torch.dtype, torch.layout, torch.memory_format)


@dataclass(frozen=True)
class Program:
    """A graph whose weights are bound by name.

    Attributes:
        inputs: Names of the inputs, in calling order.
        outputs: Names of the results, in order.
        weights: Names of the tensors it reads, in the order of the graph's first placeholders.
        graph: The graph; its placeholders are the weights, then the inputs.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: tuple[str, ...]
    graph: fx.Graph

    def bind(self, tensors: Mapping[str, Tensor]) -> Callable[..., tuple[Any, ...]]:
        """A function of the inputs alone, with the weights looked up once.

        Raises:
            ArtifactError: If a weight is missing.
        """
        missing = [name for name in self.weights if name not in tensors]
        if missing:
            raise ArtifactError(
                "the program needs tensors that the artifact lacks", got=missing[:3]
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
            for i, _ in enumerate(value["weights"]):
                names[f"w{i}"] = graph.placeholder(f"w{i}")
            for name in value["inputs"]:
                names[name] = graph.placeholder(name)
            for node in value["nodes"]:
                target = _operator(node["target"])
                args = _decode(node["args"], names)
                kwargs = _decode(node["kwargs"], names)
                names[node["name"]] = graph.call_function(target, tuple(args), kwargs)
            graph.output(tuple(_decode(value["returns"], names)))
            return Program(
                tuple(value["inputs"]), tuple(value["outputs"]), tuple(value["weights"]), graph
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ArtifactError(
                f"{source} is not a program that this version can run",
                got=f"{type(error).__name__}: {error}",
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
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return f"{target.namespace}.{target._opname}.{target._overloadname}"
    for name, function in _PYTHON.items():
        if target is function:
            return name
    raise ArtifactError(f"a program cannot call {target}", expected=", ".join(_NAMESPACES))


def _operator(name: str) -> Callable[..., Any]:
    if name in _PYTHON:
        return _PYTHON[name]
    namespace, op, overload = name.split(".")
    if namespace not in _NAMESPACES:
        raise ValueError(f"operator {name}")
    found: Callable[..., Any] = getattr(getattr(getattr(torch.ops, namespace), op), overload)
    return found


def _encode(value: Any) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, (list, tuple)):
        return [_encode(item) for item in value]
    if isinstance(value, dict):
        return {"map": {key: _encode(item) for key, item in value.items()}}
    if isinstance(value, _CONSTANTS):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": value.type}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise ArtifactError(f"a program cannot hold a {type(value).__name__}", got=value)


def _decode(value: Any, names: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, names) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        return names[inner]
    if kind == "map":
        return {key: _decode(item, names) for key, item in inner.items()}
    if kind == "device":
        return torch.device(inner)
    constant = getattr(torch, inner)
    if kind != "torch" or not isinstance(constant, _CONSTANTS):
        raise ValueError(f"constant {inner}")
    return constant
