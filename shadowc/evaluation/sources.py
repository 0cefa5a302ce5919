"""What a measurement needs besides the artifact: held-out text and the original model."""

from __future__ import annotations

import torch

from shadowc.artifact import Artifact
from shadowc.calibration.data import evaluation_windows
from shadowc.errors import ModelError
from shadowc.models import LoadedModel, ModelSource, load_model
from shadowc.runtime.model import ShadowModel


def as_loaded(model: ShadowModel) -> LoadedModel:
    """An artifact in the form that `calibration.data` takes: it has all that text needs."""
    source = ModelSource(**model.manifest["model"])
    return LoadedModel(model, model.tokenizer, model.session.shape, source)


def held_out(model: ShadowModel, data: str, seq_len: int, tokens: int) -> list[list[int]]:
    """Windows of text to measure an artifact on.

    Args:
        model: The artifact.
        data: Name of a data set, or a file.
        seq_len: Tokens of a window.
        tokens: About how many tokens in all.

    Raises:
        DataError: The data set is unknown, unreachable, unreadable or too short.
        OptionError: `seq_len` or `tokens` is out of range.
    """
    calibration = model.manifest["calibration"]
    return evaluation_windows(
        as_loaded(model),
        data,
        seq_len,
        tokens,
        calibrated_on=calibration["data"] if calibration else data,
    )


def original(artifact: Artifact, dtype: torch.dtype = torch.float32) -> LoadedModel:
    """The model that an artifact was compiled from.

    Raises:
        ModelError: If it cannot be found, or is another one now.
    """
    source = artifact.manifest["model"]
    loaded = load_model(source["name"], dtype=dtype)
    if loaded.source.fingerprint != source["fingerprint"]:
        raise ModelError(
            f"{source['name']} is not the model that was compiled any more",
            expected=source["fingerprint"],
            got=loaded.source.fingerprint,
        )
    return loaded
