"""The calibration directory: `calibration.json` and `calibration.safetensors`, nothing executable.

The JSON carries the schema version and the tensor file's sha256 and size; loading checks all of
them, then the shapes, before anything is used.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from shadowc.calibration.damage import LEVELS
from shadowc.calibration.predictor import Predictor, ShadowPredictor, TwoLayerPredictor
from shadowc.calibration.quantiles import QUANTILES
from shadowc.config import ModelShape, predictor_name, taps_of
from shadowc.directory import atomic_directory, recover, sha256
from shadowc.errors import CalibrationError, OptionError

SCHEMA = 4
JSON_FILE = "calibration.json"
TENSOR_FILE = "calibration.safetensors"
_PREFIX = "predictor."
_UNREADABLE = (KeyError, TypeError, ValueError, RuntimeError, SafetensorError, OptionError)
_SIZES: dict[str, str | int] = {
    "mean_head_scores": "heads", "mean_neuron_scores": "ffn", "zero_rate": "ffn",
    "head_quantiles": QUANTILES, "neuron_quantiles": QUANTILES,
    "head_damage": LEVELS, "neuron_damage": LEVELS,
}  # fmt: skip


@dataclass(frozen=True)
class Calibration:
    """What was learnt about one model with one criterion.

    Scores are in ranking units: those in which units of different layers are compared.

    Attributes:
        model: Where the model came from (name, kind, path, revision, fingerprint).
        shape: Its shape.
        criterion: Name of the criterion.
        predictor: `shadow`, `layerwise`, `fullseq` or `static`.
        feature: `residual`, `normed`, `entry` or `context`, what the predictor reads.
        taps: The layers that it reads it in; none for `static`.
        rank: R; 0 for `static` and for the paper's fit.
        random_features: M; 0 for `static` and for the paper's fit.
        data: What it was calibrated on.
        examples: Number of examples, held-out ones included.
        tokens: Number of scored positions.
        seq_len: Longest example, in tokens.
        seed: Of the random features and of the `random` criterion.
        metrics: Held-out Spearman and recall, of all units and by layer, and the seconds it took.
        versions: Of the libraries that made it.
        mean_head_scores: fp32 [L, H].
        mean_neuron_scores: fp32 [L, F].
        zero_rate: fp32 [L, F], share of tokens whose activation is exactly zero.
        head_quantiles: fp32 [L, Q], of predicted scores on held-out tokens (0 in layer 0).
        neuron_quantiles: fp32 [L, Q].
        head_damage: fp32 [L, 33], loss that skipping a share of a layer's heads is predicted to
            cost, see `damage.py`.
        neuron_damage: fp32 [L, 33].
        weights: State of each tap's predictor, as `LAYER.NAME`; empty for `static`.
        fit: `ridge` or `paper`, how it was fitted.
        refresh: Tokens that a mask serves, by which it was fitted (as in `Policy`).
    """

    model: dict[str, Any]
    shape: ModelShape
    criterion: str
    predictor: str
    feature: str
    taps: tuple[int, ...]
    rank: int
    random_features: int
    data: str
    examples: int
    tokens: int
    seq_len: int
    seed: int
    metrics: dict[str, Any]
    versions: dict[str, str]
    mean_head_scores: Tensor
    mean_neuron_scores: Tensor
    zero_rate: Tensor
    head_quantiles: Tensor
    neuron_quantiles: Tensor
    head_damage: Tensor
    neuron_damage: Tensor
    weights: dict[str, Tensor] = field(default_factory=dict)
    fit: str = "ridge"
    refresh: int = 1

    @property
    def width(self) -> int:
        """Of the feature."""
        context = self.feature == "context"
        return self.shape.heads * self.shape.head_dim if context else self.shape.hidden

    @property
    def kind(self) -> list[str]:
        """What tells it from a calibration with one predictor, as a part of a name."""
        every = self.taps[1] if len(self.taps) > 1 else None
        return predictor_name(self.predictor, every, self.fit, self.refresh)

    def static(self) -> Calibration:
        """The same mean scores without a predictor."""
        return replace(
            self, predictor="static", taps=(), fit="ridge", refresh=1, rank=0, random_features=0,
            weights={},
        )  # fmt: skip

    def build_predictors(self) -> list[Predictor]:
        """The predictor of each tap, with its weights; none for `static`."""
        if self.predictor == "static":
            return []
        made: list[Predictor] = []
        for tap in taps_of(self.shape.layers, self.taps):
            network: Predictor
            if self.fit == "paper":
                hidden = (len(self.weights[f"0.{kind}_first"]) for kind in ("heads", "neurons"))
                network = TwoLayerPredictor(self.shape, (next(hidden), next(hidden)), self.width)
            else:
                sizes = self.rank, self.random_features, self.width
                network = ShadowPredictor(self.shape, *sizes, tap)
            prefix = f"{tap.layer}."
            own = {
                k.removeprefix(prefix): v for k, v in self.weights.items() if k.startswith(prefix)
            }
            network.load_state_dict(own)
            made.append(network.eval())
        return made

    def summary(self) -> dict[str, Any]:
        """Everything but the tensors, as plain JSON values."""
        names = (item.name for item in fields(self) if item.name not in (*_SIZES, "weights"))
        return {name: getattr(self, name) for name in names} | {"shape": self.shape.to_json()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by the names that they have in the file."""
        own = {name: getattr(self, name) for name in _SIZES}
        return own | {_PREFIX + name: value for name, value in self.weights.items()}


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
    recover(path.parent)
    while True:
        text = _read(path)
        try:
            return _load(path, text)
        except CalibrationError:
            if _read(path) == text:
                raise  # otherwise another calibration took its place meanwhile


def _load(path: Path, text: bytes) -> Calibration:
    """The calibration of a header."""
    try:
        header = json.loads(text)
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
        digest = hashlib.sha256(payload).hexdigest()  # of what is used, whatever is there by now
        if len(payload) != entry["bytes"] or digest != entry["sha256"]:
            size = f"{entry['bytes']} bytes with sha256 {entry['sha256']}"
            raise _damaged(tensor_path, size, f"{len(payload)} bytes, or another hash")
        tensors = safetensors.torch.load(payload)
        own = {name: tensors.pop(name) for name in _SIZES}
        weights = {name.removeprefix(_PREFIX): value for name, value in tensors.items()}
        header |= {"shape": ModelShape(**header["shape"]), "taps": tuple(header["taps"])}
        header |= {"weights": weights, **own}
        calibration = Calibration(**header)
        _check_shapes(calibration)
    except _UNREADABLE as error:
        raise _damaged(path, "the keys and tensor shapes of a calibration", error) from error
    return calibration


def _check_shapes(calibration: Calibration) -> None:
    """Raise unless every tensor has the size that the model's shape gives it."""
    shape = calibration.shape
    for name, units in _SIZES.items():
        expected = shape.layers, units if isinstance(units, int) else getattr(shape, units)
        if (got := getattr(calibration, name).shape) != expected:
            raise ValueError(f"{name} is {tuple(got)}, not {expected}")
    calibration.build_predictors()


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
