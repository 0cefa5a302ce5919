"""The native library: finding and loading it, and what every launcher needs to call it.

The library is `shadowc/_native*.so`, built from `kernels/cpu/` by setup.py. Importing this module
does not load it; the first call of an op does. Nothing falls back to another implementation.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shadowc.errors import KernelError

ISAS = ("generic", "avx2", "avx512")
ACTIVATIONS = {"relu": 0, "silu": 1, "gelu": 2}
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

NATIVE_ROWS = 8
"""Dense ops on at most this many tokens run native; more go through a chunked matrix product."""

_ABI = 5
_BUILD = "run `pip install -e .` or `python setup.py build_ext --inplace` (needs a C++20 compiler)"
_LIBRARY = torch.library.Library("shadowc", "FRAGMENT")

POSITION = 1
_REFUSED = {  # kernels/cpu/check.h
    POSITION: "a position outside of the cache",
    2: "a null pointer",
    3: "a size out of range, or that does not fit another one",
    4: "a keep set that is not ascending, or names units that there are not",
    5: "an unknown matrix type or activation",
    6: "not enough memory",
}

# MKL finds the kernel of each of these functions when it is first called. Where two threads are the
# first together, one may get a kernel of 11 bits: the same inputs would not give the same artifact,
# once in hundreds of processes (pytorch/pytorch#188792). So they are called here, by one thread.
for _name in ("exp", "log", "sqrt", "sin", "cos", "tanh", "erf"):
    for _dtype in (torch.float32, torch.float64):
        getattr(torch, _name)(torch.ones(1, dtype=_dtype))

CPU_LAUNCHERS: dict[str, Callable[..., Any]] = {}
"""What runs an op on a CPU, by the op's name: to call it without PyTorch's dispatcher."""

CUDA_LAUNCHERS: dict[str, Callable[..., Any]] = {}
"""What runs an op on CUDA, by the op's name: for finding out what it launches without a GPU."""


def library_file() -> Path:
    """The library's file: the package's own, or the one that `SHADOWC_LIBRARY` names.

    Raises:
        KernelError: It is not built.
    """
    if other := os.environ.get("SHADOWC_LIBRARY"):
        return Path(other)
    found = sorted(Path(__file__).parent.glob("_native*.so"))
    if not found:
        raise KernelError(
            "the native library is not built",
            expected=f"{Path(__file__).parent}/_native*.so",
            fix=_BUILD,
        )
    return found[0]


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded library, its instruction set chosen.

    Raises:
        KernelError: It is not built, was built from other sources, or `SHADOWC_ISA` names an
            instruction set that it or this CPU does not have.
    """
    file = library_file()
    try:
        loaded = ctypes.CDLL(str(file.absolute()))
        abi = loaded.shadowc_abi()
    except (OSError, AttributeError) as error:
        raise KernelError(f"{file.name} cannot be loaded", got=error, fix=_BUILD) from error
    if abi != _ABI:
        raise KernelError(
            f"{file.name} was built from other sources", expected=_ABI, got=abi, fix=_BUILD
        )
    loaded.shadowc_isa.argtypes = [ctypes.c_char_p]
    loaded.shadowc_isa.restype = ctypes.c_char_p
    wanted = os.environ.get("SHADOWC_ISA")
    if loaded.shadowc_isa(wanted.encode() if wanted else None) is None:
        raise KernelError(
            "SHADOWC_ISA names an instruction set that is not available here",
            expected=" | ".join(ISAS) + ", and a CPU that has it",
            got=wanted,
            fix="unset SHADOWC_ISA to use the best one of this CPU",
        )
    return loaded


def use_openmp() -> None:
    """Run on OpenMP's threads from now on: for a runtime whose own work keeps those awake.

    Raises:
        KernelError: If this process has no OpenMP.
    """
    for name in (None, "libgomp.so.1"):  # what the process shares, or what torch has for itself
        try:
            library().shadowc_use_openmp(ctypes.CDLL(name).GOMP_parallel)
            return
        except (AttributeError, OSError):
            pass
    raise KernelError(
        "this process has no OpenMP", expected="GOMP_parallel, as torch for CPUs brings it"
    )


def isa() -> str:
    """The instruction set in use: `generic`, `avx2` or `avx512`."""
    name: bytes = library().shadowc_isa((os.environ.get("SHADOWC_ISA") or "").encode() or None)
    return name.decode()


def register(
    schema: str,
    launcher: Callable[..., Any],
    fake: Callable[..., Any],
    cuda: Callable[..., Any] | None = None,
) -> None:
    """Registers an op of the domain `shadowc` with its CPU launcher, its fake and its CUDA one."""
    name = schema.partition("(")[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, launcher, "CPU")
    CPU_LAUNCHERS[name] = launcher
    if cuda is not None:
        _LIBRARY.impl(name, cuda, "CUDA")
        CUDA_LAUNCHERS[name] = cuda
    torch.library.register_fake(f"shadowc::{name}", fake, lib=_LIBRARY)


def function(name: str, fields: str) -> Callable[..., int]:
    """A native function, as a callable that takes the fields of its argument struct.

    One packed struct costs a third of what ctypes takes for a dozen arguments.

    Args:
        name: The function is `shadowc_<name>`.
        fields: The C struct in the language of the module `struct`: `P` is a pointer (0 for none),
            `q` an int64, `i` an int, `f` a float.

    Returns:
        A callable that returns 0, or `POSITION`, and raises KernelError for every other refusal.
    """
    pack, symbol = struct.Struct(fields).pack, f"shadowc_{name}"

    def call(*values: object) -> int:
        code: int = getattr(library(), symbol)(pack(*values))
        if code > POSITION:
            raise KernelError(f"{symbol} refuses its arguments", got=_REFUSED.get(code, code))
        return code

    return call


def pointer(tensor: Tensor | None) -> int:
    """Address of a tensor's first value, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


def check(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """Refuses a tensor of another dtype or shape, one that is not contiguous, or not on the CPU.

    Raises:
        KernelError: Names the argument, what it must be and what it is.
    """
    if (
        tensor.dtype is not dtype
        or tensor.shape != shape
        or not tensor.is_contiguous()
        or not tensor.is_cpu
    ):
        raise _unfit(name, tensor, f"{dtype} {list(shape)}, contiguous, cpu")


def check_layout(name: str, tensor: Tensor, dtype: torch.dtype, *shape: int) -> None:
    """As `check`, wherever the tensor is: for what does not go to the native library."""
    if tensor.dtype is not dtype or tensor.shape != shape or not tensor.is_contiguous():
        raise _unfit(name, tensor, f"{dtype} {list(shape)}, contiguous")


def _unfit(name: str, tensor: Tensor, expected: str) -> KernelError:
    layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
    return KernelError(
        f"argument {name!r} does not fit",
        expected=expected,
        got=f"{tensor.dtype} {list(tensor.shape)}, {layout}, {tensor.device.type}",
    )


def check_optional(name: str, tensor: Tensor | None, dtype: torch.dtype, *shape: int) -> None:
    """As `check`, None being welcome."""
    if tensor is not None:
        check(name, tensor, dtype, *shape)


def check_rank(name: str, tensor: Tensor, rank: int) -> None:
    """Refuses a tensor that has not `rank` dimensions."""
    if tensor.dim() != rank:
        raise KernelError(
            f"argument {name!r} does not fit",
            expected=f"{rank} dimensions",
            got=list(tensor.shape),
        )


def check_one_token(name: str, tensor: Tensor, width: int) -> None:
    """Refuses a tensor that is not contiguous [B, 1, width]."""
    if tensor.shape[1:] != (1, width) or not tensor.is_contiguous():
        raise KernelError(
            f"argument {name!r} does not fit",
            expected=f"[B, 1, {width}], contiguous: one token of each row",
            got=list(tensor.shape),
        )


def check_keep(
    index: Tensor | None,
    count: Tensor | None,
    batch: int,
    units: int,
    check: Callable[..., None] = check,
) -> None:
    """Refuses a keep set that is not int32 `index` [B, N] with int32 `count` [B], or two None."""
    if index is None and count is None:
        return
    if index is None or count is None:
        raise KernelError(
            "a keep set is index and count together",
            expected="both or neither",
            got=f"index {'given' if count is None else 'None'}, "
            f"count {'None' if count is None else 'given'}",
        )
    check("index", index, torch.int32, batch, units)
    check("count", count, torch.int32, batch)


def weight_dtype(name: str, weight: Tensor) -> int:
    """Code of a matrix dtype.

    Raises:
        KernelError: The dtype is not float32, bfloat16 or float16.
    """
    code = DTYPES.get(weight.dtype)
    if code is None:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise KernelError(f"argument {name!r} does not fit", expected=known, got=weight.dtype)
    return code


def activation_code(activation: str) -> int:
    """Code of an activation.

    Raises:
        KernelError: The activation is not `relu`, `silu` or `gelu`.
    """
    code = ACTIVATIONS.get(activation)
    if code is None:
        raise KernelError(
            "argument 'activation' does not fit", expected=" | ".join(ACTIVATIONS), got=activation
        )
    return code


def activate(values: Tensor, activation: str) -> Tensor:
    """The activation in plain torch (`gelu` is the exact one)."""
    function: Callable[[Tensor], Tensor] = getattr(torch.nn.functional, activation)
    return function(values)


def keep_mask(index: Tensor | None, count: Tensor | None, units: int) -> Tensor | None:
    """Mask bool [B, N] of a keep set, None for None: for references."""
    if index is None or count is None:
        return None
    valid = torch.arange(units, device=index.device) < count[:, None]
    # Entries past the count land in a column that is cut off.
    places = torch.where(valid, index.long(), units)
    mask = torch.zeros(len(index), units + 1, dtype=torch.bool, device=index.device)
    return mask.scatter(1, places, True)[:, :units]
