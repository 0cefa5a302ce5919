"""The targets, one family a file: what each requires, how it lowers, saves and loads."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from shadowc.errors import OptionError

if TYPE_CHECKING:
    import torch
    from torch import fx

    from shadowc.config import Policy
    from shadowc.passes.pack_weights import Packed
    from shadowc.runtime.program import Program
    from shadowc.runtime.session import Session

#: Target name -> the module whose `make(name)` gives it, imported when it is asked for.
TARGETS = {
    "cpu": "shadowc.targets.cpu",
    "onnx-cpu": "shadowc.targets.onnx",
    "onnx-cuda": "shadowc.targets.onnx",
} | dict.fromkeys(("a100", "h100", "h200", "l4", "rtx4090"), "shadowc.targets.cuda")

#: Targets that run on a CPU.
ON_CPU = ("cpu", "onnx-cpu")

#: Targets that run batches of any size.
ANY_BATCH = (*ON_CPU, "onnx-cuda")


@dataclass(frozen=True)
class Dialects:
    """A graph in the forms that a target lowers; each call gives a fresh copy.

    Attributes:
        plain: Blocks found, nothing masked.
        scored: Blocks, scores, and masks that nothing uses.
        masked: Blocks, scores, and masks applied: the semantics.
    """

    plain: Callable[[], fx.GraphModule]
    scored: Callable[[], fx.GraphModule]
    masked: Callable[[], fx.GraphModule]


@dataclass(frozen=True)
class Tolerances:
    """How far a target's programs may be from what they were made from.

    Attributes:
        decode: Decode against masked program with the same masks, as a share of the largest logit.
        original: Dense program against the original model, once weights were rounded.
        masks: Share of units whose mask may differ.
        greedy: Length of a greedy continuation that must be that of the masked program.
    """

    decode: float
    original: float
    masks: float
    greedy: int = 0


class Target(Protocol):
    """One target: hardware and runtime.

    Attributes:
        name: Its name.
        description: What it is, in a line.
        lazy_kv: Whether its steps can leave keys and values of skipped heads to later.
    """

    name: str
    description: str
    lazy_kv: bool

    def tolerances(self, dtype: torch.dtype) -> Tolerances:
        """How far programs may be off with weights of that type."""

    def requires(self) -> None:
        """Raise KernelError unless this machine can compile for the target."""

    def lower(
        self,
        dialects: Dialects,
        policy: Policy,
        *,
        sparse: bool,
        static: bool,
        relu: bool,
        dtype: torch.dtype,
        lazy: bool = False,
        dump: Path | None = None,
    ) -> tuple[dict[str, Program], Packed]:
        """Lower every program that an artifact of this target runs.

        Args:
            dialects: The graph before lowering.
            policy: How many units run.
            sparse: Whether any unit is ever skipped; otherwise there is no predictor.
            static: Whether the keep sets are fixed at compile time.
            relu: Whether activations are often exactly zero, so that `exact` makes sense.
            dtype: Type of the stored matrices.
            lazy: Also lower steps whose keys and values wait; for targets with `lazy_kv`.
            dump: Directory for the graphs after each pass, a folder a program.

        Returns:
            Programs by name (see `runtime.session.PROGRAMS`) and the tensors that they share.
        """

    def batch_policy(self, dense_from_batch: int | None) -> dict[str, Any]:
        """From which batch on every unit runs: entries of the manifest.

        Args:
            dense_from_batch: The user's wish; 0 means never, None what was measured for the target.

        Raises:
            OptionError: If it does not apply.
        """

    def check_session(self, session: Session, directory: Path | None = None) -> Session:
        """Where compile checks the programs: the target's device if it is here.

        Args:
            session: Programs and tensors.
            directory: What was written of the artifact, once it was.
        """

    def save(self, session: Session, batch_sizes: Sequence[int], directory: Path) -> None:
        """Write what the target needs besides programs and tensors."""

    def serve(
        self, session: Session, directory: Path, batch_sizes: Sequence[int], *, allow_jit: bool
    ) -> Session:
        """The session on the target's device.

        Args:
            session: Programs and tensors of an artifact.
            directory: The artifact.
            batch_sizes: Batches that its steps were compiled for.
            allow_jit: Compile kernels for another GPU than the target's.

        Raises:
            KernelError: If this machine cannot run the target.
        """


def load_target(name: str, *, lazy_kv: bool = False) -> Target:
    """The target of that name.

    Args:
        name: Its name.
        lazy_kv: Whether it shall have lazy keys and values.

    Raises:
        OptionError: If there is no such target, or it has none.
    """
    if name not in TARGETS:
        raise OptionError(f"unknown target {name!r}", expected=", ".join(TARGETS), got=name)
    target = cast(Target, importlib.import_module(TARGETS[name]).make(name))
    if lazy_kv and not target.lazy_kv:
        raise OptionError(
            f"target {name!r} has no lazy keys and values",
            expected="--lazy-kv with a CUDA target",
            got=name,
            fix="compile without --lazy-kv",
        )
    return target
