"""The ONNX targets: one model for prompt and decode, fast where our library is registered.

`onnx-cpu` lowers as the `cpu` target does and writes the programs down as ONNX (`shadowc/onnx`).
ONNX has no state, so a mask that lasts longer than a token cannot be expressed. `onnx-cuda` is not
there yet: its library would register the same ops for `CUDAExecutionProvider`, backed by the cubins
of the CUDA targets and launched on the session's stream; the model is the same one.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

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

        save(export(session), directory)
        config = genai_config(session, json.loads((directory / "config.json").read_text()))
        (directory / "genai_config.json").write_text(json.dumps(config, indent=2) + "\n")

    def serve(
        self, session: Session, directory: Path, batch_sizes: Sequence[int], *, allow_jit: bool
    ) -> Session:
        """The models of the directory in ONNX Runtime."""
        self.requires()
        from shadowc.runtime.onnx import OnnxSession

        return OnnxSession.of(session, directory)


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


def genai_config(session: Session, config: dict[str, Any]) -> dict[str, Any]:
    """What ONNX Runtime GenAI must know of a model.

    Args:
        session: The artifact.
        config: The model's Hugging Face configuration.
    """
    from shadowc.onnx.names import INPUTS, MODEL, PAST, PRESENT

    shape = session.shape
    inputs = {name: name for name in INPUTS}
    inputs |= {f"past_{k}_names": PAST.format("%d", k) for k in ("key", "value")}
    outputs = {"logits": "logits"}
    outputs |= {f"present_{k}_names": PRESENT.format("%d", k) for k in ("key", "value")}
    eos = config.get("eos_token_id")
    pad = config.get("pad_token_id")
    return {
        "model": {
            "type": "llama" if shape.architecture == "llama" else "decoder",
            "bos_token_id": config.get("bos_token_id"),
            "eos_token_id": eos,
            "pad_token_id": eos if pad is None else pad,
            "context_length": session.max_seq_len,
            "vocab_size": shape.vocab,
            "decoder": {
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
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
    """The target."""
    return OnnxCpuTarget()
