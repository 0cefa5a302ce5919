"""Text that an artifact was not calibrated on, in its own tokens."""

from __future__ import annotations

from shadowc.calibration.data import evaluation_windows
from shadowc.models import LoadedModel, ModelSource
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
