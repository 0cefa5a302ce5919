"""What a program of a file may do, found out before it runs: its names, its shapes, its memory.

A program is run twice on tensors without memory (`meta`) with the inputs that a session gives it:
for one row of a token or two, and for `_ROWS` of `_TOKENS`, numbers that no artifact chooses. What
it would hold at once must stay within a bound that follows from the artifact's weights: twice their
size, and what activations of such a model take. So must what each operator takes for itself beside
its result. What other numbers of rows and tokens take is not looked at, nor is time. Its results
must be those that a session takes from it, and an operator that writes into a tensor gets a cache,
what lazy programs remember, or what the program has made itself.
"""

from __future__ import annotations

import itertools
import math
import operator
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from shadowc.config import ModelShape
from shadowc.errors import ArtifactError
from shadowc.kernels.lazy_qkv import WINDOW
from shadowc.runtime.lazy import CATCH_UP, LAZY
from shadowc.runtime.program import Program
from shadowc.runtime.session import PROGRAMS

_ROWS, _TOKENS = 8, 128  # the second check's
_BASE = 64 << 20
_KEEP = "keep."
_PARTS = 1 << 13  # tensors that one tensor may be taken apart into
_TENSORS_AT_ONCE = 32  # of the size of a layer's or the predictor's activations
_STEPS = ("decode", "hold", "exact", "full", *LAZY.values())
_HOLDS = ("hold", "lazy_hold")
_LAZY = (*LAZY.values(), CATCH_UP)

#: The order of a program's inputs, by the kinds of its names.
_INPUTS = {
    "masked": re.compile(r"input_ids position_ids attention_mask( mask_source)?"),
    CATCH_UP: re.compile(r"position((?: (?:window|moments|filled)_\d{1,4}| turns)*)(.*)"),
}
_STEP_INPUTS = re.compile(
    r"input_ids position_ids start position"
    r"(?P<keep>(?: (?:head|neuron)_(?:index|count))*)"
    r"(?P<lazy>(?: (?:window|moments|filled)_\d{1,4}| turns)*)(?P<caches>(?: [kv]_cache_\d{1,4})*)"
)
_WRITTEN = re.compile(r"[kv]_cache_\d{1,4}|(window|moments|filled)_\d{1,4}|turns")
_OUTPUT = re.compile(
    r"logits|(head|neuron)_(index|count|mask)|(rows|computed)_\d{1,4}|[a-z][a-z0-9_]{0,40}"
)


def check_programs(
    path: Path,
    programs: Mapping[str, Program],
    shape: ModelShape,
    tensors: Mapping[str, Tensor],
    max_seq_len: int,
) -> None:
    """Raise unless these programs are of the kinds that sessions run, and within their memory.

    Args:
        path: The artifact's directory, for errors.
        programs: By name.
        shape: What the manifest says of the model.
        tensors: The artifact's, of which types and shapes count.
        max_seq_len: S.

    Raises:
        ArtifactError: Names the file of the program, and what it does.
    """
    meta = {name: value.to("meta") for name, value in tensors.items()}
    size = sum(value.numel() * value.element_size() for value in tensors.values())
    values = sum(value.numel() for value in tensors.values())
    least = shape.layers * shape.layer_elements + shape.vocab * shape.hidden
    if values < least:
        raise ArtifactError(
            f"{path / 'manifest.json'} is damaged or not of this version",
            expected=f"the shape of a model with at most {values} weights",
            got=f"{least}: {shape}",
            fix="compile the artifact again",
        )
    _check_keep(path, meta, tensors, shape)
    if "dense" not in programs:
        raise ArtifactError(f"{path / 'programs'} lacks dense.json, the program of prompts")
    for name, program in programs.items():
        file = path / program.source
        try:
            if name not in PROGRAMS:
                raise ValueError(f"no program has the name {name}")
            _check_inputs(name, program, shape)
            missing = [key for key in program.weights if key not in meta]
            if missing:
                raise ValueError(f"needs {missing[0]}, which the artifact lacks")
            few, many = (1, 1) if name in _STEPS else (min(max_seq_len, n) for n in (2, _TOKENS))
            for rows, tokens in ((1, few),) if name in _LAZY else ((1, few), (_ROWS, many)):
                run = _Run(shape, rows, tokens, min(max_seq_len, _TOKENS), size, meta)
                run.check(name, program)
        except Exception as error:  # a stranger's program may fail in any way
            raise ArtifactError(
                f"{file} is not a program that this version can run",
                got=f"{type(error).__name__}: {error}"[:400],
                fix="compile the artifact again with this version of shadowc",
            ) from error


def _check_keep(
    path: Path, meta: Mapping[str, Tensor], tensors: Mapping[str, Tensor], shape: ModelShape
) -> None:
    """Keep sets that never change: their shapes, and that they name units that there are."""
    file = path / "predictor.safetensors"
    known = {f"{_KEEP}{kind}_{part}" for kind in ("head", "neuron") for part in ("index", "count")}
    if others := sorted(name for name in tensors if name.startswith(_KEEP) and name not in known):
        raise ArtifactError(
            f"{file} is damaged or not of this version",
            expected=f"keep sets: {', '.join(sorted(known))}",
            got=others[0][:80],
            fix="compile the artifact again",
        )
    for kind, units in (("head", shape.heads), ("neuron", shape.ffn)):
        names = [f"{_KEEP}{kind}_{part}" for part in ("index", "count")]
        found = [tensors.get(name) for name in names]
        index, count = found
        if index is None and count is None:
            continue
        fits = index is not None and count is not None
        if index is not None and count is not None:
            layers = index.shape[0] if index.dim() == 3 else -1
            fits = (
                layers in (shape.layers - 1, shape.layers)
                and index.shape == (layers, 1, units)
                and count.shape == (layers, 1)
                and index.dtype is torch.int32
                and count.dtype is torch.int32
                and bool(((count >= 0) & (count <= units)).all())
            )
            if fits:
                kept = torch.arange(units) < count[..., None]
                rises = (index[..., 1:] > index[..., :-1]) | ~kept[..., 1:]
                inside = ((index >= 0) & (index < units)) | ~kept
                fits = bool(rises.all()) and bool(inside.all())
        if not fits:
            raise ArtifactError(
                f"{file} is damaged or not of this version",
                expected=f"ascending units of {units} as {' and '.join(names)}",
                fix="compile the artifact again",
            )


def _check_inputs(name: str, program: Program, shape: ModelShape) -> None:
    """Raise ValueError unless a session can give a program its inputs, and take its results."""
    text = " ".join(program.inputs)
    caches = [f"{kind}_cache_{layer}" for layer in range(shape.layers) for kind in "kv"]
    if name == "masked":
        fits = _INPUTS[name].fullmatch(text) is not None
    elif name == CATCH_UP:
        fits = _INPUTS[name].fullmatch(text) is not None
        fits = fits and [*program.inputs[-len(caches) :]] == caches
    else:
        found = _STEP_INPUTS.fullmatch(text)
        fits = found is not None and found["caches"].split() == caches
        fits = fits and found is not None and not (found["keep"] and name not in _HOLDS)
        fits = fits and found is not None and not (found["lazy"] and name not in _LAZY)
    if not fits:
        raise ValueError(f"a session has no such inputs for {name}: {text[:200]}")
    wrong = [output for output in program.outputs if _OUTPUT.fullmatch(output) is None]
    if wrong or (name != CATCH_UP and "logits" not in program.outputs):
        raise ValueError(f"results {', '.join(program.outputs)[:200]}")


class _Run:
    """One run of a program without memory.

    Args:
        shape: The model's shape.
        rows: B.
        tokens: T.
        slots: S.
        weights: Bytes of the artifact's tensors.
        tensors: They, on `meta`.
    """

    def __init__(
        self,
        shape: ModelShape,
        rows: int,
        tokens: int,
        slots: int,
        weights: int,
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.shape, self.rows, self.tokens, self.slots = shape, rows, tokens, slots
        self.tensors = tensors
        units = shape.layers * (shape.ffn + shape.heads)
        widest = shape.vocab + units + 8 * shape.hidden + shape.heads * (slots + shape.head_dim)
        self.most = 2 * weights + _BASE + 4 * _TENSORS_AT_ONCE * rows * tokens * widest

    def check(self, name: str, program: Program) -> None:
        """Run it; raises whatever it raises, or ValueError."""
        given = [self.tensors[key] for key in program.weights]
        given += [self._input(key) for key in program.inputs]
        left = Counter({node: len(node.users) for node in program.graph.nodes})
        known: dict[fx.Node, Any] = {}
        held: Counter[int] = Counter()  # storages of what is alive, by its users
        sizes: dict[int, int] = {}
        inputs = {_storage(value) for value in given}
        places = zip((*[None] * len(program.weights), *program.inputs), given, strict=True)
        kept = {_storage(v) for name, v in places if not (name and _WRITTEN.fullmatch(name))}
        feed = iter(given)
        total = 0
        with torch.no_grad():
            for node in program.graph.nodes:
                if node.op == "placeholder":
                    known[node] = next(feed)
                    self._fits(node, known[node])
                    continue
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                if node.op == "output":
                    self._results(name, program, args[0])
                    return
                for tensor in _written(node.target, args, kwargs):
                    if _storage(tensor) in kept:
                        raise ValueError(f"{node.name} writes into a weight, or what is given")
                self._foresee(node, args, kwargs)
                known[node] = value = _call(node.target, args, kwargs)
                for tensor in _tensors(value):
                    place = _storage(tensor)
                    self._fits(node, tensor)
                    if place not in inputs:
                        if held[place] == 0:
                            sizes[place] = tensor.untyped_storage().nbytes()
                            total += sizes[place]
                        held[place] += 1
                if total > self.most:
                    raise ValueError(f"{total} bytes at once, more than {self.most}")
                for one in {*node.all_input_nodes, node}:
                    left[one] -= one is not node
                    if left[one] <= 0:
                        for tensor in _tensors(known.pop(one, None)):
                            place = _storage(tensor)
                            if place not in inputs and held[place] > 0:
                                held[place] -= 1
                                total -= sizes[place] if held[place] == 0 else 0

    def _fits(self, node: fx.Node, tensor: Tensor) -> None:
        """Refuse sizes that are too large together; operators make memory also of empty tensors."""
        if math.prod(max(size, 1) for size in tensor.shape) * tensor.element_size() > self.most:
            raise ValueError(f"{node.name} of {[*tensor.shape]} is too large")

    def _foresee(self, node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse what would take long or much before its result tells."""
        if node.target is operator.getitem:
            if not isinstance(args[0], (list, tuple)) or type(args[1]) is not int:
                raise ValueError(f"{node.name} takes no part of a tuple")
            return
        opname, inside = getattr(node.target, "_opname", ""), 0
        if opname == "unbind":
            x = args[0]
            dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            if isinstance(x, Tensor) and x.shape[dim] > _PARTS:
                raise ValueError(f"{node.name} takes a tensor into {x.shape[dim]} parts")
        elif opname in ("matmul", "scaled_dot_product_attention"):
            a, b = args[0].shape, args[1].shape
            if opname == "matmul" and (len(a) < 3 or len(b) < 3):
                return  # a product of matrices, which copies neither
            if opname != "matmul":
                b = (*b[:-2], b[-1], b[-2])
            (n, k), m = a[-2:], b[-1]
            # All are expanded to as many matrices as there are products; heads are repeated.
            leading = [reversed(one.shape[:-2]) for one in _all_tensors((args, kwargs))]
            products = math.prod(map(max, itertools.zip_longest(*leading, fillvalue=1)))
            inside = products * (n * k + k * m + n * m)
        elif opname == "decode_attention":
            q, cache = args[0], args[5]
            inside = q.numel() // max(cache.shape[-1], 1) * cache.shape[2] + 2 * cache.numel()
        elif opname in ("sparse_mlp", "sparse_gated_mlp"):
            inside = 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[0]  # x, w1
        elif opname == "norm_mlp":
            inside = 2 * args[0].shape[0] * args[4].shape[0]
        if 4 * inside > self.most:
            shapes = [[*one.shape] for one in args if isinstance(one, Tensor)][:6]
            raise ValueError(f"{node.name} of {shapes} takes {4 * inside} bytes beside its result")

    def _results(self, name: str, program: Program, results: Sequence[Any]) -> None:
        for key, value in zip(program.outputs, results, strict=True):
            kind = key.partition("_")[2]
            if not isinstance(value, Tensor):
                raise ValueError(f"result {key} is a {type(value).__name__}")
            size = [*value.shape]
            if key == "logits":
                fits = len(size) == 3 and size[0] == self.rows and size[2] == self.shape.vocab
                fits = fits and size[1] in (1, self.tokens) and value.is_floating_point()
            elif kind in ("index", "count") and name != "masked":
                fits = value.dtype is torch.int32 and len(size) == (3 if kind == "index" else 2)
                fits = fits and size[0] <= self.shape.layers and size[1] == self.rows
                units = {"head": self.shape.heads, "neuron": self.shape.ffn}
                fits = fits and (kind == "count" or size[2] == units[key.partition("_")[0]])
            elif key.startswith("rows_"):
                fits = size == [self.rows]
            else:
                fits = True
            if not fits:
                raise ValueError(f"result {key} of {value.dtype} {size}")

    def _input(self, name: str) -> Tensor:
        """An input as a session gives it."""
        shape, rows, tokens = self.shape, self.rows, self.tokens
        kind, _, rest = name.partition("_")
        long = torch.int64
        fixed: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "input_ids": ((rows, tokens), long),
            "position_ids": ((rows, tokens), long),
            "start": ((rows,), long),
            "position": ((1,), long),
            "attention_mask": ((rows, 1, tokens, tokens), torch.bool),
            "mask_source": ((rows, tokens), long),
            "turns": ((2, WINDOW, shape.head_dim), torch.float32),
        }
        weights = next(
            (value.dtype for key, value in self.tensors.items() if key.endswith("_t")),
            torch.float32,
        )
        if name in fixed:
            size, dtype = fixed[name]
        elif kind in ("k", "v"):
            size, dtype = (rows, shape.kv_heads, self.slots, shape.head_dim), torch.float32
        elif kind == "window":
            size, dtype = (WINDOW, shape.hidden), weights
        elif kind == "moments":
            size, dtype = (WINDOW, 2), torch.float32
        elif kind == "filled":
            size, dtype = (2, shape.kv_heads), torch.int32
        else:  # keep sets
            units = shape.heads if kind == "head" else shape.ffn
            known = self.tensors.get(f"keep.{kind}_index")
            layers = shape.layers - (kind == "head") if known is None else known.shape[0]
            size = (layers, rows, units) if rest == "index" else (layers, rows)
            dtype = torch.int32
        return torch.empty(size, dtype=dtype, device="meta")


def _written(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterable[Tensor]:
    """The tensors that an operator writes into, as its schema says."""
    schema = getattr(target, "_schema", None)
    for place, argument in enumerate(schema.arguments if schema and schema.is_mutable else ()):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield from _tensors(args[place] if place < len(args) else kwargs.get(argument.name))


#: What calls gave by what they were given: layers repeat each other, and `meta` is slow.
_KNOWN: dict[Any, Any] = {}
_MOST_KNOWN = 1 << 14


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    """A call on tensors without memory; one that makes new tensors is made once for its shapes."""
    key = (target, _key(args), _key(kwargs))
    made = _KNOWN.get(key)
    if made is None:
        value = target(*args, **kwargs)
        old = {_storage(tensor) for tensor in _all_tensors((args, kwargs))}
        parts = value if isinstance(value, (list, tuple)) else [value]
        if parts and all(isinstance(p, Tensor) and _storage(p) not in old for p in parts):
            if len(_KNOWN) > _MOST_KNOWN:
                _KNOWN.clear()
            shapes = [(p.shape, p.stride(), p.dtype) for p in parts]
            _KNOWN[key] = isinstance(value, Tensor), shapes
        return value
    single, shapes = made
    new = [torch.empty_strided(s, t, dtype=d, device="meta") for s, t, d in shapes]
    return new[0] if single else new


def _key(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((name, _key(item)) for name, item in value.items())
    return type(value), value


def _all_tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _all_tensors(item)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _tensors(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            if isinstance(item, Tensor):
                yield item
