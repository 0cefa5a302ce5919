"""From a fraction of bytes to a policy: what a decode token reads, and where to save first."""

from __future__ import annotations

from dataclasses import replace

from shadowc.calibration.store import Calibration
from shadowc.config import ModelShape, Policy
from shadowc.errors import OptionError

#: Neurons are skipped up to this fraction before any head is: they cost far less quality a byte.
MOST_NEURONS = 0.9


def predictor_elements(calibration: Calibration, *, heads: bool, neurons: bool) -> int:
    """Matrix elements that the predictions of one token read, at all taps."""
    shape, rank, features = calibration.shape, calibration.rank, calibration.random_features
    units = shape.heads * (shape.layers - 1) * heads + shape.ffn * shape.layers * neurons
    first = (features + rank) * calibration.width + rank * features
    return len(calibration.taps) * first + rank * units


def elements_read(calibration: Calibration, policy: Policy) -> float:
    """Weights of the decoder layers and the predictor that a decode token reads, expected.

    Rows of the second projection whose activation is exactly zero are not read. How many of them
    are among the kept neurons is not known before it runs: the smaller of both savings is taken, so
    that the real number is at most this one.
    """
    shape = calibration.shape
    kept = 1.0 - policy.neuron_sparsity
    rows = min(kept, 1.0 - float(calibration.zero_rate.mean()))
    first = 2 if shape.gated else 1
    mlp = shape.ffn * shape.hidden * (first * kept + rows)
    attention = (
        2
        * shape.head_dim
        * shape.hidden
        * (shape.kv_heads + shape.heads * (1.0 - policy.head_sparsity))
    )
    predictor = 0.0
    if policy.refresh:
        heads, neurons = policy.head_sparsity > 0, policy.neuron_sparsity > 0
        if heads or neurons:
            used = predictor_elements(calibration, heads=heads, neurons=neurons)
            predictor = used / policy.refresh
    return shape.layers * (attention + mlp) + predictor


def allot(calibration: Calibration, fraction: float, policy: Policy) -> Policy:
    """Spend a byte budget: rows of exact zeros first (free), then neurons, then heads.

    Args:
        calibration: Gives the shape, the share of zero activations and the predictor's size.
        fraction: Of the decoder layers' weight bytes, what a decode token shall not read.
        policy: Scope, refresh and floors to use; its sparsities are replaced.

    Returns:
        The policy with the smallest sparsities that reach the fraction.

    Raises:
        OptionError: If no policy reaches it.
    """
    shape = calibration.shape
    goal = (1.0 - fraction) * shape.layers * shape.layer_elements

    def with_units(neurons: float, heads: float) -> Policy:
        return replace(policy, neuron_sparsity=neurons, head_sparsity=heads)

    if elements_read(calibration, with_units(0.0, 0.0)) <= goal:
        return with_units(0.0, 0.0)
    most_heads = _most_heads(shape, policy)
    for low, high in (
        (with_units(0.0, 0.0), with_units(MOST_NEURONS, 0.0)),
        (with_units(MOST_NEURONS, 0.0), with_units(MOST_NEURONS, most_heads)),
    ):
        if elements_read(calibration, high) <= goal:
            return _bisect(calibration, low, high, goal)
    least = elements_read(calibration, with_units(MOST_NEURONS, most_heads))
    most = 1.0 - least / (shape.layers * shape.layer_elements)
    raise OptionError(
        "the byte budget is more than this model and predictor can give",
        expected=f"at most {most:.2f}",
        got=fraction,
        fix="ask for less, or calibrate with a smaller --rank",
    )


def _most_heads(shape: ModelShape, policy: Policy) -> float:
    kept = shape.heads + policy.min_heads * (shape.layers - 1)
    return 1.0 - kept / (shape.heads * shape.layers)


def _bisect(calibration: Calibration, low: Policy, high: Policy, goal: float) -> Policy:
    def between(t: float) -> Policy:
        return replace(
            low,
            neuron_sparsity=low.neuron_sparsity + t * (high.neuron_sparsity - low.neuron_sparsity),
            head_sparsity=low.head_sparsity + t * (high.head_sparsity - low.head_sparsity),
        )

    lower, upper = 0.0, 1.0
    for _ in range(40):
        middle = (lower + upper) / 2
        if elements_read(calibration, between(middle)) <= goal:
            upper = middle
        else:
            lower = middle
    return between(upper)
