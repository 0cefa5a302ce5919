"""What a model brings for ONNX Runtime's CUDA provider: a tensor of machine code and of plans.

    nodes of a step -> kernels/cuda/nodes.py on meta tensors -> launches -> tensor `kernels`, uint8

A plan is one node's launches, in order: which machine code, how many programs, and where each
parameter comes from. The library (`kernels/cpu/onnx_cuda.cpp`) knows the format below and the CUDA
driver, nothing of Triton. Numbers are int64, texts and code a length and bytes padded to 8:

    "shadowc1", sha256 of what follows, sections: for each GPU family its number and length, and
    code     [entry, threads, shared memory, machine code]
    sizes    scratch memory of a stream, and memory that is zero before and after every node
    plans    [op, inputs [type, [dims]], outputs [type, [dims]],
              launches [code, grid x 3, parameters [source, value]]]
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch import Tensor

from shadowc import cuda

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int32: TensorProto.INT32,
    torch.int64: TensorProto.INT64,
    torch.bool: TensorProto.BOOL,
}
FAMILIES = {"a100": 80, "rtx4090": 89, "h100": 90}
"""The GPUs that kernels are made for, and the compute capability of their families."""

_MAGIC = b"shadowc1"
_SLOTS, _TOTAL = -1, -2  # dimensions that are known when a node runs
_INPUT, _OUTPUT, _SCRATCH, _ZEROS, _NUMBER, _SLOTS_NOW, _FILLED_NOW = range(7)  # sources
_LONG = {"past_key": _SLOTS, "past_value": _SLOTS, "allowed": _TOTAL}  # by dimension 2
_DYNAMIC = {"slots": _SLOTS_NOW, "filled": _FILLED_NOW}  # parameters of those names
_ALIGNED = 256


@dataclass(frozen=True)
class Node:
    """A node as its plan needs it.

    Attributes:
        op: Name of the op.
        inputs: Meta tensors by name, in order; None for those that it does not have.
        attributes: What the op's function takes besides.
    """

    op: str
    inputs: Mapping[str, Tensor | None]
    attributes: Mapping[str, Any]

    @property
    def meaning(self) -> object:
        """Equal where plans are."""
        shapes = [None if t is None else (t.dtype, t.shape) for t in self.inputs.values()]
        return self.op, str(shapes), tuple(self.attributes.items())


@dataclass
class Plans:
    """The nodes of a model, each kind once."""

    nodes: list[Node] = field(default_factory=list)

    def add(self, node: Node) -> int:
        """The place of a node's plan."""
        meanings = [known.meaning for known in self.nodes]
        if node.meaning not in meanings:
            self.nodes.append(node)
            return len(meanings)
        return meanings.index(node.meaning)

    def tensor(self) -> np.ndarray[Any, Any]:
        """The tensor `kernels`: everything compiled, for every family."""
        sections = b"".join(
            _number(arch) + _bytes(self._section(cuda.find_profile(name)))
            for name, arch in FAMILIES.items()
        )
        content = _number(len(FAMILIES)) + sections
        whole = _MAGIC + hashlib.sha256(content).digest() + content
        return np.frombuffer(whole, np.uint8)

    def _section(self, profile: cuda.Profile) -> bytes:
        calls: list[list[cuda.Call]] = []
        memory = [_Memory(node) for node in self.nodes]
        # Other kernels come in between, so none may start before the one in front of it ends.
        with cuda.using(replace(profile, pdl=False), jit=None):
            found: cuda.Noted = {}
            for each in memory:
                calls.append([])
                with cuda.recording(calls[-1]) as noted:
                    each.run()
                found |= noted
        images = [
            cuda.compile_kernel(kernel, spec, profile.arch) for spec, kernel in found.values()
        ]
        places = {image.key: place for place, image in enumerate(images)}
        plans = [
            each.plan(launches, places, images)
            for each, launches in zip(memory, calls, strict=True)
        ]
        code = [
            _bytes(image.entry.encode()) + _number(32 * image.warps) + _number(image.shared)
            + _bytes(image.cubin)
            for image in images
        ]  # fmt: skip
        scratch, zeros = (max(sizes) for sizes in zip(*(m.sizes for m in memory), strict=True))
        return _list(code) + _number(scratch) + _number(zeros) + _list(plans)


class _Memory:
    """A node on meta tensors, and where the memory that it uses lies."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.outputs: list[Tensor] = []
        self.cache: list[Tensor] = []
        self.sizes = [0, 0]  # bytes of scratch memory and of zeros
        self._held: dict[int, tuple[int, int]] = {}
        self._kept: list[Tensor] = []  # so that no two have one address

    def run(self) -> None:
        """Launch what the node does."""
        from shadowc.kernels.cuda import nodes

        functions: dict[str, Callable[..., Any]] = {
            "Linear": nodes.linear,
            "SparseMLP": nodes.mlp,
            "SparseGatedMLP": nodes.gated_mlp,
            "SparseAttention": nodes.attention,
            "Select": nodes.select,
        }
        given: list[Any] = [
            None if t is None else torch.empty_like(t, device="meta")
            for t in self.node.inputs.values()
        ]
        own = [*given]
        if self.node.op == "SparseAttention":
            names = [*self.node.inputs]
            for name in ("past_key", "past_value"):  # in its place the present
                place = names.index(name)
                given[place] = torch.empty_like(given[place])
                self.cache.append(given[place])
            given[names.index("position")] = self.cache[0].shape[2] - 1
        made = functions[self.node.op](*given, **self.node.attributes)
        self.outputs = [*((made,) if isinstance(made, Tensor) else made), *self.cache]
        for source, tensors in ((_INPUT, own), (_OUTPUT, self.outputs)):
            for place, tensor in enumerate(tensors):
                if tensor is not None:
                    self._held[_storage(tensor)] = source, place
                    self._kept.append(tensor)

    def plan(
        self, calls: Sequence[cuda.Call], places: Mapping[str, int], images: Sequence[cuda.Image]
    ) -> bytes:
        """The node's plan; see the module."""
        launches = []
        for call in calls:
            image = images[places[call.key]]
            kinds = [kind for _, kind in image.spec.signature if kind != "constexpr"]
            parameters = [
                self._parameter(name, kind, value)
                for (name, value), kind in zip(call.args.items(), kinds, strict=True)
            ]
            parameters += [_number(_NUMBER) + _number(0)] * image.scratch
            grid = (*call.grid, *(1,) * (3 - len(call.grid)))
            launches.append(b"".join(map(_number, (places[call.key], *grid))) + _list(parameters))
        arguments = [
            _argument(tensor, _LONG.get(name)) for name, tensor in self.node.inputs.items()
        ]
        results = [
            _argument(tensor, _SLOTS if any(tensor is c for c in self.cache) else None)
            for tensor in self.outputs
        ]
        op = _bytes(self.node.op.encode())
        return op + _list(arguments) + _list(results) + _list(launches)

    def _parameter(self, name: str, kind: str, value: Tensor | float) -> bytes:
        if not isinstance(value, Tensor):
            if name in _DYNAMIC:
                return _number(_DYNAMIC[name]) + _number(0)
            if kind == "fp32":
                return _number(_NUMBER) + struct.pack("<f4x", value)
            return _number(_NUMBER) + _number(int(value))
        source, place = self._place(value)
        offset = int(value.storage_offset()) * value.element_size()
        at = place + offset if source in (_SCRATCH, _ZEROS) else place | offset << 8
        return _number(source) + _number(at)

    def _place(self, tensor: Tensor) -> tuple[int, int]:
        """Where a tensor's memory is: new memory if it was not met before."""
        storage = _storage(tensor)
        if storage not in self._held:
            zeros = tensor.dtype is torch.int32 and tensor.dim() == 1 and (
                tensor is cuda.counters(tensor.device, tensor.numel())
            )  # fmt: skip
            begin = self.sizes[zeros]
            size = -(-tensor.untyped_storage().nbytes() // _ALIGNED) * _ALIGNED
            self.sizes[zeros] += size
            self._held[storage] = (_ZEROS if zeros else _SCRATCH), begin
            self._kept.append(tensor)
        return self._held[storage]


def _argument(tensor: Tensor | None, dynamic: int | None) -> bytes:
    """Type and shape, in which dimension 2 may be dynamic."""
    if tensor is None:
        return _number(0) + _list([])
    dims = [*tensor.shape]
    if dynamic is not None:
        dims[2] = dynamic
    return _number(TYPES[tensor.dtype]) + _list([_number(dim) for dim in dims])


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _number(value: int) -> bytes:
    return struct.pack("<q", value)


def _bytes(value: bytes) -> bytes:
    return _number(len(value)) + value + bytes(-len(value) % 8)


def _list(values: Sequence[bytes]) -> bytes:
    return _number(len(values)) + b"".join(values)
