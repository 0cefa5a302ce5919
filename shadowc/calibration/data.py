"""Text in, token windows out: what a model is calibrated on, and what it is evaluated on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One calibration sequence.

    Attributes:
        ids: Token ids, BOS first if the tokenizer has one.
        scored: For each id, whether its prediction counts in the loss (never the first one's).
            Plain text scores all of them; a question with an answer scores the answer only.
    """

    ids: list[int]
    scored: list[bool]
