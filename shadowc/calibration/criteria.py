"""Criteria: how much a unit matters, from its activation a and the loss gradient g there.

A unit's a and g are the D values of a head, or the single value of a neuron, at the input of its
block's output projection. Sums over d run over them. A criterion scores one layer's units of one
kind at a time, token by token; the score of an example is the sum of its tokens' scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowc.errors import OptionError


@dataclass(frozen=True)
class Units:
    """One layer's heads or neurons in one batch.

    Attributes:
        kind: `heads` or `neurons`.
        layer: Index of the layer.
        a: fp32 [B, T, U, D], activations (D is 1 for neurons).
        g: fp32 [B, T, U, D], gradient of the sum over examples of their mean loss.
        generator: Seeded; for criteria that draw.
    """

    kind: str
    layer: int
    a: Tensor
    g: Tensor
    generator: torch.Generator


@dataclass(frozen=True)
class Moments:
    """What is known of one layer's units after the whole pass.

    Attributes:
        gradient_square: fp32 [U], E[sum_d g^2] over tokens.
    """

    gradient_square: Tensor


@dataclass(frozen=True)
class Criterion:
    """One way to score units.

    Attributes:
        name: What it is called on the command line.
        formula: Score of a unit over an example.
        source: Where it is from.
        score: Units -> fp32 [B, T, U], not negative.
        factor: Moments -> fp32 [U], multiplied onto the scores once the pass is over.
        balance: How far layers are brought to one scale before they are ranked together: scores
            are divided by (mean score of their layer)^balance. 0: not at all; 1: equal means.
            Measured: the more a score says of the loss itself, the less it needs.
        per_token: Whether a token's score means something; else the criterion gives static
            pruning only.
    """

    name: str
    formula: str
    source: str
    score: Callable[[Units], Tensor]
    factor: Callable[[Moments], Tensor] | None = None
    balance: float = 0.0
    per_token: bool = True


def plainact(units: Units) -> Tensor:
    """First-order effect on the loss of removing the unit: abs(sum_d g a).

    Source: Molchanov 2016, Michel 2019; the criterion of ShadowLLM (arXiv 2406.16635).
    """
    return (units.g * units.a).sum(dim=-1).abs()


def l2norm(units: Units) -> Tensor:
    """Magnitude of the activation, what DejaVu-style predictors learn: sqrt(sum_d a^2).

    Source: DejaVu (arXiv 2310.17157).
    """
    return _norm(units.a)


def gradient_rms(moments: Moments) -> Tensor:
    """The factor of `sens`: the unit's RMS gradient, sqrt(E[sum_d g^2])."""
    return moments.gradient_square.sqrt()


def random(units: Units) -> Tensor:
    """Uniform in [0, 1), seeded: the control that every other criterion must beat."""
    size = units.a.shape[:-1]
    return torch.rand(size, generator=units.generator).to(units.a.device)


def _norm(values: Tensor) -> Tensor:
    return values.abs().squeeze(-1) if values.shape[-1] == 1 else values.norm(dim=-1)


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "plainact",
            "sum_t abs( sum_d g*a )",
            "first-order effect of removing the unit (Molchanov 2016, Michel 2019)",
            plainact,
            balance=0.25,
        ),
        Criterion(
            "l2norm",
            "sqrt( sum_t sum_d a^2 )",
            "magnitude, what DejaVu learns (Liu 2023)",
            l2norm,
            balance=0.75,
        ),
        Criterion(
            "sens",
            "sqrt( sum_t sum_d a^2 ) * sqrt( E[sum_d g^2] )",
            "magnitude with a stable gradient, the expectation over calibration",
            l2norm,
            factor=gradient_rms,
            balance=0.5,
        ),
        Criterion("random", "uniform in [0, 1), seeded", "control", random),
    )
}


def find_criterion(name: str, *, predictor: str = "static") -> Criterion:
    """The criterion of that name, if `predictor` can be fitted to it.

    Raises:
        OptionError: It is unknown, or has no per-token scores and the predictor needs them.
    """
    if name not in CRITERIA:
        raise OptionError(
            f"unknown criterion {name!r}", expected=", ".join(CRITERIA), fix="shadowc criteria"
        )
    criterion = CRITERIA[name]
    if predictor != "static" and not criterion.per_token:
        raise OptionError(
            f"{name} scores units over all data, not token by token: no predictor can learn it",
            expected="--predictor static",
            got=f"--predictor {predictor}",
        )
    return criterion
