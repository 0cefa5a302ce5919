"""The calibration directory: `calibration.json` and `calibration.safetensors`, nothing executable.

The JSON carries the schema version and the tensor file's sha256 and size; loading checks all of
them, then the shapes, before anything is used.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from shadowc.calibration.predictor import ShadowPredictor
from shadowc.config import ModelShape
from shadowc.errors import CalibrationError

SCHEMA = 1
JSON_FILE = "calibration.json"
TENSOR_FILE = "calibration.safetensors"
_MEANS = ("mean_head_scores", "mean_neuron_scores", "zero_rate")


@dataclass(frozen=True)
class Calibration:
    """What was learnt about one model with one criterion.

    Scores are in ranking units: those in which units of different layers are compared.

    Attributes:
        model: Where the model came from (name, kind, path, revision, fingerprint).
        shape: Its shape.
        criterion: Name of the criterion.
        predictor: `shadow` or `static`.
        feature: `residual` or `context`, what the predictor reads.
        rank: R, or 0 for `static`.
        random_features: M, or 0 for `static`.
        data: What it was calibrated on.
        examples: Number of examples, held-out ones included.
        tokens: Number of scored positions.
        seq_len: Longest example, in tokens.
        seed: Of the random features and of the `random` criterion.
        metrics: Held-out Spearman and recall, and the seconds it took.
        versions: Of the libraries that made it.
        mean_head_scores: fp32 [L, H].
        mean_neuron_scores: fp32 [L, F].
        zero_rate: fp32 [L, F], share of tokens whose activation is exactly zero.
        weights: State of the `ShadowPredictor`; empty for `static`.
    """

    model: dict[str, Any]
    shape: ModelShape
    criterion: str
    predictor: str
    feature: str
    rank: int
    random_features: int
    data: str
    examples: int
    tokens: int
    seq_len: int
    seed: int
    metrics: dict[str, float]
    versions: dict[str, str]
    mean_head_scores: Tensor
    mean_neuron_scores: Tensor
    zero_rate: Tensor
    weights: dict[str, Tensor] = field(default_factory=dict)

    def build_predictor(self) -> ShadowPredictor | None:
        """The predictor with its weights; None for `static`.

        Raises:
            CalibrationError: If the weights do not fit the shape.
        """
        if self.predictor == "static":
            return None
        predictor = ShadowPredictor(self.shape, self.rank, self.random_features)
        try:
            predictor.load_state_dict(self.weights)
        except RuntimeError as error:
            raise CalibrationError("the predictor does not fit the model", got=error) from error
        return predictor.eval()

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names they have in the file."""
        means = {name: getattr(self, name) for name in _MEANS}
        return means | {f"predictor.{name}": value for name, value in self.weights.items()}


def save_calibration(calibration: Calibration, directory: str | Path) -> Path:
    """Write a calibration directory, whole or not at all.

    An existing calibration there is replaced; any other non-empty directory is refused.

    Returns:
        The directory.

    Raises:
        CalibrationError: If it cannot be written.
    """
    target = Path(directory).resolve()
    tensors = {name: value.contiguous() for name, value in calibration.tensors().items()}
    payload = safetensors.torch.save(tensors)
    header: dict[str, Any] = {"schema": SCHEMA}
    for item in fields(calibration):
        if item.name not in (*_MEANS, "weights"):
            header[item.name] = getattr(calibration, item.name)
    header["shape"] = asdict(calibration.shape)
    header["tensors"] = {
        "file": TENSOR_FILE,
        "sha256": hashlib.sha256(payload).hexdigest(),
        "bytes": len(payload),
    }
    text = json.dumps(header, indent=2) + "\n"
    try:
        _replace(target, {TENSOR_FILE: payload, JSON_FILE: text.encode()})
    except OSError as error:
        raise CalibrationError(
            f"cannot write the calibration {target}",
            expected="a writable directory with enough free space",
            got=error.strerror or error,
            fix="free some space or choose another place with --output",
        ) from error
    return target


def _replace(target: Path, files: dict[str, bytes]) -> None:
    """Put a directory of `files` at `target`: a temporary one beside it, fsync, rename."""
    if target.exists() and (not target.is_dir() or {*os.listdir(target)} - {*files}):
        raise CalibrationError(
            f"{target} exists and is not a calibration",
            expected="a new directory, or a calibration to replace",
            fix="choose another place with --output",
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        new, old = work / "new", work / "old"
        new.mkdir()
        for name, content in files.items():
            with open(new / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        _sync_directory(new)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        _sync_directory(target.parent)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    """Make the names in `path` durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_calibration(directory: str | Path) -> Calibration:
    """Read a calibration directory after checking schema, size, hash and shapes.

    Raises:
        CalibrationError: If a file is missing, truncated, edited or of another schema; it names
            the file.
    """
    path = Path(directory) / JSON_FILE
    try:
        header = json.loads(_read(path))
    except ValueError as error:
        raise _damaged(path, "valid JSON", error) from error
    if not isinstance(header, dict) or header.pop("schema", None) != SCHEMA:
        raise _damaged(path, f"schema {SCHEMA}", "another schema, or none")
    try:
        entry = header.pop("tensors")
        digest, size = entry["sha256"], entry["bytes"]
        header["shape"] = ModelShape(**header["shape"])
    except (KeyError, TypeError) as error:
        raise _damaged(path, "the keys of a calibration", error) from error

    path = Path(directory) / TENSOR_FILE
    payload = _read(path)
    if len(payload) != size or hashlib.sha256(payload).hexdigest() != digest:
        raise _damaged(path, f"{size} bytes with sha256 {digest}", f"{len(payload)} bytes")
    try:
        tensors = safetensors.torch.load(payload)
        means = {name: tensors.pop(name) for name in _MEANS}
        weights = {name.removeprefix("predictor."): value for name, value in tensors.items()}
        calibration = Calibration(**header, **means, weights=weights)
    except (SafetensorError, KeyError, TypeError) as error:
        raise _damaged(path, "the tensors of a calibration", error) from error
    try:
        _check_shapes(calibration)
    except (CalibrationError, TypeError, ValueError) as error:
        raise _damaged(path, "tensors of the shape that the JSON states", error) from error
    return calibration


def _check_shapes(calibration: Calibration) -> None:
    """Raise unless every tensor has the size that the model's shape gives it."""
    shape = calibration.shape
    for name in _MEANS:
        units = shape.heads if name == "mean_head_scores" else shape.ffn
        got = getattr(calibration, name).shape
        if got != (shape.layers, units):
            raise ValueError(f"{name} is {tuple(got)}, not {(shape.layers, units)}")
    calibration.build_predictor()


def _read(path: Path) -> bytes:
    """The whole file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise CalibrationError(
            f"cannot read {path}",
            expected=f"a directory with {JSON_FILE} and {TENSOR_FILE}",
            got=error.strerror,
            fix="make it with: shadowc calibrate MODEL",
        ) from error


def _damaged(path: Path, expected: str, got: object) -> CalibrationError:
    """The error for a file that is not as it was written."""
    return CalibrationError(
        f"{path} is damaged or was edited",
        expected=expected,
        got=got,
        fix="calibrate again: shadowc calibrate MODEL",
    )
