"""`shadowc.load`: a directory becomes a model that generates."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from shadowc.artifact import MANIFEST, Artifact, open_artifact
from shadowc.errors import ArtifactError
from shadowc.manifest import read_policy, read_shape
from shadowc.runtime.checks import check_programs
from shadowc.runtime.program import Program
from shadowc.runtime.session import Session
from shadowc.runtime.watch import Watch, announce
from shadowc.targets import load_target

if TYPE_CHECKING:
    from shadowc.runtime.model import ShadowcForCausalLM

_KEEP = "keep."


def load(
    path: str | Path,
    *,
    allow_jit: bool = False,
    probe_every: int | None = None,
    probe_alarm: float | None = None,
    check_finite: bool = False,
) -> ShadowcForCausalLM:
    """Load an artifact after checking its schema, sizes and hashes.

    Args:
        path: The directory that `shadowc compile` wrote.
        allow_jit: Run on another GPU than the target's, with kernels compiled here (needs Triton).
        probe_every: Probe every n-th request, see `runtime/watch.py`; 0 never.
        probe_alarm: Recall below which probes warn.
        check_finite: Stop where logits are not finite, and name the layer.

    Returns:
        A model for transformers' `generate`, with its `tokenizer`.

    Raises:
        ArtifactError: If the artifact is missing, damaged or of another version; names the file.
        KernelError: If this machine cannot run its target.
        OptionError: If a setting of the probes is out of range.
    """
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    from shadowc.runtime.model import ShadowcForCausalLM

    watch = Watch(probe_every, probe_alarm)
    artifact = open_artifact(path)
    with artifact.unreplaced():
        session = load_session(artifact, allow_jit=allow_jit)
        session.check_finite = check_finite
        own = {"local_files_only": True}
        code = {"trust_remote_code": False}
        try:
            file = "config.json"
            config = AutoConfig.from_pretrained(artifact.path, **code, **own)
            file = "generation_config.json"
            generation = GenerationConfig.from_pretrained(artifact.path, **own)
            file = "tokenizer.json, or tokenizer_config.json,"
            tokenizer = AutoTokenizer.from_pretrained(
                artifact.path, padding_side="left", **code, **own
            )
            file = "config.json"
            manifest = artifact.manifest
            model = ShadowcForCausalLM(config, generation, session, manifest, tokenizer, watch)
        except Exception as error:  # libraries that read them fail in many ways
            raise ArtifactError(
                f"{artifact.path / file} is missing or damaged",
                expected="config.json, generation_config.json and a tokenizer",
                got=f"{type(error).__name__}: {error}"[:400],
                fix="compile the artifact again",
            ) from error
    announce(artifact.path, artifact.manifest, "transformers")
    return model


def load_session(artifact: Artifact, *, allow_jit: bool = False) -> Session:
    """The bare step function of an artifact, without tokenizer or transformers.

    Raises:
        ArtifactError: If a file is not what a session can run, or was replaced; names it.
        KernelError: If this machine cannot run its target.
    """
    with artifact.unreplaced():  # what was checked is what is read
        return _load_session(artifact, allow_jit)


def _load_session(artifact: Artifact, allow_jit: bool) -> Session:
    manifest, listing = artifact.manifest, artifact.path / MANIFEST
    shape, policy = read_shape(listing, manifest), read_policy(listing, manifest)
    length = int(manifest["max_seq_len"])
    batches = tuple(manifest.get("batch_sizes", (1,)))
    dense_from = manifest.get("dense_from_batch")
    backend = load_target(manifest["target"])  # it registers the ops that programs call
    tensors = artifact.tensors()
    keep = {
        name.removeprefix(_KEEP): value for name, value in tensors.items() if name.startswith(_KEEP)
    }
    programs = {
        name: Program.from_json(value, f"programs/{name}.json")
        for name, value in artifact.programs().items()
    }
    check_programs(artifact.path, programs, shape, tensors, length)
    with torch.no_grad():  # not inference mode: probes ask these tensors for gradients
        session = Session(
            shape, policy, programs, tensors, keep, length, manifest["predictor_bytes"]
        )
        if dense_from is not None:
            session.dense_from_batch, session.dense_program = dense_from, manifest["dense_program"]
            session.program(session.dense_program)  # it must be there
        session = backend.serve(session, artifact.path, batches, allow_jit=allow_jit)
        session.reopened = artifact.reopened
        return session
