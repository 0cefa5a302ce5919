"""What a manifest says, with types and ranges checked: `open_artifact` believes nothing else."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shadowc.config import ModelShape, Policy
from shadowc.errors import ArtifactError, OptionError
from shadowc.foreign import damaged
from shadowc.targets import TARGETS

DTYPES = ("float32", "bfloat16", "float16")
_MOST = 1 << 31
_MOST_LAYERS, _MOST_ROWS, _MOST_TOKENS = 4096, 4096, 1 << 24


def check_manifest(path: Path, manifest: Mapping[str, Any]) -> None:
    """Raise unless every entry that this package reads is of its type and range.

    Args:
        path: The file, for errors.
        manifest: What it holds.

    Raises:
        ArtifactError: Names the file and the entry.
    """

    def text(value: Any) -> bool:
        return isinstance(value, str) and len(value) < 4096 and value.isprintable()

    def number(value: Any) -> bool:
        return type(value) in (int, float) and math.isfinite(value)

    def within(least: int, most: int) -> Callable[[Any], bool]:
        return lambda value: type(value) is int and least <= value <= most

    def batches(value: Any) -> bool:
        return (
            isinstance(value, list)
            and 0 < len(value) <= 64
            and all(map(within(1, _MOST_ROWS), value))
        )

    def calibration(value: Any) -> bool:
        plain = ("criterion", "predictor", "feature", "data")
        return value is None or (
            isinstance(value, dict) and all(text(value[key]) for key in plain if key in value)
        )

    wanted: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "target": (", ".join(TARGETS), lambda v: isinstance(v, str) and v in TARGETS),
        "dtype": (", ".join(DTYPES), lambda v: isinstance(v, str) and v in DTYPES),
        "max_seq_len": (f"1 to {_MOST_TOKENS}", within(1, _MOST_TOKENS)),
        "batch_sizes": ("a list of rows", batches),
        "lazy_kv": ("true or false", lambda v: type(v) is bool),
        "dense_from_batch": ("rows or null", lambda v: v is None or within(1, _MOST_ROWS)(v)),
        "dense_program": ("full or dense", lambda v: v in ("full", "dense")),
        "predictor_bytes": ("a number", lambda v: number(v) and v >= 0),
        "calibration": ("what a calibration says of itself", calibration),
        "versions": (
            "versions by name",
            lambda v: isinstance(v, dict) and all(v is None or text(v) for v in v.values()),
        ),
    }
    optional = ("batch_sizes", "lazy_kv", "dense_from_batch", "dense_program")
    for key, (expected, fits) in wanted.items():
        if key in manifest or key not in optional:
            value = manifest.get(key)
            if (key not in manifest) or not fits(value):
                raise damaged(path, f"{key}: {expected}", value)
    if manifest.get("dense_from_batch") is not None and "dense_program" not in manifest:
        raise damaged(path, "dense_program beside dense_from_batch", None)
    model = manifest.get("model")
    names = ("name", "kind", "path", "revision", "fingerprint")
    if not isinstance(model, dict) or model.keys() != {*names}:
        raise damaged(path, f"model: {', '.join(names)}", model)
    for key in names:
        value = model[key]
        if not (text(value) or (value is None and key in ("path", "revision"))):
            raise damaged(path, f"model: a text as {key}", value)
    read_shape(path, manifest)
    read_policy(path, manifest)


def read_shape(path: Path, manifest: Mapping[str, Any]) -> ModelShape:
    """The model's shape.

    Raises:
        ArtifactError: It is not one.
    """
    value = manifest.get("shape")
    kinds = {field.name: field.type for field in dataclasses.fields(ModelShape)}
    if not isinstance(value, dict) or value.keys() != kinds.keys():
        raise damaged(path, f"shape: {', '.join(kinds)}", value)
    for name, kind in kinds.items():
        item = value[name]
        most = _MOST_LAYERS if name == "layers" else _MOST
        fits = {
            "int": type(item) is int and 0 < item < most,
            "bool": type(item) is bool,
            "str": isinstance(item, str) and len(item) < 64,
        }
        if not fits[str(kind)]:
            raise damaged(path, f"shape: {kind} {name}", item)
    shape = ModelShape(**value)
    if shape.heads % shape.kv_heads:
        raise damaged(path, "shape: heads a multiple of kv_heads", shape.heads)
    return shape


def read_policy(path: Path, manifest: Mapping[str, Any]) -> Policy:
    """The policy.

    Raises:
        ArtifactError: It is not one.
    """
    value = manifest.get("policy")
    if not isinstance(value, dict):
        raise damaged(path, "policy: an object", value)
    for name, item in value.items():
        shares = name in ("head_shares", "neuron_shares")
        numbers = item if shares and isinstance(item, list) else [item]
        if name not in ("scope", "selection") and any(
            type(one) not in (int, float) for one in numbers
        ):
            raise damaged(path, f"policy: a number as {name}", item)
        whole = name in ("refresh", "min_heads", "min_neurons")
        if whole and not (type(item) is int and 0 <= item < _MOST):
            raise damaged(path, f"policy: a whole number as {name}", item)
    try:
        return Policy(**value)
    except (TypeError, ValueError, OptionError) as error:
        raise ArtifactError(
            f"{path} is damaged or not of this version",
            expected="a policy",
            got=str(error)[:300],
            fix="compile the artifact again",
        ) from error
