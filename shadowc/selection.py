"""Calibration and policy -> how each tap chooses: the best of its layers, or all above a threshold.

    topk       `select` ranks the scores of a tap's layers at every token
    threshold  `select_above` compares each score with its layer's threshold, found here from the
               quantiles q_l of predicted scores on held-out text:

        local:   the quantile of the layer's own budget
        global:  min(g, f_l), with f_l the quantile that keeps the layer's floor, and g so that the
                 expected number of units above is the budget of the whole model
        shares:  the quantile of the share that a budget of bytes allots to the layer (`budget.py`)

A threshold needs no ranking, so it also works where later layers have no scores yet. Its budget and
floors are expectations over the text of calibration: what a token keeps differs, maybe nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowc.calibration.store import Calibration
from shadowc.config import ModelShape, Policy, Tap, taps_of
from shadowc.errors import CalibrationError, OptionError


@dataclass(frozen=True)
class TopK:
    """The arguments of `select` after the scores."""

    keep: int
    floor: int
    local: bool


#: How a tap chooses heads or neurons; a tensor holds thresholds, fp32 [L'].
Selection = TopK | Tensor


def default_selection(taps: int) -> str:
    """Exact where one ranking sees the whole model, by threshold where it cannot."""
    return "topk" if taps <= 1 else "threshold"


def selections(calibration: Calibration, policy: Policy) -> list[tuple[Tap, Selection, Selection]]:
    """For each tap, how it chooses heads and neurons.

    Raises:
        OptionError: If the policy's selection does not go with the calibration's predictor.
        CalibrationError: If that cannot be part of a program.
    """
    if calibration.predictor == "fullseq":
        raise CalibrationError(
            "a predictor of the whole sequence is measured, not compiled",
            expected="a calibration with --predictor shadow, layerwise or static",
            got="fullseq",
        )
    shape, taps = calibration.shape, taps_of(calibration.shape.layers, calibration.taps or (0,))
    if policy.selection == "topk":
        if len(taps) > 1 and policy.scope == "global":
            raise OptionError(
                "several taps cannot rank the whole model: later layers have no scores yet",
                expected="--selection threshold, or --scope local",
                got=f"--selection topk with {len(taps)} taps",
            )
        return [(tap, *top_k(shape, policy, tap)) for tap in taps]
    if calibration.predictor == "static" and policy.neuron_shares:
        means = calibration.mean_head_scores[1:], calibration.mean_neuron_scores
        heads, neurons = (
            _between_ranks(scores, shares)
            for scores, shares in zip(
                means, (policy.head_shares[1:], policy.neuron_shares), strict=True
            )
        )
        return [(tap, heads, neurons) for tap in taps]
    if calibration.predictor == "static":
        raise OptionError(
            "fixed scores need no threshold",
            expected="--selection topk with --predictor static",
            got="--selection threshold",
        )
    local = policy.scope == "local"
    heads = thresholds(
        calibration.head_quantiles[1:], shape.heads, policy.heads_kept(shape), policy.min_heads,
        local, policy.head_shares[1:],
    )  # fmt: skip
    neurons = thresholds(
        calibration.neuron_quantiles, shape.ffn, policy.neurons_kept(shape), policy.min_neurons,
        local, policy.neuron_shares,
    )  # fmt: skip
    return [
        (tap, heads[[layer - 1 for layer in tap.heads]], neurons[list(tap.neurons)]) for tap in taps
    ]


def top_k(shape: ModelShape, policy: Policy, tap: Tap) -> tuple[TopK, TopK]:
    """How a tap chooses heads and neurons exactly: its layers' part of the budget."""
    local = policy.scope == "local"
    heads = shares(policy.heads_kept(shape), shape.layers - 1)
    neurons = shares(policy.neurons_kept(shape), shape.layers)
    return (
        TopK(sum(heads[layer - 1] for layer in tap.heads), policy.min_heads, local),
        TopK(sum(neurons[layer] for layer in tap.neurons), policy.min_neurons, local),
    )


def shares(keep: int, layers: int) -> list[int]:
    """A budget dealt out evenly: one more in the first layers, as `select` does it."""
    return [keep // layers + (layer < keep % layers) for layer in range(layers)]


def thresholds(
    quantiles: Tensor,
    units: int,
    keep: int,
    floor: int,
    local: bool,
    of_layers: tuple[float, ...] = (),
) -> Tensor:
    """Thresholds of all layers that keep `keep` units in expectation.

    Args:
        quantiles: fp32 [L, Q], ascending: of a layer's predicted scores.
        units: N, units of a layer.
        keep: Units to keep in all layers together.
        floor: Units that each layer keeps at least, in expectation.
        local: The same budget in every layer.
        of_layers: The share that each layer keeps, instead of all these.

    Returns:
        fp32 [L].
    """
    q = quantiles.double()
    layers, last = q.shape[0], q.shape[1] - 1

    def above(kept: Tensor) -> Tensor:
        """The thresholds [L] that so many units [L] are above."""
        at = (1.0 - kept.double() / units) * last
        low = at.floor().clamp(max=last - 1).long()[:, None]
        return torch.lerp(q.gather(1, low), q.gather(1, low + 1), at[:, None] - low)[:, 0]

    def kept(threshold: Tensor) -> Tensor:
        """How many units [L] are above thresholds [L]."""
        high = torch.searchsorted(q, threshold[:, None], right=True).clamp(1, last)
        low, up = q.gather(1, high - 1), q.gather(1, high)
        share = ((threshold[:, None] - low) / (up - low).clamp(min=1e-300)).clamp(0, 1)
        return units * (1.0 - (high - 1 + share)[:, 0] / last)

    if of_layers:
        share = torch.tensor(of_layers)
        return above(share * units).float().where(share < 1, -torch.inf)
    if keep == layers * units:  # also of scores lower than any before
        return torch.full((layers,), -torch.inf)
    if local:
        return above(torch.tensor(shares(keep, layers))).float()
    most = above(torch.full((layers,), floor))
    lower, upper = q.min() - 1.0, q.max()
    for _ in range(64):
        middle = (lower + upper) / 2
        if kept(torch.minimum(middle, most)).sum() > keep:
            lower = middle
        else:
            upper = middle
    return torch.minimum(upper, most).float()


def _between_ranks(scores: Tensor, shares: Sequence[float]) -> Tensor:
    """Thresholds [L] that such shares of fixed scores [L, N] are above, but for equal ones."""
    ordered = scores.sort(dim=1, descending=True).values.double()
    ordered = torch.nn.functional.pad(ordered, (0, 1), value=-torch.inf)
    kept = (torch.tensor(shares) * scores.shape[1]).round().long().clamp(min=1)[:, None]
    last, next_one = ordered.gather(1, kept - 1), ordered.gather(1, kept)
    return ((last + next_one) / 2)[:, 0].float()
