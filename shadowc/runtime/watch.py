"""What a loaded artifact says of itself: one line when it is loaded, counters, and probes.

A probe runs a finished request once more with every unit, and asks which units mattered: whether
the predictor still keeps them, and whether dense decoding would have said the same. Text of another
kind than the calibration's shows there before anybody reads it in an answer.
"""

from __future__ import annotations

import logging
import math
import os
import sys
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from shadowc.config import ModelShape
from shadowc.errors import OptionError

if TYPE_CHECKING:
    from shadowc.runtime.session import Session

EVERY, ALARM = "SHADOWC_PROBE_EVERY", "SHADOWC_PROBE_ALARM"
LOGGER = logging.getLogger("shadowc")
_LAST = 8  # probes whose mean is held against the alarm
_COLLAPSE = 512


def announce(path: str | Path, manifest: Mapping[str, Any], runtime: str) -> None:
    """Log once what runs: the proof that it is the artifact, and not its dense original.

    Args:
        path: The artifact.
        manifest: What it says of itself.
        runtime: What loaded it, such as `transformers`.
    """
    if not (LOGGER.handlers or logging.getLogger().handlers):
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)
    policy = manifest["policy"]
    LOGGER.info(
        "%s in %s: %s, target %s, weights %s, skips %.0f%% of heads and %.0f%% of neurons, "
        "units by %s, masks refreshed every %s",
        Path(path).name,
        runtime,
        manifest["model"]["name"],
        manifest["target"],
        manifest["dtype"],
        100 * policy["head_sparsity"],
        100 * policy["neuron_sparsity"],
        (manifest["calibration"] or {}).get("predictor", "nothing"),
        {0: "prompt", 1: "token"}.get(policy["refresh"], f"{policy['refresh']} tokens"),
    )


class Counters:
    """Tokens that ran, and units that ran for them. Reading is what waits for a device.

    Attributes:
        prompt_tokens: Tokens of prompts, which run dense; padding counts.
        tokens: Tokens decoded.
    """

    def __init__(self, shape: ModelShape) -> None:
        self._units = {"head": shape.heads, "neuron": shape.ffn}
        self._layers = shape.layers
        self._sums: dict[str, list[Tensor]] = {kind: [] for kind in self._units}
        self._whole = dict.fromkeys(self._units, 0)
        self.prompt_tokens, self.tokens = 0, 0

    def decoded(self, batch: int, kept: Mapping[str, Tensor]) -> None:
        """Count a step.

        Args:
            batch: Its rows.
            kept: Its keep sets, as programs return them; what has none ran whole.
        """
        self.tokens += batch
        for kind, units in self._units.items():
            sets = kept.get(f"{kind}_count", kept.get(f"{kind}_keep"))
            if sets is None:
                self._whole[kind] += batch * self._layers * units
                continue
            self._whole[kind] += batch * (self._layers - len(sets)) * units  # layer 0's heads
            sums = self._sums[kind]
            sums.append(sets.sum())
            if len(sums) == _COLLAPSE:
                self._sums[kind] = [torch.stack(sums).sum()]

    def read(self) -> dict[str, int]:
        """`prompt_tokens`, `tokens`, `heads` and `neurons` that ran, and how many there are."""
        found = {"prompt_tokens": self.prompt_tokens, "tokens": self.tokens}
        for kind, units in self._units.items():
            ran = sum(int(total) for total in self._sums[kind])
            found[f"{kind}s"] = self._whole[kind] + ran
            found[f"{kind}s_dense"] = self.tokens * self._layers * units
        return found


class Watch:
    """Probes every n-th request, and warns when probes say that quality went.

    Args:
        every: n; 0 never. By default SHADOWC_PROBE_EVERY, or 0.
        alarm: Recall below which the mean of the last eight probes is a warning. By default
            SHADOWC_PROBE_ALARM, or none.

    Raises:
        OptionError: If one is out of range.
    """

    def __init__(self, every: int | None = None, alarm: float | None = None) -> None:
        self.every = int(_number(EVERY, every, 0, 1 << 31))
        self.alarm = _number(ALARM, alarm, 0.0, 1.0)
        self.requests = 0
        self.probes: deque[dict[str, float]] = deque(maxlen=_LAST)

    def due(self) -> bool:
        """Count a request; whether it is to be probed."""
        self.requests += 1
        return self.every > 0 and self.requests % self.every == 0

    def probe(self, session: Session, ids: Tensor, prompt: int) -> None:
        """Probe a request, log what was found, and warn if it is under the alarm.

        Args:
            session: What ran it.
            ids: int64 [1, T], prompt and answer, without padding.
            prompt: Tokens of the prompt.
        """
        from shadowc.evaluation.probe import probe

        try:
            found = probe(session, ids, prompt)
        except RuntimeError as error:  # such as too little memory: the answer is there already
            LOGGER.warning("request %d could not be probed: %s", self.requests, error)
            return
        if found is None:
            return
        with session.lock:  # of whoever reads the counters
            self.probes.append(found)
            mean = self.mean()["probe_recall"]
        LOGGER.info(
            "probe of request %d, %d tokens: recall %.2f, keeps %.0f%% of the heads and %.0f%% of "
            "the neurons that mattered most; %.0f%% of the tokens are dense's",
            self.requests,
            found["tokens"],
            found["recall"],
            *(100 * found[key] for key in ("recall_heads", "recall_neurons", "agreement")),
        )
        if mean < self.alarm:
            LOGGER.warning(
                "the predictor keeps %.2f of the units that matter, in the last %d probes, below "
                "%.2f: requests are unlike the calibration's text; calibrate with text like "
                "theirs (shadowc calibrate --data FILE), or skip less",
                mean,
                len(self.probes),
                self.alarm,
            )

    def mean(self) -> dict[str, float]:
        """Means of the last probes, as `probe_recall` and so on; empty before the first."""
        return {
            f"probe_{key}": math.fsum(one[key] for one in self.probes) / len(self.probes)
            for key in (self.probes[0] if self.probes else ())
        }


def _number(name: str, value: float | None, low: float, high: float) -> float:
    given: object = os.environ.get(name, 0) if value is None else value
    try:
        number = float(str(given))
        if low <= number <= high:
            return number
    except ValueError:
        pass
    raise OptionError(f"{name} is out of range", expected=f"{low} to {high}", got=given)
