"""What a measurement needs besides the artifact: held-out text and the original model."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shadowc.artifact import Artifact
from shadowc.calibration.data import evaluation_documents, evaluation_windows
from shadowc.errors import ModelError
from shadowc.models import LoadedModel, ModelSource, load_model
from shadowc.runtime.model import ShadowcForCausalLM

_MOST_CHARACTERS = 16  # of a token: what is longer need not be tokenized to be cut


def as_loaded(model: ShadowcForCausalLM) -> LoadedModel:
    """An artifact in the form that `calibration.data` takes: it has all that text needs."""
    source = ModelSource(**model.manifest["model"])
    return LoadedModel(model, model.tokenizer, model.session.shape, source)


def held_out(
    model: ShadowcForCausalLM, data: str, seq_len: int, tokens: int, stride: int | None = None
) -> list[list[int]]:
    """Windows of text to measure an artifact on.

    Args:
        model: The artifact.
        data: Name of a data set, or a file.
        seq_len: Tokens of a window.
        tokens: About how many tokens in all.
        stride: New tokens of each window but the first; None: windows do not overlap.

    Raises:
        DataError: The data set is unknown, unreachable, unreadable or too short.
        OptionError: `seq_len`, `tokens` or `stride` is out of range.
    """
    return evaluation_windows(
        as_loaded(model),
        data,
        seq_len,
        tokens,
        stride=stride,
        calibrated_on=_calibrated_on(model, data),
    )


def documents(
    model: ShadowcForCausalLM, data: str, windows: Sequence[Sequence[int]], tokens: int
) -> list[str]:
    """Texts to measure an artifact on, whole but for the last, which is cut between two words.

    Args:
        model: The artifact.
        data: Name of a data set, or a file.
        windows: What `held_out` gave: the texts, where `data` is `self`.
        tokens: About how many tokens in all.
    """
    if data == "self":
        return [model.tokenizer.decode(window, skip_special_tokens=True) for window in windows]
    found: list[str] = []
    for text in map(str.strip, evaluation_documents(data, _calibrated_on(model, data))):
        text = text[: _MOST_CHARACTERS * tokens]
        ids = model.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        if len(ids) > tokens:
            size = len(model.tokenizer.decode(ids[:tokens]))
            text = text[: size + 1].rsplit(maxsplit=1)[0]
        if text:
            found.append(text)
        tokens -= len(ids)
        if tokens <= 0:
            break
    return found


def _calibrated_on(model: ShadowcForCausalLM, data: str) -> str:
    calibration = model.manifest["calibration"]
    return calibration["data"] if calibration else data


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
