"""The calibration directory: `calibration.json` and `calibration.safetensors`, nothing executable.

The JSON carries the schema version and the tensor file's sha256 and size; loading checks all of
them, then the shapes, before anything is used.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from shadowc.calibration.predictor import ShadowPredictor
from shadowc.config import ModelShape
from shadowc.directory import atomic_directory, sha256
from shadowc.errors import CalibrationError

SCHEMA = 1
JSON_FILE = "calibration.json"
TENSOR_FILE = "calibration.safetensors"
_PREFIX = "predictor."
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
        """The predictor with its weights; None for `static`."""
        if self.predictor == "static":
            return None
        shape = self.shape
        width = shape.hidden if self.feature == "residual" else shape.heads * shape.head_dim
        predictor = ShadowPredictor(shape, self.rank, self.random_features, width)
        predictor.load_state_dict(self.weights)
        return predictor.eval()

    def summary(self) -> dict[str, Any]:
        """Everything but the tensors, as plain JSON values."""
        names = (item.name for item in fields(self) if item.name not in (*_MEANS, "weights"))
        return {name: getattr(self, name) for name in names} | {"shape": self.shape.to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names that they have in the file."""
        means = {name: getattr(self, name) for name in _MEANS}
        return means | {_PREFIX + name: value for name, value in self.weights.items()}


def save_calibration(calibration: Calibration, directory: str | Path) -> Path:
    """Write a calibration directory, whole or not at all; one that is there is replaced.

    Returns:
        The directory.

    Raises:
        CalibrationError: If it cannot be written, or something else is there.
    """
    target = Path(directory).resolve()
    with atomic_directory(target, marker=JSON_FILE, error=CalibrationError) as new:
        file = new / TENSOR_FILE
        file.write_bytes(safetensors.torch.save(calibration.tensors()))
        entry = {"file": TENSOR_FILE, "bytes": file.stat().st_size, "sha256": sha256(file)}
        header = {"schema": SCHEMA, **calibration.summary(), "tensors": entry}
        (new / JSON_FILE).write_text(json.dumps(header, indent=2) + "\n", encoding="utf-8")
    return target


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
        raise _damaged(path, "JSON", error) from error
    schema = header.pop("schema", None) if isinstance(header, dict) else None
    if schema != SCHEMA:
        raise CalibrationError(
            f"{path} has another schema than this version of shadowc reads",
            expected=SCHEMA,
            got=schema,
            fix="calibrate again: shadowc calibrate MODEL",
        )
    tensor_path = path.with_name(TENSOR_FILE)
    payload = _read(tensor_path)
    try:
        entry = header.pop("tensors")
        if len(payload) != entry["bytes"] or sha256(tensor_path) != entry["sha256"]:
            size = f"{entry['bytes']} bytes with sha256 {entry['sha256']}"
            raise _damaged(tensor_path, size, f"{len(payload)} bytes, or another hash")
        tensors = safetensors.torch.load(payload)
        means = {name: tensors.pop(name) for name in _MEANS}
        weights = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
        header |= {"shape": ModelShape(**header["shape"]), "weights": weights, **means}
        calibration = Calibration(**header)
        _check_shapes(calibration)
    except (KeyError, TypeError, ValueError, RuntimeError, SafetensorError) as error:
        raise _damaged(path, "the keys and tensor shapes of a calibration", error) from error
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
