"""The ONNX targets: one model for prompt and decode, fast where our library is registered.

`onnx-cpu` lowers as the `cpu` target does and writes the programs down as ONNX (`shadowc/onnx`).
ONNX has no state, so a mask that lasts longer than a token cannot be expressed. `onnx-cuda` writes
the same model and puts the kernels of its nodes into it, compiled for several GPUs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from shadowc import cuda
from shadowc.config import Policy
from shadowc.errors import KernelError, OptionError
from shadowc.passes.pack_weights import Packed
from shadowc.runtime.program import Program
from shadowc.runtime.session import Session
from shadowc.targets import Dialects, Tolerances
from shadowc.targets.cpu import CpuTarget


class OnnxCpuTarget(CpuTarget):
    """ONNX Runtime's CPU provider; see `targets.Target` for the methods."""

    name = "onnx-cpu"
    description = "ONNX Runtime on any CPU; from 1.17 on fast with shadowc's custom-op library"
    head_passes = ()  # a model's logits are those of all tokens
    provider = "cpu"
    choice_passes = ()  # ONNX Runtime's calls are cheap, and masks are what its nodes exchange

    def tolerances(self, dtype: torch.dtype) -> Tolerances:
        """Those of the `cpu` target, and 64 equal tokens: another runtime is a step further."""
        return replace(super().tolerances(dtype), greedy=64)

    def requires(self) -> None:
        """Raise KernelError unless onnx, ONNX Runtime and the native library are there."""
        super().requires()
        _import_runtime()

    def lower(
        self,
        dialects: Dialects,
        policy: Policy,
        *,
        sparse: bool,
        static: bool,
        **settings: Any,
    ) -> tuple[dict[str, Program], Packed]:
        """As the `cpu` target does.

        Raises:
            OptionError: If masks shall last longer than a token.
        """
        if policy.refresh != 1 and sparse and not static:
            raise OptionError(
                "an ONNX model carries no masks from one token to the next",
                expected="--refresh token",
                got="prompt" if policy.refresh == 0 else policy.refresh,
                fix="compile for the cpu target, or with --predictor static",
            )
        return super().lower(dialects, policy, sparse=sparse, static=static, **settings)

    def check_session(self, session: Session, directory: Path | None = None) -> Session:
        """In ONNX Runtime what was written; before that the programs themselves."""
        from shadowc.runtime.onnx import OnnxSession

        return session if directory is None else OnnxSession.of(session, directory, tuned=False)

    def save(self, session: Session, batch_sizes: Sequence[int], directory: Path) -> None:
        """Write and check the models, and what ONNX Runtime GenAI wants to know."""
        from shadowc.onnx.export import export, save

        save(export(session, cuda=self.provider == "cuda"), directory)
        config = json.loads((directory / "config.json").read_text())
        config = genai_config(session, config, self.provider)
        (directory / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def serve(
        self, session: Session, directory: Path, batch_sizes: Sequence[int], *, allow_jit: bool
    ) -> Session:
        """The models of the directory in ONNX Runtime."""
        self.requires()
        from shadowc.runtime.onnx import OnnxSession

        return OnnxSession.of(session, directory)


class OnnxCudaTarget(OnnxCpuTarget):
    """ONNX Runtime's CUDA provider; see `targets.Target` for the methods."""

    name = "onnx-cuda"
    description = (
        "ONNX Runtime on NVIDIA GPUs (sm_80, sm_89, sm_90); fast for one row with shadowc's "
        "custom-op library; measured on h100: benchmarks/results/onnx-cuda.md"
    )
    provider = "cuda"

    def tolerances(self, dtype: torch.dtype) -> Tolerances:
        """A prompt's products, and those without our library, are of the type of the weights."""
        share = 1e-3 if dtype is torch.float32 else 1e-2
        return Tolerances(decode=share, original=0.1, masks=max(share, 2e-2), greedy=64)

    def requires(self) -> None:
        """Raise KernelError unless Triton is there besides."""
        super().requires()
        cuda.triton_package("compiling for a GPU needs Triton, which compiles without one too")

    def lower(
        self,
        dialects: Dialects,
        policy: Policy,
        *,
        sparse: bool,
        static: bool,
        **settings: Any,
    ) -> tuple[dict[str, Program], Packed]:
        """As for CPUs.

        Raises:
            OptionError: If matrices shall be bf16, of which ONNX Runtime has no products on a CPU,
                where a model is checked that is compiled without a GPU.
        """
        if settings["dtype"] is torch.bfloat16:
            raise OptionError(
                "the onnx-cuda target has no bf16",
                expected="--dtype fp16 or fp32",
                got="bf16",
                fix="compile with --dtype fp16",
            )
        return super().lower(dialects, policy, sparse=sparse, static=static, **settings)

    def batch_policy(self, dense_from_batch: int | None) -> dict[str, Any]:
        """The model runs every unit of two rows and more."""
        if dense_from_batch not in (None, 2):
            raise OptionError(
                "--dense-from-batch does not fit: the kernels of an ONNX model are for one row",
                expected=2,
                got=dense_from_batch,
            )
        return {"dense_from_batch": 2, "dense_program": "dense"}

    def check_session(self, session: Session, directory: Path | None = None) -> Session:
        """What was written: on a GPU if one is here, otherwise the functions on the CPU."""
        from shadowc.runtime.onnx import OnnxSession, cuda_is_here

        if directory is None:
            return session
        here = cuda_is_here()
        return OnnxSession.of(session, directory, tuned=False, cuda=here, library=here)

    def serve(
        self, session: Session, directory: Path, batch_sizes: Sequence[int], *, allow_jit: bool
    ) -> Session:
        """The models of the directory in ONNX Runtime on this machine's GPU."""
        _import_runtime()
        from shadowc.runtime.onnx import OnnxSession

        return OnnxSession.of(session, directory, cuda=True)


def _import_runtime() -> None:
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise KernelError(
            "the ONNX targets need onnx and ONNX Runtime",
            got=error,
            fix="pip install 'shadowc[onnx]'",
        ) from error
    _ = onnx, onnxruntime


def genai_config(session: Session, config: dict[str, Any], provider: str = "cpu") -> dict[str, Any]:
    """What ONNX Runtime GenAI must know of a model.

    Args:
        session: The artifact.
        config: The model's Hugging Face configuration.
        provider: `cpu` or `cuda`.
    """
    from shadowc.onnx.names import INPUTS, MODEL, PAST, PRESENT

    shape = session.shape
    inputs = {name: name for name in INPUTS}
    inputs |= {f"past_{k}_names": PAST.format("%d", k) for k in ("key", "value")}
    outputs = {"logits": "logits"}
    outputs |= {f"present_{k}_names": PRESENT.format("%d", k) for k in ("key", "value")}
    eos = config.get("eos_token_id")
    pad = config.get("pad_token_id")
    options: list[Any] = [] if provider == "cpu" else [{provider: {}}]
    return {
        "model": {
            "type": "llama" if shape.architecture == "llama" else "decoder",
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": eos,
            "pad_token_id": eos if pad is None else pad,
            "context_length": session.max_seq_len,
            "vocab_size": shape.vocab,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": options},
                "filename": MODEL,
                "head_size": shape.head_dim,
                "hidden_size": shape.hidden,
                "num_attention_heads": shape.heads,
                "num_hidden_layers": shape.layers,
                "num_key_value_heads": shape.kv_heads,
                "inputs": inputs,
                "outputs": outputs,
            },
        },
        "search": {
            "do_sample": False,
            "max_length": session.max_seq_len,
            "past_present_share_buffer": False,
        },
    }


def make(name: str) -> OnnxCpuTarget:
    """The target of that name."""
    return OnnxCudaTarget() if name == "onnx-cuda" else OnnxCpuTarget()
