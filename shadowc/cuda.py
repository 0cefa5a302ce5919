"""Launches Triton kernels on a GPU: from images that an artifact brings, or compiled here.

    recording():  launch(kernel, ...) -> KernelSpec -> compile_kernel -> Image -> save_images
    run:          load_images -> launch(kernel, ...) -> the image with the same key -> CUDA driver

While compiling, the very code that will run is run once on meta tensors, and what it launches is
noted: so exactly the kernels that the artifact needs are compiled, for any GPU, without one. At run
time the same call finds its image by the same key, and nothing is compiled.

A key depends on what makes the machine code and on nothing else: the sources of the kernel and of
the functions it calls, the types of its arguments, which pointers are aligned, its constants, and
how it is launched. Values of integers and floats are not part of it.
"""

from __future__ import annotations

import ast
import ctypes
import dataclasses
import functools
import hashlib
import inspect
import json
import re
import struct
import textwrap
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor

from shadowc.errors import KernelError, OptionError

Constant = int | float | bool | str | None
Noted = dict[str, tuple["KernelSpec", Any]]

_INSTALL = "pip install 'shadowc[triton]'"
_KIB = 1 << 10

# --- GPUs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Profile:
    """What shadowc knows of a GPU.

    Attributes:
        name: Name of the target.
        arch: Compute capability, 90 for 9.0.
        multiprocessors: How many it has.
        bandwidth: Of its memory, bytes/s by the data sheet.
        shared: Bytes of shared memory that one program may use.
        pdl: Whether a kernel may start before the one in front of it ends (programmatic dependent
            launch, from sm_90 on).
        measured: What was measured on it.
        matches: Words of which one is in the device's name, as the CUDA driver tells it.
        project_rows: Rows of a first projection that a program works on at a time.
        finish_columns: Columns of a program that adds up partial sums.
        attention_splits: Programs that share the cache of one head.
        attention_slots: Slots of the cache that a program reads at a time.
        dense_from_batch: Rows of a batch from which on every unit runs, because the rows keep
            most neurons between them (Llama-2-7B shapes at 50%: 0.83x of dense for two rows).
        dense_program: The faster dense program of such batches: `full` (our kernels) or `dense`
            (cuBLAS).
    """

    name: str
    arch: int
    multiprocessors: int
    bandwidth: float
    shared: int
    pdl: bool
    measured: str
    matches: tuple[str, ...]
    project_rows: int = 4
    finish_columns: int = 16
    attention_splits: int = 4
    attention_slots: int = 64
    dense_from_batch: int = 2
    dense_program: str = "full"

    def names(self, device_name: str) -> bool:
        """Whether a device of that name is one of these: whole words, an L40S is no L4."""
        return any(re.search(rf"(?<!\w){re.escape(m)}(?!\w)", device_name) for m in self.matches)


_DERIVED = "derived from h100: not run"

PROFILES: dict[str, Profile] = {
    known.name: known
    for known in (
        Profile(
            name="a100",  # SXM, 80 GB
            arch=80,
            multiprocessors=108,
            bandwidth=2039e9,
            shared=163 * _KIB,
            pdl=False,
            measured=_DERIVED,
            matches=("A100",),
        ),
        Profile(
            name="h100",  # SXM
            arch=90,
            multiprocessors=132,
            bandwidth=3350e9,
            shared=227 * _KIB,
            pdl=True,
            measured="measured: benchmarks/results/gpu-h100.md",
            matches=("H100",),
        ),
        Profile(
            name="h200",
            arch=90,
            multiprocessors=132,
            bandwidth=4800e9,
            shared=227 * _KIB,
            pdl=True,
            measured=_DERIVED,
            matches=("H200",),
        ),
        Profile(
            name="l4",
            arch=89,
            multiprocessors=58,
            bandwidth=300e9,
            shared=99 * _KIB,
            pdl=False,
            measured=_DERIVED,
            matches=("L4",),
        ),
        Profile(
            name="rtx4090",
            arch=89,
            multiprocessors=128,
            bandwidth=1008e9,
            shared=99 * _KIB,
            pdl=False,
            measured=_DERIVED,
            matches=("RTX 4090",),
        ),
    )
}

_active: Profile | None = None


def find_profile(name: str) -> Profile:
    """The profile of that name.

    Raises:
        OptionError: There is none.
    """
    found = PROFILES.get(name)
    if found is None:
        raise OptionError(
            f"no GPU is known as {name!r}",
            expected=" | ".join(PROFILES),
            got=name,
            fix="choose one of these, or add a Profile to shadowc/cuda.py",
        )
    return found


def profile() -> Profile:
    """The active profile: the one set by `use`, else that of the current GPU, h100 without one."""
    if _active is not None:
        return _active
    if not torch.cuda.is_available():
        return PROFILES["h100"]
    return _profile_of(torch.cuda.current_device())


@functools.cache
def _profile_of(index: int) -> Profile:
    name = torch.cuda.get_device_name(index)
    major, minor = torch.cuda.get_device_capability(index)
    for known in PROFILES.values():
        if known.names(name):
            return known
    arch = 10 * major + minor
    older = [known for known in PROFILES.values() if known.arch <= arch]
    return max(older or PROFILES.values(), key=lambda known: (known.arch, known.name == "h100"))


def use(profile_name: str | None) -> None:
    """Set the active profile of this process; None: the one of the current GPU again.

    Raises:
        OptionError: There is none of that name.
    """
    global _active
    _active = None if profile_name is None else find_profile(profile_name)


@contextmanager
def using(settings: str | Profile, jit: bool | None) -> Iterator[None]:
    """Launch with a GPU's settings, and with or without compiling, inside the block alone.

    Args:
        settings: The GPU's profile, or its name.
        jit: As for `allow_jit`.
    """
    global _active, _jit
    before = _active, _jit
    _active, _jit = find_profile(settings) if isinstance(settings, str) else settings, jit
    try:
        yield
    finally:
        _active, _jit = before


def check_device(profile_name: str, allow_jit: bool) -> None:
    """Refuse to run here what was compiled for another GPU.

    Args:
        profile_name: The target.
        allow_jit: Whether the kernels may be compiled anew: then any GPU will do.

    Raises:
        KernelError: There is no GPU, or it is not the target's.
        OptionError: The target is not known.
    """
    wanted = find_profile(profile_name)
    if not torch.cuda.is_available():
        raise KernelError(
            "no GPU is available",
            expected=f"{wanted.name}, and a torch that is built for CUDA",
            got=f"torch {torch.__version__}, which sees no CUDA device",
            fix="run it on such a machine, or compile it for --target cpu",
        )
    name = torch.cuda.get_device_name()
    if allow_jit or wanted.names(name):
        return
    here = next((known.name for known in PROFILES.values() if known.names(name)), None)
    raise KernelError(
        "this was compiled for another GPU",
        expected=f"{wanted.name} (its name has {' or '.join(wanted.matches)})",
        got=name,
        fix=(f"compile it with --target {here}, or " if here else "")
        + "load it with allow_jit=True to compile its kernels anew for this GPU",
    )


# --- What is launched --------------------------------------------------------------------------

_TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.float8_e5m2: "fp8e5",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}
_SLOTS = {"pointer": "Q", "i32": "i4x", "i64": "q", "fp32": "f4x"}
"""What a parameter is made of, in the language of the module `struct`: each takes 8 bytes."""

_KIND = re.compile(r"constexpr|i32|i64|fp32|\*(?:" + "|".join(_TYPES.values()) + ")")
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_KEY_DIGITS = 20


@dataclass(frozen=True)
class KernelSpec:
    """What the machine code of a kernel depends on, but for the GPU.

    Attributes:
        name: Name of the kernel's function.
        signature: Name and type of every parameter in order: `*fp16` is a pointer, `i32`, `i64` and
            `fp32` are numbers, `constexpr` is a constant.
        constants: Name and value of every constant.
        aligned: Names of the pointers that are multiples of 16.
        warps: Warps a program.
        pdl: Whether it starts before the kernel in front of it ends.
        source: sha256 of its source and those of the functions it calls.
    """

    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Constant], ...]
    aligned: tuple[str, ...]
    warps: int
    pdl: bool
    source: str

    @functools.cached_property
    def key(self) -> str:
        """Hash of all of it, the same on every machine."""
        text = json.dumps(dataclasses.asdict(self), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:_KEY_DIGITS]

    @property
    def parameters(self) -> tuple[str, ...]:
        """What the machine code is given: `pointer`, `i32`, `i64` or `fp32` in order."""
        kinds = (kind for _, kind in self.signature if kind != "constexpr")
        return tuple("pointer" if kind[0] == "*" else kind for kind in kinds)


@dataclass(frozen=True)
class _Kernel:
    """A kernel's function, read once."""

    name: str
    runtime: tuple[str, ...]
    constexprs: tuple[str, ...]
    defaults: dict[str, Constant]
    has_pdl: bool

    def constants(self, given: dict[str, Constant]) -> dict[str, Constant]:
        """Values of all constants, by the order of the parameters."""
        values = self.defaults | given
        if values.keys() != set(self.constexprs):
            raise KernelError(
                f"the constants given to {self.name} do not fit",
                expected=", ".join(name for name in self.constexprs if name != "PDL"),
                got=", ".join(name for name in given if name != "PDL"),
            )
        for name, value in given.items():
            if value is not None and type(value) not in (int, float, bool, str):
                raise KernelError(
                    f"constant {name!r} of {self.name} does not fit",
                    expected="int, float, bool, str or None",
                    got=repr(value),
                )
        return {name: values[name] for name in self.constexprs}


def _function(kernel: Any) -> Any:
    """The Python function in a `triton.jit` function."""
    return getattr(kernel, "fn", kernel)


def _interpreted(kernel: Any) -> bool:
    # By name: importing the interpreter to look for what it makes would cost more than the launch.
    return type(kernel).__name__ == "InterpretedFunction"


@functools.cache
def _read(function: Any) -> _Kernel:
    parameters = inspect.signature(function).parameters.values()
    constant = ["constexpr" in str(parameter.annotation) for parameter in parameters]
    typed = [parameter.annotation is not parameter.empty for parameter in parameters]
    if sorted(constant) != constant or typed != constant:
        raise KernelError(
            f"kernel {function.__name__} cannot be launched",
            expected="tensors and numbers without annotations first, then tl.constexpr parameters",
            got=str(inspect.signature(function)),
        )
    names = [parameter.name for parameter in parameters]
    return _Kernel(
        name=function.__name__,
        runtime=tuple(names[: constant.count(False)]),
        constexprs=tuple(names[constant.count(False) :]),
        defaults={p.name: p.default for p in parameters if p.default is not p.empty},
        has_pdl="PDL" in names,
    )


@functools.cache
def _source(function: Any) -> str:
    """Hash of the texts of a function, of those it calls, and of the constants they name."""
    texts: set[str] = set()
    seen, waiting = {function}, [function]
    while waiting:
        function = waiting.pop()
        try:
            text = textwrap.dedent(inspect.getsource(function))
        except OSError as error:
            raise KernelError(f"the source of {function.__name__} is not available") from error
        tree = ast.parse(text).body[0]
        # Up to the function's end: what else belongs to it differs between versions of Python.
        texts.add("\n".join(text.splitlines()[: tree.end_lineno]))
        for name, value in _named(function, tree):
            called, value = _function(value), getattr(value, "value", value)
            if isinstance(called, FunctionType):
                if called.__module__.partition(".")[0] != "triton" and called not in seen:
                    seen.add(called)
                    waiting.append(called)
            elif isinstance(value, (int, float, bool, str)):
                texts.add(f"{function.__name__}: {name} = {value!r}")
    return hashlib.sha256("\0".join(sorted(texts)).encode()).hexdigest()


def _named(function: Any, tree: ast.AST) -> Iterator[tuple[str, Any]]:
    """What a function names outside itself, `name` or `module.name`."""
    scope = function.__globals__ | inspect.getclosurevars(function).nonlocals
    local = {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id in scope and node.id not in local:
            yield node.id, scope[node.id]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            module = scope.get(node.value.id)
            if isinstance(module, ModuleType) and module.__name__.partition(".")[0] != "triton":
                yield f"{node.value.id}.{node.attr}", getattr(module, node.attr, None)


def _kind(kernel: _Kernel, index: int, value: Any) -> tuple[str, bool]:
    """Type of an argument, and whether it is an aligned pointer."""
    if value is None:
        return "constexpr", False
    if isinstance(value, Tensor):
        name = _TYPES.get(value.dtype)
        if name is not None:
            # Not by the address, which a meta tensor has not: allocations are aligned.
            return f"*{name}", value.storage_offset() * value.element_size() % 16 == 0
    elif isinstance(value, float):
        return "fp32", False
    elif isinstance(value, int) and not isinstance(value, bool):
        if -(1 << 31) <= value < 1 << 31:
            return "i32", False
        if -(1 << 63) <= value < 1 << 63:
            return "i64", False
    raise KernelError(
        f"argument {kernel.runtime[index]!r} of {kernel.name} does not fit",
        expected="a tensor, None, an int of 64 bits or a float",
        got=f"{value.dtype} tensor" if isinstance(value, Tensor) else repr(value),
    )


@dataclass(frozen=True)
class Call:
    """One launch.

    Attributes:
        key: Its kernel's, as `recording` notes it.
        grid: Numbers of programs.
        args: What the machine code is given, by parameter.
    """

    key: str
    grid: tuple[int, ...]
    args: dict[str, Tensor | float]


_RECORDED: ContextVar[tuple[Noted, list[Call]] | None] = ContextVar("recorded", default=None)


@contextmanager
def recording(calls: list[Call] | None = None) -> Iterator[Noted]:
    """Note what is launched instead of running it.

    Args:
        calls: Gets every launch in order.

    Yields:
        The specification and the kernel by key, filled while the block runs.
    """
    noted: Noted = {}
    token = _RECORDED.set((noted, [] if calls is None else calls))
    try:
        yield noted
    finally:
        _RECORDED.reset(token)


@functools.cache
def _overlaps() -> bool:
    """Whether the GPU can start a kernel before the one in front of it ends."""
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (9, 0)


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Tensor | float | None,
    warps: int = 4,
    pdl: bool = False,
    **constexprs: Constant,
) -> None:
    """Run a kernel on torch's current stream, or note it inside `recording()`.

    Args:
        kernel: A `triton.jit` function. If it has a constexpr `PDL`, that is filled in here.
        grid: One to three numbers of programs; if one is 0, nothing happens.
        *args: The kernel's parameters that are no constexprs, in order. None is a constant.
            Integers are i32, or i64 where they do not fit; floats are fp32.
        warps: Warps a program.
        pdl: Start it before the kernel in front of it ends, where the GPU can and the kernel has a
            `PDL`, by which it knows that it has to wait.
        **constexprs: The kernel's constants.

    Raises:
        KernelError: The arguments do not fit the kernel, it is not among the images that were
            loaded while compiling here is not allowed, or CUDA reports an error.
    """
    if 0 in grid:
        return
    function = _function(kernel)
    known = _read(function)
    if len(args) != len(known.runtime):
        raise KernelError(
            f"the arguments given to {known.name} do not fit",
            expected=f"{len(known.runtime)}: {', '.join(known.runtime)}",
            got=len(args),
        )
    recorded, interpreted = _RECORDED.get(), _interpreted(kernel)
    pdl = pdl and known.has_pdl and not interpreted and profile().pdl
    pdl = pdl and (recorded is not None or _overlaps())
    constants = known.constants(constexprs | {"PDL": pdl} if known.has_pdl else constexprs)
    kinds = tuple([_kind(known, index, value) for index, value in enumerate(args)])
    if recorded is not None:
        noted, calls = recorded
        spec = _specify(function, kinds, constants, warps, pdl)
        noted.setdefault(spec.key, (spec, kernel))
        given = zip(known.runtime, args, strict=True)
        calls.append(Call(spec.key, grid, {name: v for name, v in given if v is not None}))
        return
    if interpreted:
        kernel[grid](*args, **constants)
        return
    values = tuple(constants.values())
    # True and 1 are equal, but not the same constant.
    call = (function, kinds, values, tuple(map(type, values)), warps, pdl)
    image = _CALLS.get(call)
    if image is None:
        spec = _specify(function, kinds, constants, warps, pdl)
        image = _IMAGES.get(spec.key)
        if image is None:
            _launch_here(kernel, spec, grid, args, constants)
            return
        _CALLS[call] = image
    _launch_image(image, grid, [v for v in args if v is not None])


def _specify(
    function: Any,
    kinds: tuple[tuple[str, bool], ...],
    constants: dict[str, Constant],
    warps: int,
    pdl: bool,
) -> KernelSpec:
    known = _read(function)
    runtime = list(zip(known.runtime, kinds, strict=True))
    absent = [(name, None) for name, (kind, _) in runtime if kind == "constexpr"]
    return KernelSpec(
        name=known.name,
        signature=(
            *((name, kind) for name, (kind, _) in runtime),
            *((name, "constexpr") for name in known.constexprs),
        ),
        constants=(*absent, *constants.items()),
        aligned=tuple(name for name, (_, aligned) in runtime if aligned),
        warps=warps,
        pdl=pdl,
        source=_source(function),
    )


def _launch_here(
    kernel: Any,
    spec: KernelSpec,
    grid: tuple[int, ...],
    args: tuple[Any, ...],
    constants: dict[str, Constant],
) -> None:
    """Leave it to Triton, which compiles for this GPU what it has not compiled before."""
    if not (_jit if _jit is not None else not _IMAGES):
        raise KernelError(
            f"kernel {spec.name} is missing in the artifact",
            expected=f"an image with the key {spec.key}",
            got=f"{len(_IMAGES)} other images",
            fix="compile the artifact again for this target, or load it with allow_jit=True",
        )
    triton_package(f"kernel {spec.name} cannot be compiled", kernel)
    if not torch.cuda.is_available():
        raise KernelError(
            f"kernel {spec.name} needs a GPU",
            expected="a CUDA device that torch sees",
            got="none",
            fix="run it on such a machine; tests can set TRITON_INTERPRET=1 instead",
        )
    kernel[grid](*args, **constants, num_warps=spec.warps, launch_pdl=spec.pdl)


def triton_package(problem: str = "kernels cannot be compiled", *kernels: Any) -> Any:
    """Triton, which is optional: the `cpu` target does without it.

    Args:
        problem: What it is needed for.
        *kernels: Functions that must be its own.

    Raises:
        KernelError: It is not installed, or a kernel is another function.
    """
    try:
        import triton
    except ImportError as error:
        raise KernelError(problem, got="Triton is not installed", fix=_INSTALL) from error
    for kernel in kernels:
        if not hasattr(kernel, "run"):
            raise KernelError(problem, expected="a triton.jit function", got=repr(kernel))
    return triton


_jit: bool | None = None


def allow_jit(allowed: bool | None) -> None:
    """Whether kernels without an image are compiled here; None: if no images were loaded."""
    global _jit
    _jit = allowed


# --- Images ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Image:
    """A compiled kernel.

    Attributes:
        spec: What it was compiled from.
        arch: For which compute capability.
        entry: Name of the function in the machine code.
        cubin: The machine code.
        shared: Bytes of shared memory a program.
        scratch: Pointers that Triton appends to the parameters; they are null, for nothing here
            needs such memory.
    """

    spec: KernelSpec
    arch: int
    entry: str
    cubin: bytes
    shared: int
    scratch: int

    @property
    def key(self) -> str:
        """The specification's."""
        return self.spec.key

    @property
    def warps(self) -> int:
        """Warps a program."""
        return self.spec.warps

    @property
    def pdl(self) -> bool:
        """Whether it starts before the kernel in front of it ends."""
        return self.spec.pdl

    @functools.cached_property
    def pack(self) -> Callable[..., bytes]:
        """From the parameters' values to 8 bytes each."""
        slots = (_SLOTS[kind] for kind in self.spec.parameters)
        return struct.Struct("=" + "".join(slots) + "Q" * self.scratch).pack


def compile_kernel(kernel: Any, spec: KernelSpec, arch: int) -> Image:
    """Compile a kernel for a GPU that need not be here.

    Args:
        kernel: The `triton.jit` function that `recording()` noted.
        spec: What it noted beside it.
        arch: Compute capability, 80 for 8.0.

    Raises:
        KernelError: Triton is not installed or cannot compile it, it is interpreted, or needs more
            memory than a program has there.
    """
    triton = triton_package(f"kernel {spec.name} cannot be compiled", kernel)
    if _interpreted(kernel):
        raise KernelError(
            f"kernel {spec.name} cannot be compiled",
            got="TRITON_INTERPRET is set",
            fix="unset TRITON_INTERPRET",
        )
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    order = [name for name, _ in spec.signature]
    with _compiling:
        if spec.source != _source(_function(kernel)):
            raise KernelError(f"the source of kernel {spec.name} is not the one that was recorded")
        try:
            with triton.knobs.compilation.scope():
                # Line numbers would put paths of this machine in the artifact.
                triton.knobs.compilation.disable_line_info = True
                compiled = triton.compile(
                    ASTSource(
                        kernel,
                        dict(spec.signature),
                        dict(spec.constants),
                        {(order.index(name),): [["tt.divisibility", 16]] for name in spec.aligned},
                    ),
                    target=GPUTarget("cuda", arch, 32),
                    options={"num_warps": spec.warps, "launch_pdl": spec.pdl},
                )
        except Exception as error:  # whatever stage of Triton, LLVM or ptxas it was
            raise KernelError(
                f"kernel {spec.name} cannot be compiled for sm_{arch}", got=f"{error}".strip()
            ) from error
    metadata = compiled.metadata
    scratch = metadata.global_scratch_size + metadata.profile_scratch_size
    if scratch:
        raise KernelError(
            f"kernel {spec.name} needs memory of its own",
            expected="no scratch memory",
            got=f"{scratch} bytes a program",
        )
    most = max((known.shared for known in PROFILES.values() if known.arch == arch), default=None)
    if most is not None and metadata.shared > most:
        raise KernelError(
            f"kernel {spec.name} needs too much shared memory for sm_{arch}",
            expected=f"at most {most} bytes a program",
            got=metadata.shared,
        )
    return Image(
        spec=spec,
        arch=arch,
        entry=metadata.name,
        cubin=compiled.asm["cubin"],
        shared=metadata.shared,
        scratch=_appended(spec, metadata.name, compiled.asm["ptx"]),
    )


_compiling = threading.Lock()
"""One compilation at a time: the setting of line numbers is one of the process, and in CPython 3.11
threads that parse at once break each other (AST constructor recursion depth mismatch).
"""


def _appended(spec: KernelSpec, entry: str, ptx: str) -> int:
    """How many pointers Triton appended: its versions differ, the assembly tells."""
    head = re.search(rf"\.entry {re.escape(entry)}\((.*?)\)\s", ptx, re.DOTALL)
    found = re.findall(r"\.param \.[a-z](\d+)", head[1]) if head else []
    given = ["32" if kind in ("i32", "fp32") else "64" for kind in spec.parameters]
    extra = found[len(given) :]
    if found[: len(given)] != given or set(extra) - {"64"}:
        raise KernelError(
            f"kernel {spec.name} has not the parameters that were asked for",
            expected=f"{', '.join(given)} bits, then pointers",
            got=f"{', '.join(found)} bits",
            fix="use a version of Triton that shadowc was tested with: 3.6",
        )
    return len(extra)


_SCHEMA = 1
_INDEX = "index.json"
_IMAGES: dict[str, Image] = {}
_CALLS: dict[tuple[Any, ...], Image] = {}
_FUNCTIONS: dict[tuple[str, int], int] = {}


def save_images(directory: Path, images: Iterable[Image]) -> None:
    """Write images as `kernels/sm_90/NAME-KEY.cubin` and `kernels/sm_90/index.json`.

    Args:
        directory: Where `kernels` shall be.
        images: Compiled kernels; those for the same GPU share an index, which is written anew.
    """
    version = triton_package("images of kernels cannot be written").__version__
    found = {(image.arch, image.key): image for image in images}
    for arch in sorted({arch for arch, _ in found}):
        folder = directory / "kernels" / f"sm_{arch}"
        folder.mkdir(parents=True, exist_ok=True)
        entries = []
        for (_, key), image in sorted(item for item in found.items() if item[0][0] == arch):
            file = f"{image.spec.name}-{key}.cubin"
            (folder / file).write_bytes(image.cubin)
            entries.append(
                {
                    "key": key,
                    "file": file,
                    "bytes": len(image.cubin),
                    "sha256": hashlib.sha256(image.cubin).hexdigest(),
                    "entry": image.entry,
                    "shared": image.shared,
                    "scratch": image.scratch,
                    "parameters": image.spec.parameters,
                    **dataclasses.asdict(image.spec),
                }
            )
        index = {"schema": _SCHEMA, "arch": arch, "triton": version, "images": entries}
        (folder / _INDEX).write_text(json.dumps(index, indent=1) + "\n")


def load_images(directory: Path, arch: int) -> None:
    """Let `launch` use the images that `save_images` wrote, beside those loaded before.

    The GPU gets a kernel when it is first launched.

    Args:
        directory: Where `kernels` is.
        arch: Compute capability of the GPU.

    Raises:
        KernelError: Something is missing, damaged or for another GPU; names the file. Then none of
            them is loaded.
    """
    folder = directory / "kernels" / f"sm_{arch}"
    path = folder / _INDEX
    try:
        index = json.loads(path.read_text())
    except OSError as error:
        built = sorted(p.parent.name for p in directory.glob(f"kernels/sm_*/{_INDEX}"))
        raise KernelError(
            f"{path} cannot be read",
            expected=f"kernels for sm_{arch}",
            got=f"{error.strerror}; there are kernels for {', '.join(built) or 'no GPU'}",
            fix="compile the artifact for this GPU",
        ) from error
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "valid JSON", error) from error
    _check(path, isinstance(index, dict), "an object", type(index).__name__)
    _check(path, index.get("schema") == _SCHEMA, f"schema {_SCHEMA}", index.get("schema"))
    _check(path, index.get("arch") == arch, f"arch {arch}", index.get("arch"))
    _check(path, isinstance(index.get("triton"), str), "triton's version", index.get("triton"))
    _check(path, isinstance(index.get("images"), list), "a list of images", index.get("images"))
    images = [_read_image(path, entry, arch) for entry in index["images"]]
    _IMAGES.update({image.key: image for image in images})
    _CALLS.clear()


def _read_image(path: Path, entry: Any, arch: int) -> Image:
    _check(path, isinstance(entry, dict), "an object for each image", type(entry).__name__)
    known = {
        "key": str,
        "file": str,
        "bytes": int,
        "sha256": str,
        "entry": str,
        "shared": int,
        "scratch": int,
        "parameters": list,
        "name": str,
        "signature": list,
        "constants": list,
        "aligned": list,
        "warps": int,
        "pdl": bool,
        "source": str,
    }
    _check(path, entry.keys() == known.keys(), ", ".join(known), ", ".join(entry))
    for name, kind in known.items():
        _check(path, type(entry[name]) is kind, f"{name}: {kind.__name__}", entry[name])
    pairs = [*entry["signature"], *entry["constants"]]
    _check(path, all(type(p) is list and len(p) == 2 for p in pairs), "pairs", pairs)
    for name in (entry["name"], entry["entry"], *(pair[0] for pair in pairs), *entry["aligned"]):
        fits = isinstance(name, str) and _IDENTIFIER.fullmatch(name) is not None
        _check(path, fits, "names of functions and parameters", name)
    for _, kind in entry["signature"]:
        fits = isinstance(kind, str) and _KIND.fullmatch(kind) is not None
        _check(path, fits, "types of parameters", kind)
    spec = KernelSpec(
        name=entry["name"],
        signature=tuple((name, kind) for name, kind in entry["signature"]),
        constants=tuple((name, value) for name, value in entry["constants"]),
        aligned=tuple(entry["aligned"]),
        warps=entry["warps"],
        pdl=entry["pdl"],
        source=entry["source"],
    )
    _check(path, entry["key"] == spec.key, f"key {spec.key}", entry["key"])
    parameters = list(spec.parameters)
    _check(path, entry["parameters"] == parameters, parameters, entry["parameters"])
    _check(path, spec.warps in (1, 2, 4, 8, 16, 32), "warps: a power of two to 32", spec.warps)
    _check(path, 0 <= entry["shared"] <= 256 * _KIB, "shared: to 256 KiB", entry["shared"])
    _check(path, 0 <= entry["scratch"] <= 4, "scratch: to 4", entry["scratch"])
    file = f"{spec.name}-{spec.key}.cubin"
    _check(path, entry["file"] == file, f"file {file}", entry["file"])
    place = path.with_name(file)
    try:
        cubin = place.read_bytes()
    except OSError as error:
        raise _damaged(place, "a file that the index lists", error.strerror) from error
    _check(place, len(cubin) == entry["bytes"], f"{entry['bytes']} bytes", f"{len(cubin)} bytes")
    digest = hashlib.sha256(cubin).hexdigest()
    _check(place, digest == entry["sha256"], f"sha256 {entry['sha256']}", digest)
    _check(place, cubin[:4] == b"\x7fELF", "machine code", "something else")
    return Image(spec, arch, entry["entry"], cubin, entry["shared"], entry["scratch"])


def _check(path: Path, fits: bool, expected: object, got: object) -> None:
    if not fits:
        raise _damaged(path, expected, got)


def _damaged(path: Path, expected: object, got: object) -> KernelError:
    return KernelError(
        f"{path} is damaged or not of this version",
        expected=expected,
        got=f"{got}"[:200],
        fix="compile the artifact again",
    )


def clear_images() -> None:
    """Forget all images, and what `allow_jit` was told."""
    allow_jit(None)
    for cache in (_IMAGES, _CALLS, _FUNCTIONS):
        cache.clear()


# --- The CUDA driver ---------------------------------------------------------------------------

_PROGRAMMATIC_STREAM_SERIALIZATION = 6
_MAX_DYNAMIC_SHARED_SIZE_BYTES = 8
_CAPTURE_RELAXED = 2
_STATIC_SHARED = 48 * _KIB


class _LaunchAttribute(ctypes.Structure):
    """CUlaunchAttribute; `value` is the first member used of a union of 64 bytes."""

    _fields_ = [
        ("id", ctypes.c_uint),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    ]


class _LaunchConfig(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("count", ctypes.c_uint),
    ]


_SIGNATURES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuGetErrorString": (ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)),
    "cuCtxGetCurrent": (ctypes.POINTER(ctypes.c_void_p),),
    "cuThreadExchangeStreamCaptureMode": (ctypes.POINTER(ctypes.c_int),),
    "cuModuleLoadData": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_char_p),
    "cuModuleGetFunction": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_char_p),
    "cuFuncSetAttribute": (ctypes.c_void_p, ctypes.c_int, ctypes.c_int),
    "cuLaunchKernelEx": (
        ctypes.POINTER(_LaunchConfig),
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.c_void_p,
    ),
}

_PDL = _LaunchAttribute(id=_PROGRAMMATIC_STREAM_SERIALIZATION, value=1)


@functools.cache
def _driver() -> ctypes.CDLL:
    if not torch.cuda.is_available():
        raise KernelError(
            "kernels need a GPU",
            expected="a CUDA device that torch sees",
            got=f"torch {torch.__version__}, which sees none",
            fix="run it on such a machine",
        )
    try:
        library = ctypes.CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
    except (OSError, AttributeError) as error:
        raise KernelError(
            "the CUDA driver cannot be used",
            expected="libcuda.so.1 of CUDA 12 or later",
            got=error,
            fix="install or update the NVIDIA driver",
        ) from error
    torch.cuda.init()
    _call(library, "cuInit", 0)
    return library


def _call(library: ctypes.CDLL, name: str, *arguments: Any) -> None:
    code = getattr(library, name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        library.cuGetErrorString(code, ctypes.byref(text))
        raise KernelError(f"{name} failed", got=(text.value or b"an unknown error").decode())


def _context(library: ctypes.CDLL) -> int:
    """The current context, torch's."""
    handle = ctypes.c_void_p()
    _call(library, "cuCtxGetCurrent", ctypes.byref(handle))
    if not handle.value:  # a thread that has not used CUDA yet
        torch.empty(1, device="cuda")
        _call(library, "cuCtxGetCurrent", ctypes.byref(handle))
    if not handle.value:
        raise KernelError("no CUDA context is current", expected="torch's, after an allocation")
    return handle.value


def _load(library: ctypes.CDLL, image: Image) -> int:
    """The image's function in the current context."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    # A stream that is being captured would else be spoiled by what loading does inside.
    mode = ctypes.c_int(_CAPTURE_RELAXED)
    _call(library, "cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    try:
        _call(library, "cuModuleLoadData", ctypes.byref(module), image.cubin)
        entry = image.entry.encode()
        _call(library, "cuModuleGetFunction", ctypes.byref(function), module, entry)
        if image.shared > _STATIC_SHARED:
            what = _MAX_DYNAMIC_SHARED_SIZE_BYTES
            _call(library, "cuFuncSetAttribute", function, what, image.shared)
    except KernelError as error:
        raise KernelError(
            f"kernel {image.spec.name} cannot be loaded",
            expected=f"a GPU that runs code for sm_{image.arch}",
            got=error,
        ) from error
    finally:
        _call(library, "cuThreadExchangeStreamCaptureMode", ctypes.byref(mode))
    return function.value or 0


def _launch_image(image: Image, grid: tuple[int, ...], args: list[Any]) -> None:
    library = _driver()
    place = (image.key, _context(library))
    function = _FUNCTIONS.get(place)
    if function is None:
        function = _FUNCTIONS[place] = _load(library, image)
    _check_pointers(image, args)
    values = [v.data_ptr() if isinstance(v, Tensor) else v for v in args] + [0] * image.scratch
    buffer = ctypes.create_string_buffer(image.pack(*values))
    base = ctypes.addressof(buffer)
    pointers = (ctypes.c_void_p * len(values))(*range(base, base + 8 * len(values), 8))
    config = _LaunchConfig(
        (*grid, *(1,) * (3 - len(grid))),
        (32 * image.warps, 1, 1),
        image.shared,
        torch.cuda.current_stream().cuda_stream,
        ctypes.pointer(_PDL) if image.pdl else None,
        int(image.pdl),
    )
    try:
        _call(library, "cuLaunchKernelEx", ctypes.byref(config), function, pointers, None)
    except KernelError as error:
        raise KernelError(
            f"kernel {image.spec.name} cannot be launched on {grid}", got=error
        ) from error


def _check_pointers(image: Image, args: list[Any]) -> None:
    aligned = image.spec.aligned
    names = [name for name, kind in image.spec.signature if kind != "constexpr"]
    for name, value in zip(names, args, strict=True):
        if not isinstance(value, Tensor):
            continue
        if not value.is_cuda or (name in aligned and value.data_ptr() % 16):
            raise KernelError(
                f"argument {name!r} of {image.spec.name} does not fit",
                expected="memory of the GPU" + " at a multiple of 16" * (name in aligned),
                got=f"{value.device}, address {value.data_ptr():#x}",
            )


def counters(device: torch.device | str, count: int) -> Tensor:
    """Zeros int32 [count], the same ones for every call: who uses them leaves zeros behind.

    Raises:
        KernelError: They would be allocated while a CUDA graph is captured, and be lost with it.
    """
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    return _counters(device, count)


@functools.cache
def _counters(device: torch.device, count: int) -> Tensor:
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise KernelError(
            "counters cannot be made while a CUDA graph is captured",
            expected=f"counters of {count} on {device}, made before",
            fix="run the step once before it is captured",
        )
    with torch.inference_mode(False):  # an inference tensor could not be written to outside of it
        return torch.zeros(count, dtype=torch.int32, device=device)
