"""The pipeline, top-down: a calibration and a checkpoint become an artifact."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from shadowc import aot_inductor as packages
from shadowc import artifact as artifacts
from shadowc import stored, targets
from shadowc.calibration.predictor import Predictor
from shadowc.calibration.store import Calibration
from shadowc.config import Policy, Tap
from shadowc.errors import CalibrationError, OptionError
from shadowc.evaluation.numerics import check_numerics, device_name
from shadowc.passes.canonicalize import canonicalize
from shadowc.passes.find_blocks import find_blocks
from shadowc.passes.insert_predictor import StaticScores, export_masks, insert_predictor
from shadowc.passes.manager import Pass, copy_module, run_passes
from shadowc.passes.mask_attention import mask_attention
from shadowc.passes.mask_mlp import mask_mlp
from shadowc.passes.pack_weights import Packed
from shadowc.runtime.config import artifact_config
from shadowc.runtime.program import Program
from shadowc.runtime.session import Session
from shadowc.selection import Selection, TopK, selections
from shadowc.stored import MAX_SHARD_SIZE, Stored
from shadowc.trace import trace
from shadowc.versions import versions

if TYPE_CHECKING:
    from shadowc.models import LoadedModel


def compile_model(
    loaded: LoadedModel,
    calibration: Calibration | None,
    policy: Policy,
    output: Path,
    *,
    target: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
    max_seq_len: int | None = None,
    batch_sizes: Sequence[int] = (1,),
    lazy_kv: bool = False,
    dense_from_batch: int | None = None,
    aot_inductor: bool = False,
    extra: dict[str, Any] | None = None,
    dump: Path | None = None,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Callable[[int, int], object] = lambda written, total: None,
) -> artifacts.Artifact:
    """Compile a model: trace -> masked dialect -> target's programs -> artifact, checked.

    Weights are packed while they are written, one at a time, and the check runs from what was
    written. So a model whose parameters are mapped from its files (`load_model(..., dtype=None)`)
    is never in memory as a whole.

    Args:
        loaded: The model, in fp32 or the type of its checkpoint.
        calibration: What chooses the units; None only when the policy skips none.
        policy: How many units run.
        output: The artifact's directory.
        target: Name of a target.
        dtype: Type of the stored matrices.
        max_seq_len: S, prompt and generation together; the model's own limit by default.
        batch_sizes: Batches whose decode steps a CUDA artifact holds kernels for.
        lazy_kv: Let keys and values of skipped heads wait, where a batch is one row.
        dense_from_batch: Rows from which on a CUDA artifact runs every unit; 0 never, None as
            measured for the target.
        aot_inductor: Also write AOTInductor packages, for C++ without Python (target `cpu`).
        extra: More entries for the manifest.
        dump: Directory for the graphs after every pass.
        max_shard_size: Most bytes of weights in a file.
        progress: Called with the bytes of tensors that are written, and with those of all.

    Returns:
        The artifact, whose programs agree with the model (checked on text).

    Raises:
        OptionError: If keys and values cannot wait, or there are no packages, with that target or
            policy.
        KernelError: If this machine cannot compile for the target, or packages.
        CalibrationError: If the calibration belongs to another model.
        NumericsError: If a lowered program does not agree with what it was made from.
        ArtifactError: If the artifact cannot be written, or will not fit on the disk.
    """
    began = time.perf_counter()
    backend = targets.load_target(target, lazy_kv=lazy_kv)
    backend.requires()
    if (
        lazy_kv
        and policy.heads_kept(loaded.shape) == (loaded.shape.layers - 1) * loaded.shape.heads
    ):
        raise OptionError(
            "lazy keys and values are those of skipped heads",
            expected="--lazy-kv with a policy that skips heads",
            got="every head runs",
            fix="compile without --lazy-kv",
        )
    batch_policy = backend.batch_policy(dense_from_batch)
    sparse = policy.head_sparsity > 0 or policy.neuron_sparsity > 0
    if dense_from_batch and not sparse:
        raise OptionError(
            "--dense-from-batch does not apply: no batch skips anything",
            expected="a --sparsity above 0",
            got=dense_from_batch,
        )
    predicts = sparse and calibration is not None and calibration.predictor != "static"
    if aot_inductor:
        packages.check_options(target, policy, predicts=predicts)
    if calibration is not None:
        check_same_model(loaded, calibration)

    traced = trace(loaded.model).module(check_guards=False)
    built = build_programs(traced, loaded, calibration, policy, backend, dtype, dump, lazy_kv)
    length = max_seq_len or loaded.shape.max_positions
    report: dict[str, Any] = {}

    def finish(directory: Path) -> None:
        """Write what the target adds, and check what was written."""
        written = stored.load(sorted(directory.glob("*.safetensors")))
        session = Session(
            loaded.shape,
            policy,
            built.programs,
            written,
            built.keep,
            length,
            predictor_bytes=built.predictor_bytes,
        )
        backend.save(session, batch_sizes, directory)
        checking = backend.check_session(session, directory)
        checked = check_numerics(checking, loaded, backend.tolerances(dtype))
        checked["checked_on"] = device_name(checking)
        if aot_inductor:
            packages.write_packages(session, directory, backend.tolerances(dtype).decode)
        report["compile"] = checked | {"seconds": round(time.perf_counter() - began, 1)}

    config = artifact_config(loaded.model.config, target, length)
    manifest = {
        "model": vars(loaded.source),
        "shape": loaded.shape.to_json(),
        "calibration": None if calibration is None else calibration.summary(),
        "policy": policy.to_json(),
        "target": target,
        "dtype": str(dtype).removeprefix("torch."),
        "max_seq_len": length,
        "batch_sizes": list(batch_sizes),
        "lazy_kv": lazy_kv,
        **(batch_policy if sparse else {}),
        "predictor_bytes": built.predictor_bytes,
        "versions": versions(),
        **(extra or {}),
    }
    return artifacts.write_artifact(
        output,
        manifest=manifest,
        tensors=built.stored
        | {f"keep.{name}": Stored.of(value) for name, value in built.keep.items()},
        programs={name: program.to_json() for name, program in built.programs.items()},
        report=report,
        pretrained=(config, loaded.model.generation_config, loaded.tokenizer),
        more=finish,
        max_shard_size=max_shard_size,
        progress=progress,
    )


@dataclass(frozen=True)
class Built:
    """What lowering gave: programs, the tensors they share, and keep sets that never change."""

    programs: dict[str, Program]
    stored: Packed
    keep: dict[str, Tensor]
    predictor_bytes: float

    @cached_property
    def packed(self) -> dict[str, Tensor]:
        """The tensors, in memory: for a session of what is not written."""
        return {name: tensor.make() for name, tensor in self.stored.items()}


def build_programs(
    traced: fx.GraphModule,
    loaded: LoadedModel,
    calibration: Calibration | None,
    policy: Policy,
    backend: targets.Target,
    dtype: torch.dtype,
    dump: Path | None = None,
    lazy_kv: bool = False,
) -> Built:
    """Run the passes and the target's lowering on a traced graph (which may be reused).

    Args:
        traced: What `trace` gave, as a module; made canonical in place.
        loaded: The model it came from.
        calibration: What chooses the units.
        policy: How many units run.
        backend: The target.
        dtype: Type of the stored matrices.
        dump: Directory for the graphs.
        lazy_kv: Whether keys and values of skipped heads may wait.
    """
    sparse = policy.head_sparsity > 0 or policy.neuron_sparsity > 0
    run_passes(traced, (canonicalize,), dump=dump / "traced" if dump else None)
    found: tuple[Pass, ...] = (partial(find_blocks, shape=loaded.shape),)
    scored, masked = found, found
    keep: dict[str, Tensor] = {}
    if sparse:
        if calibration is None:
            raise CalibrationError(
                "skipping units needs a calibration",
                fix="run: shadowc calibrate MODEL; or compile with --sparsity 0",
            )
        chosen = selections(calibration, policy)
        predictors: list[Predictor | StaticScores] = [*calibration.build_predictors()]
        if not predictors:
            static = StaticScores(calibration.mean_head_scores, calibration.mean_neuron_scores)
            keep = static_keep(static, chosen[0])
            predictors = [static]
        masks = export_masks(predictors, chosen, calibration.width)
        insert = partial(insert_predictor, masks=masks, feature=calibration.feature)
        scored = (*found, insert)
        masked = (*scored, mask_attention, mask_mlp)  # after the insert: they multiply by its masks

    def dialect(passes: tuple[Pass, ...], name: str) -> fx.GraphModule:
        return run_passes(copy_module(traced), passes, dump=dump / name if dump else None)

    dialects = targets.Dialects(
        plain=partial(dialect, found, "plain"),
        scored=partial(dialect, scored, "scored"),
        masked=partial(dialect, masked, "masked"),
    )
    programs, packed = backend.lower(
        dialects,
        policy,
        sparse=sparse,
        static=bool(keep),
        relu=loaded.shape.activation == "relu",
        dtype=dtype,
        lazy=lazy_kv,
        dump=dump,
    )
    if sparse and calibration is not None:  # what `static` would rank by, for evaluation
        packed["scores.heads"] = Stored.of(calibration.mean_head_scores)
        packed["scores.neurons"] = Stored.of(calibration.mean_neuron_scores)
    read = 0.0
    if "decode" in programs:
        names = set(programs["decode"].weights)
        size = sum(t.nbytes for n, t in packed.items() if n in names and n.startswith("predictor."))
        read = size / policy.refresh if policy.refresh else 0.0
    return Built(programs, packed, keep, read)


def static_keep(
    scores: StaticScores, chosen: tuple[Tap, Selection, Selection]
) -> dict[str, Tensor]:
    """The keep sets of mean scores, for one row: index int32 [L, 1, N], count int32 [L, 1]."""
    keep: dict[str, Tensor] = {}
    _, heads, neurons = chosen
    for kind, score, how in (("head", scores.heads, heads), ("neuron", scores.neurons, neurons)):
        row = score[None].contiguous()
        if isinstance(how, TopK):
            index, count = torch.ops.shadowc.select(row, how.keep, how.floor, how.local)
        else:
            index, count = torch.ops.shadowc.select_above(row, how)
        if int(count.sum()) < score.numel():
            keep |= {f"{kind}_index": index, f"{kind}_count": count}
    return keep


def check_same_model(loaded: LoadedModel, calibration: Calibration) -> None:
    """Raise CalibrationError unless the calibration was made with this very model."""
    if calibration.shape != loaded.shape:
        raise CalibrationError(
            "the calibration was made for a model of another shape",
            expected=loaded.shape,
            got=calibration.shape,
            fix="calibrate this model",
        )
    if calibration.model["fingerprint"] != loaded.source.fingerprint:
        raise CalibrationError(
            "the calibration was made with other weights",
            expected=f"{loaded.source.name} {loaded.source.fingerprint}",
            got=f"{calibration.model['name']} {calibration.model['fingerprint']}",
            fix="calibrate this model again",
        )
