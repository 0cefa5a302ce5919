"""The `cpu` target: native kernels, half-precision weights, fp32 activations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx

from shadowc import native
from shadowc.config import Policy
from shadowc.errors import OptionError
from shadowc.passes.compact_masks import compact_masks
from shadowc.passes.fuse_choice import fuse_choice
from shadowc.passes.fuse_predictor import fuse_predictor
from shadowc.passes.fuse_rms_norm import fuse_rms_norm
from shadowc.passes.fuse_sparse_attention import fuse_sparse_attention
from shadowc.passes.fuse_sparse_mlp import fuse_sparse_mlp
from shadowc.passes.last_logits import last_logits
from shadowc.passes.lower_linear import lower_linear
from shadowc.passes.manager import Pass, run_passes
from shadowc.passes.pack_weights import Packed, Types, pack_weights
from shadowc.runtime.program import Program, to_program
from shadowc.runtime.session import Session
from shadowc.targets import Dialects, Tolerances


class CpuTarget:
    """Any CPU; see `targets.Target` for the methods."""

    name = "cpu"
    lazy_kv = False
    head_passes: tuple[Pass, ...] = (last_logits,)
    choice_passes: tuple[Pass, ...] = (fuse_choice, fuse_predictor)
    description = "any x86-64 or aarch64 CPU: native kernels, weights in fp32, bf16 or fp16"

    def tolerances(self, dtype: torch.dtype) -> Tolerances:
        """Activations are fp32 whatever the weights: only summation orders differ."""
        return Tolerances(decode=1e-3, original=0.1, masks=1e-3)

    def requires(self) -> None:
        """Raise KernelError unless the native library can be loaded."""
        native.library()

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
        """Lower every program; see `targets.Target.lower`."""
        packed, types = Packed(), Types(dtype)
        programs: dict[str, Program] = {}

        def add(name: str, module: fx.GraphModule, passes: tuple[Pass, ...]) -> None:
            run_passes(module, passes, dump=dump / name if dump else None)
            masked = ("logits", "head_mask", "neuron_mask") if sparse else ("logits",)
            programs[name] = to_program(module, module.meta.get("outputs", masked))

        def lowering(
            *choice: Pass, skip_zeros: bool = True, hold: bool = False
        ) -> tuple[Pass, ...]:
            return (
                fuse_rms_norm,
                fuse_sparse_attention,  # before the MLP: both fold the residual add that follows
                partial(fuse_sparse_mlp, skip_zeros=skip_zeros),
                *self.head_passes,
                partial(
                    compact_masks, policy=policy, hold=hold
                ),  # after fusing: it removes `compact`
                *choice,  # after that: it fuses what chooses keep sets, for one token
                lower_linear,
                partial(pack_weights, types=types, packed=packed),  # last: it binds what is left
            )

        add("dense", dialects.plain(), lowering(skip_zeros=False))
        if relu:
            add("exact", dialects.plain(), lowering())
        if sparse and not static:
            add("decode", dialects.masked(), lowering(*self.choice_passes))
        if sparse and (static or policy.refresh != 1):
            add("hold", dialects.masked(), lowering(hold=True))
        if sparse and not static and policy.refresh != 1:
            add("prefill", dialects.scored(), lowering(skip_zeros=False))
        masked = dialects.masked() if sparse else dialects.plain()
        add("masked", masked, (partial(pack_weights, types=types, packed=packed),))
        return programs, packed

    def batch_policy(self, dense_from_batch: int | None) -> dict[str, Any]:
        """No batch is better off dense: each row reads only what it keeps."""
        if dense_from_batch is not None:
            raise OptionError(
                "--dense-from-batch does not apply to the cpu target",
                expected="a CUDA target, on which the rows of a batch share what they read",
                got=dense_from_batch,
            )
        return {}

    def check_session(self, session: Session, directory: Path | None = None) -> Session:
        """The session as it is."""
        return session

    def save(self, session: Session, batch_sizes: Sequence[int], directory: Path) -> None:
        """Nothing: the native library belongs to the package."""

    def serve(
        self, session: Session, directory: Path, batch_sizes: Sequence[int], *, allow_jit: bool
    ) -> Session:
        """The session as it is; the native library must be there."""
        native.library()
        return session


def make(name: str) -> CpuTarget:
    """The target."""
    return CpuTarget()
