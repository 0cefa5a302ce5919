"""From a fraction of bytes to a policy: what a decode token reads, and where skipping costs least.

Rows of the second projection whose activation is exactly zero are free. The rest is dealt out by

    min  sum_s damage_s(x_s)   such that   sum_s bytes_s(x_s) <= budget,   s: (kind, layer)

with x_s the share of the site's units that is skipped, and calibration's predicted damage of the
predictor's own choice (`calibration/damage.py`). Every site moves down its curve while that saves
more bytes for a unit of damage than elsewhere; bisection finds the price that meets the budget.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from shadowc.calibration.damage import LEVELS
from shadowc.calibration.store import Calibration
from shadowc.config import ModelShape, Policy
from shadowc.errors import OptionError


def predictor_elements(calibration: Calibration, *, heads: bool, neurons: bool) -> int:
    """Matrix elements that the predictions of one token read, at all taps."""
    unused = tuple(kind for kind, read in (("heads", heads), ("neurons", neurons)) if not read)
    return sum(
        weight.numel()
        for name, weight in calibration.weights.items()
        if weight.dim() > 1 and not name.partition(".")[2].startswith(unused)
    )


def elements_read(calibration: Calibration, policy: Policy) -> float:
    """Weights of the decoder layers and the predictor that a decode token reads, expected.

    How many rows of exact zeros are among the kept neurons is not known before it runs: the smaller
    of both savings is taken, so that the real number is at most this one.
    """
    shape = calibration.shape
    heads = policy.head_shares or [1.0 - policy.head_sparsity] * shape.layers
    neurons = policy.neuron_shares or [1.0 - policy.neuron_sparsity] * shape.layers
    attention = 2 * shape.layers * shape.head_dim * shape.hidden * shape.kv_heads
    read = attention + float(_of_heads(shape, torch.tensor(heads)).sum())
    read += float(_of_neurons(calibration, torch.tensor(neurons)[:, None]).sum())
    if policy.refresh:
        skips = policy.head_sparsity > 0, policy.neuron_sparsity > 0
        if any(skips):
            used = predictor_elements(calibration, heads=skips[0], neurons=skips[1])
            read += used / policy.refresh
    return read


def _of_heads(shape: ModelShape, kept: Tensor) -> Tensor:
    """Elements of the query and output projections of a layer that keeps such shares."""
    return 2 * shape.head_dim * shape.hidden * shape.heads * kept.double()


def _of_neurons(calibration: Calibration, kept: Tensor) -> Tensor:
    """Elements of each layer's MLP, kept [L or 1, N] -> [L, N]."""
    shape = calibration.shape
    active = 1.0 - calibration.zero_rate.double().mean(dim=1, keepdim=True)
    first = 2 if shape.gated else 1
    return shape.ffn * shape.hidden * (first * kept + torch.minimum(kept.double(), active))


def allot(calibration: Calibration, fraction: float, policy: Policy) -> Policy:
    """Spend a byte budget where it costs least.

    Args:
        calibration: Gives the shape, the share of zero activations, the predictor's size and what
            skipping costs.
        fraction: Of the decoder layers' weight bytes, what a decode token shall not read.
        policy: Refresh and floors to use; its sparsities are replaced.

    Returns:
        The policy that skips least of what matters and reaches the fraction: `threshold`, with
        shares for each layer; or no unit, where rows of zeros are enough.

    Raises:
        OptionError: If no policy reaches it.
    """
    shape = calibration.shape
    goal = (1.0 - fraction) * shape.layers * shape.layer_elements
    nothing = replace(
        policy, head_sparsity=0.0, neuron_sparsity=0.0, head_shares=(), neuron_shares=()
    )
    if elements_read(calibration, nothing) <= goal:
        return nothing
    kept = 1.0 - torch.arange(LEVELS) / (LEVELS - 1)
    kinds = (
        ("head", _of_heads(shape, kept).expand(shape.layers, -1), policy.min_heads / shape.heads),
        ("neuron", _of_neurons(calibration, kept[None]), policy.min_neurons / shape.ffn),
    )

    def at(price: float) -> Policy:
        """What is skipped when a weight not read is worth that much damage."""
        shares = {}
        for kind, read, floor in kinds:
            damage = getattr(calibration, f"{kind}_damage").double()
            cost = (damage + price * read).masked_fill(kept < floor, torch.inf)
            shares[f"{kind}_shares"] = kept[cost.argmin(dim=1)].tolist()
        shares["head_shares"][0] = 1.0
        return _with_shares(policy, shares["head_shares"], shares["neuron_shares"])

    most = at(1e30)
    if elements_read(calibration, most) > goal:
        least = 1.0 - elements_read(calibration, most) / (shape.layers * shape.layer_elements)
        raise OptionError(
            "the byte budget is more than this model and predictor can give",
            expected=f"at most {least:.2f}",
            got=fraction,
            fix="ask for less, or calibrate with a smaller --rank",
        )
    low, high = -40.0, 70.0  # powers of two
    for _ in range(60):
        middle = (low + high) / 2
        if elements_read(calibration, at(2.0**middle)) <= goal:
            high = middle
        else:
            low = middle
    return _between(calibration, at(2.0**low), at(2.0**high), goal)


def _with_shares(policy: Policy, heads: list[float], neurons: list[float]) -> Policy:
    """The policy of such shares, and the sparsities that they make."""
    return replace(
        policy,
        selection="threshold",
        head_sparsity=1.0 - sum(heads) / len(heads),
        neuron_sparsity=1.0 - sum(neurons) / len(neurons),
        head_shares=tuple(heads),
        neuron_shares=tuple(neurons),
    )


def _between(calibration: Calibration, more: Policy, less: Policy, goal: float) -> Policy:
    """Levels are coarse: as much of the last step as the goal needs."""

    def mixed(t: float) -> Policy:
        pairs = (
            zip(getattr(more, name), getattr(less, name), strict=True)
            for name in ("head_shares", "neuron_shares")
        )
        return _with_shares(more, *([a + t * (b - a) for a, b in pair] for pair in pairs))

    lower, upper = 0.0, 1.0
    for _ in range(40):
        middle = (lower + upper) / 2
        if elements_read(calibration, mixed(middle)) <= goal:
            upper = middle
        else:
            lower = middle
    return mixed(upper)
