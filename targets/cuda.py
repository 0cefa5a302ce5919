"""The CUDA targets: Triton kernels for decode steps, cuBLAS for prompts, on the same weights.

`a100`, `h100`, `h200`, `l4` and `rtx4090` differ in their profile (`shadowc.cuda.PROFILES`). An
artifact holds the kernels compiled for its target, so that compiling needs no GPU and serving
compiles nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from shadowc import cuda, native
from shadowc.config import Policy
from shadowc.errors import OptionError
from shadowc.passes.catch_up import catch_up
from shadowc.passes.compact_masks import compact_masks
from shadowc.passes.fuse_choice import fuse_choice
from shadowc.passes.fuse_norms import fuse_norms
from shadowc.passes.fuse_rms_norm import fuse_rms_norm
from shadowc.passes.fuse_sparse_attention import fuse_sparse_attention
from shadowc.passes.fuse_sparse_mlp import fuse_sparse_mlp
from shadowc.passes.insert_predictor import PREFIX
from shadowc.passes.last_feature import last_feature
from shadowc.passes.last_logits import last_logits
from shadowc.passes.lazy_kv import lazy_kv
from shadowc.passes.lower_linear import lower_linear
from shadowc.passes.manager import Pass, run_passes
from shadowc.passes.pack_weights import Packed, Types, pack_weights
from shadowc.runtime.cuda import STEPS, CudaSession
from shadowc.runtime.lazy import CATCH_UP, LAZY, LazyState
from shadowc.runtime.program import Program, to_program
from shadowc.runtime.session import Session
from shadowc.targets import Dialects, Tolerances


class CudaTarget:
    """One GPU; see `targets.Target` for the methods.

    Args:
        name: Name of a profile.
    """

    lazy_kv = True

    def __init__(self, name: str) -> None:
        self.name, self.profile = name, cuda.find_profile(name)
        arch, rate = self.profile.arch, self.profile.bandwidth / 1e9
        self.description = (
            f"NVIDIA {name.upper()} (sm_{arch}, {rate:,.0f} GB/s): Triton kernels in CUDA graphs; "
            f"{self.profile.measured}"
        )

    def tolerances(self, dtype: torch.dtype) -> Tolerances:
        """Activations have the type of the weights, as they have in transformers."""
        share = {torch.float32: 1e-3, torch.float16: 1e-2}.get(dtype, 5e-2)
        return Tolerances(decode=share, original=0.1, masks=max(share, 2e-2))

    def requires(self) -> None:
        """Raise KernelError unless Triton is installed: it compiles for GPUs that are not here."""
        cuda.triton_package("compiling for a GPU needs Triton, which compiles without one too")

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
        """Lower every program; see `targets.Target.lower`.

        Besides those of the `cpu` target there is `full`: one token with our kernels and every
        unit, the dense baseline that reads weights as fast as the sparse programs do.
        """
        packed: Packed = {}
        known: dict[str, Tensor] = {}
        programs: dict[str, Program] = {}

        def add(
            name: str, module: fx.GraphModule, passes: tuple[Pass, ...], compute: torch.dtype
        ) -> None:
            """Lower a program, and then what is made of it."""
            types = Types(dtype, vectors=dtype, compute=compute)
            pack = partial(pack_weights, types=types, packed=packed)  # last: it binds what is left
            run_passes(module, (*passes, pack), dump=dump / name if dump else None)
            masked = ("logits", "head_mask", "neuron_mask") if sparse else ("logits",)
            programs[name] = to_program(module, module.meta.get("outputs", masked))
            if lazy and name in LAZY:
                for made, rewrite in ((LAZY[name], lazy_kv), (CATCH_UP, catch_up)):
                    run_passes(module, (rewrite,), dump=dump / made if dump else None)
                    programs[made] = to_program(module, module.meta["outputs"])

        def step(*, skip_zeros: bool = True, hold: bool = False) -> tuple[Pass, ...]:
            return (
                fuse_rms_norm,
                fuse_sparse_attention,  # before the MLP: both fold the residual add that follows
                partial(fuse_sparse_mlp, skip_zeros=skip_zeros),
                partial(
                    fuse_norms, dtype=dtype, known=known
                ),  # after both: it joins what they made
                partial(compact_masks, policy=policy, hold=hold),
                fuse_choice,  # keep sets first: it fuses what made them
                lower_linear,
            )

        # Products of many tokens are cuBLAS's business; only attention needs the cache.
        prompt = (
            fuse_rms_norm,
            partial(fuse_sparse_attention, core=True),
            last_logits,
            last_feature,
            partial(compact_masks, policy=policy),
            partial(lower_linear, only=PREFIX),  # the predictor computes in fp32
        )
        # Steps first: they decide which matrices are stored transposed.
        add("full", dialects.plain(), step(skip_zeros=False), torch.float32)
        if relu:
            add("exact", dialects.plain(), step(), torch.float32)
        if sparse and not static:
            add("decode", dialects.masked(), step(), torch.float32)
        if sparse and (static or policy.refresh != 1):
            add("hold", dialects.masked(), step(hold=True), torch.float32)
        add("dense", dialects.plain(), prompt, dtype)
        if sparse and not static and policy.refresh != 1:
            add("prefill", dialects.scored(), prompt, dtype)
        add("masked", dialects.masked() if sparse else dialects.plain(), (), torch.float32)
        return programs, packed

    def batch_policy(self, dense_from_batch: int | None) -> dict[str, Any]:
        """What was asked for, or what the profile says was measured."""
        if dense_from_batch is not None and (dense_from_batch < 0 or dense_from_batch == 1):
            raise OptionError(
                "--dense-from-batch is out of range",
                expected="0 (never) or at least 2 rows: from 1 on nothing would ever be skipped",
                got=dense_from_batch,
            )
        least = self.profile.dense_from_batch if dense_from_batch is None else dense_from_batch
        return {"dense_from_batch": least or None, "dense_program": self.profile.dense_program}

    def check_session(self, session: Session, directory: Path | None = None) -> Session:
        """On the target's GPU if it is here, otherwise on the ops' references on the CPU."""
        if not self._is_here():
            return session
        return CudaSession.of(session, (1,), self.name)

    def save(self, session: Session, batch_sizes: Sequence[int], directory: Path) -> None:
        """Compile every kernel that the step programs launch and write it down."""
        found: dict[str, tuple[cuda.KernelSpec, Any]] = {}
        with cuda.using(self.name, jit=None):
            for batch in {1, *batch_sizes}:  # a prompt runs for its own rows, however few
                found |= record(session, batch)
        arch = self.profile.arch
        images = [cuda.compile_kernel(kernel, spec, arch) for spec, kernel in found.values()]
        cuda.save_images(directory, images)

    def serve(
        self, session: Session, directory: Path, batch_sizes: Sequence[int], *, allow_jit: bool
    ) -> Session:
        """On this machine's GPU, with the artifact's kernels."""
        cuda.check_device(self.name, allow_jit)
        cuda.triton_package("the kernels' launchers need Triton, also where it compiles nothing")
        name = self.name
        if self._is_here():
            cuda.load_images(directory, self.profile.arch)
        else:
            name = cuda.profile().name
        return CudaSession.of(session, batch_sizes, name, jit=allow_jit)

    def _is_here(self) -> bool:
        return torch.cuda.is_available() and self.profile.names(torch.cuda.get_device_name())


def make(name: str) -> CudaTarget:
    """The target of that name."""
    return CudaTarget(name)


def record(session: Session, batch: int) -> dict[str, tuple[cuda.KernelSpec, Any]]:
    """The kernels that a batch's programs launch for one token, found without a GPU."""
    shape, slots = session.shape, session.max_seq_len
    tensors = {name: value.to("meta") for name, value in session.tensors.items()}
    some = next(value for name, value in tensors.items() if name.endswith("_t"))
    cache = some.new_empty(batch, shape.kv_heads, slots, shape.head_dim)
    whole, integers = cache.new_empty(batch, dtype=torch.int64), torch.int32
    values = {
        "input_ids": whole[:, None],
        "position_ids": whole[:, None],
        "start": whole,
        "position": whole[:1],
    }
    for kind, layers, units in (
        ("head", shape.layers - 1, shape.heads),
        ("neuron", shape.layers, shape.ffn),
    ):
        values[f"{kind}_index"] = cache.new_empty(layers, batch, units, dtype=integers)
        values[f"{kind}_count"] = cache.new_empty(layers, batch, dtype=integers)
    names = [*STEPS, "prefill"]
    if batch == 1 and CATCH_UP in session.programs:
        state = LazyState(session.programs[CATCH_UP], shape, some.dtype, "meta")
        values |= state.tensors
        names.append(CATCH_UP)
    else:
        names = [name for name in names if name not in LAZY.values()]
    with cuda.recording() as found:
        for name in names:
            if name in session.programs:
                program = session.programs[name]
                run_on_meta(program, tensors, {**values}, cache)
    return found


def run_on_meta(
    program: Program, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], cache: Tensor
) -> None:
    """Run a program so that shadowc's ops reach their CUDA launchers though there is no GPU."""
    inputs = [tensors[name] for name in program.weights]
    inputs += [values.get(name, cache) for name in program.inputs]
    known: dict[fx.Node, Any] = {}
    given = iter(inputs)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            known[node] = next(given)
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
            target = node.target
            if getattr(target, "namespace", "") == "shadowc":
                target = native.CUDA_LAUNCHERS[target._opname]
            known[node] = target(*args, **kwargs)
