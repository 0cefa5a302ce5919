"""AOTInductor packages: an artifact's programs as machine code, for C++ without Python.

    programs/prefill.pt2    a prompt: ids and positions int64 [1, T], start and position int64 [1],
                            2 L caches fp32 [1, G, S, D], written -> logits fp32 [1, 1, V]
    programs/decode.pt2     the same of one token, with what the policy skips

A package holds no weight: its constants bear the names of the artifact's tensors, and whoever loads
it hands them over as they are mapped. Its metadata say the sizes of the caches. It calls the ops
that kernels/cpu/libtorch registers; examples/cpp shows all of it. Python never loads a package from
an artifact, because one holds machine code.
"""

from __future__ import annotations

import logging
import platform
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx
from torch.export import Dim

from shadowc.errors import KernelError, NumericsError, OptionError, PassError

if TYPE_CHECKING:
    from shadowc.config import Policy
    from shadowc.runtime.program import Program
    from shadowc.runtime.session import Session

_TOKENS = ("input_ids", "position_ids", "start", "position")
_SETTINGS: dict[str, Any] = {
    "aot_inductor.package_constants_in_so": False,
    "aot_inductor.enable_line_tables": False,  # two thirds of a package
    # Not what this machine has, but what all that we support have.
    "cpp.march": "x86-64-v3",
    "cpp.simdlen": 256,
    "cpp.dynamic_threads": True,
}


def check_options(target: str, policy: Policy, *, predicts: bool) -> None:
    """Refuse early what cannot be packaged.

    Args:
        target: Name of the target.
        policy: How many units run.
        predicts: Whether a predictor chooses them.

    Raises:
        OptionError: If target or policy have no packages.
        KernelError: If this machine cannot compile them.
    """
    if target != "cpu":
        raise OptionError(
            "--aot-inductor is for the cpu target",
            expected="--target cpu",
            got=target,
            fix="compile without --aot-inductor",
        )
    if predicts and policy.refresh != 1:
        raise OptionError(
            "--aot-inductor needs masks that are new for every token, or that never change",
            expected="--refresh token or --predictor static",
            got=f"refresh {policy.refresh or 'prompt'}",
        )
    here = f"{sys.platform} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if not here.startswith("linux x86_64 AVX"):
        raise KernelError(
            "AOTInductor packages are compiled on the kind of machine that runs them",
            expected="Linux on x86-64 with AVX2",
            got=here,
        )
    from torch._inductor.cpp_builder import get_cpp_compiler

    with _compiler_errors():
        get_cpp_compiler()


def write_packages(session: Session, directory: Path, tolerance: float) -> None:
    """Compile what a prompt and a decoded token run into `programs/*.pt2`, and check both.

    Args:
        session: The artifact's programs, with its tensors as they were written.
        directory: The artifact.
        tolerance: How far logits may be off, as a share of the largest.

    Raises:
        KernelError: If the compiler fails.
        NumericsError: If a package does not give its program's logits.
    """
    cache = session.new_cache(1)
    names = {"prefill": session.prompt_program, "decode": session.step_program(cache)}
    length = 5  # not a size that anything else has
    ids = torch.arange(length + 1)[None] + 5
    caches = [tensor.clone() for tensor in cache.tensors]
    for package, tokens in (("prefill", ids[:, :length]), ("decode", ids[:, length:])):
        program = session.program(names[package])
        position = torch.tensor([cache.length])
        places = position + torch.arange(tokens.shape[1])[None]
        inputs = [tokens, places, torch.zeros_like(position), position, *caches]
        path = directory / "programs" / f"{package}.pt2"
        _compile(_module(program, session.tensors), inputs, session, path)
        expected = session.step(tokens, cache, program=names[package])["logits"]
        found = _run(path, session.tensors, inputs)
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= tolerance:
            raise NumericsError(
                f"{path.name} does not agree with the program {names[package]!r}",
                expected=f"at most {tolerance} of the largest logit apart",
                got=f"{error:.3g}",
                fix="report it with the versions of torch and of the compiler",
            )


def _module(program: Program, tensors: Mapping[str, Tensor]) -> fx.GraphModule:
    """A program as a module that owns its tensors and returns the logits alone.

    Keep sets that never change are inputs of a program; here they are constants like the weights.
    """
    root = torch.nn.Module()
    graph = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    placeholders = program.graph.find_nodes(op="placeholder")
    constants = dict(zip(placeholders, program.weights, strict=False))
    constants |= {
        node: f"keep.{node.name}" for node in placeholders if f"keep.{node.name}" in tensors
    }
    for node, name in constants.items():
        *path, leaf = name.split(".")
        owner = root
        for part in path:
            if not hasattr(owner, part):
                owner.add_module(part, torch.nn.Module())
            owner = owner.get_submodule(part)
        # Not a buffer: AOTInductor copies those.
        owner.register_parameter(leaf, torch.nn.Parameter(tensors[name], requires_grad=False))
        values[node] = graph.get_attr(name)
    for node in program.graph.nodes:
        if node.op == "output":
            graph.output((values[node.args[0][0]],))
        elif node not in values:
            values[node] = graph.node_copy(node, lambda n: values[n])
    module = fx.GraphModule(root, graph)
    graph.eliminate_dead_code()
    module.recompile()
    return module


def _compile(module: fx.GraphModule, inputs: list[Tensor], session: Session, path: Path) -> None:
    """Write one package."""
    taken = [node.name for node in module.graph.find_nodes(op="placeholder")]
    if (*taken[:4], len(taken)) != (*_TOKENS, len(inputs)):
        raise PassError("a package takes tokens and caches alone", got=taken[:8])
    length = Dim("T", min=1, max=session.max_seq_len) if inputs[0].shape[1] > 1 else None
    grid = None if length is None else {1: length}
    shape = session.shape
    sizes = {"layers": shape.layers, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim,
             "vocab": shape.vocab, "max_seq_len": session.max_seq_len}  # fmt: skip
    metadata = {name: str(size) for name, size in sizes.items()}
    metadata["torch"] = torch.__version__.partition("+")[0]
    with torch.no_grad(), warnings.catch_warnings(), _compiler_errors():
        warnings.simplefilter("ignore")
        exported = torch.export.export(
            module, tuple(inputs), dynamic_shapes=(grid, grid, *[None] * (len(inputs) - 2))
        )
        torch._inductor.aoti_compile_and_package(
            exported,
            package_path=str(path),
            inductor_configs=_SETTINGS | {"aot_inductor.metadata": metadata},
        )


def _run(path: Path, tensors: Mapping[str, Tensor], inputs: list[Tensor]) -> Tensor:
    """The logits of a package that this process wrote."""
    # It warns that the package was compiled for less than this CPU has, as it shall be.
    log = logging.getLogger("torch.export.pt2_archive._package")
    log.addFilter(_no_record)
    try:
        loaded = torch._inductor.aoti_load_package(str(path))
    finally:
        log.removeFilter(_no_record)
    with torch.no_grad():
        constants = {name: tensors[name] for name in loaded.get_constant_fqns()}
        loaded.load_constants(constants, check_full_update=True, user_managed=True)
        logits: Tensor = loaded(*inputs)[0]
        return logits


def _no_record(record: logging.LogRecord) -> bool:
    return False


@contextmanager
def _compiler_errors() -> Iterator[None]:
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    try:
        yield
    except (CppCompileError, InvalidCxxCompiler) as error:
        raise KernelError(
            "AOTInductor packages need a C++ compiler",
            expected="g++ or clang++ on the PATH, or the environment variable CXX",
            got=str(error)[:500],
            fix="install one (Debian: apt-get install g++), or compile without --aot-inductor",
        ) from error
