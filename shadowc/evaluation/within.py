"""The largest byte budget whose perplexity on held-out text stays within a bound.

Budgets are dealt out by predicted damage (`budget.py`); how much of it text can bear is measured:
the masked program runs with the thresholds of each budget tried, and a bisection closes in.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from shadowc import targets
from shadowc.budget import allot, elements_read
from shadowc.calibration.store import Calibration
from shadowc.compiler import build_programs
from shadowc.config import Policy
from shadowc.errors import OptionError
from shadowc.evaluation.perplexity import evaluate
from shadowc.models import LoadedModel
from shadowc.runtime.session import Session
from shadowc.selection import selections
from shadowc.trace import trace

_STEPS = 7  # of the bisection: 1% of the bytes


@dataclass(frozen=True)
class Within:
    """What was found.

    Attributes:
        policy: The policy of that budget.
        fraction: Of the layers' weight bytes, what it does not read, as expected.
        increase: By how much its perplexity is above the dense one, measured, a fraction.
        tried: Every (fraction, increase) that was measured, ascending.
    """

    policy: Policy
    fraction: float
    increase: float
    tried: tuple[tuple[float, float], ...]


def largest_budget(
    loaded: LoadedModel,
    calibration: Calibration,
    policy: Policy,
    most: float,
    windows: Sequence[Sequence[int]],
    *,
    target: str = "cpu",
    dtype: torch.dtype = torch.float32,
    report: Callable[[float, float], None] = lambda fraction, increase: None,
) -> Within:
    """Search the largest budget.

    Args:
        loaded: The model.
        calibration: Its calibration, with a predictor.
        policy: Refresh and floors; its sparsities are replaced.
        most: By which fraction perplexity may be above that of dense.
        windows: Token ids of held-out text.
        target: Whose programs are measured.
        dtype: Type of their weights.
        report: Called with each fraction tried and its increase.

    Returns:
        The largest budget tried that stays within the bound; rows of zeros alone, which cost
        nothing, if no other does.

    Raises:
        OptionError: If the bound is not positive, or fixed scores have no thresholds.
    """
    if not most > 0:
        raise OptionError(
            "--max-ppl-increase is out of range", expected="above 0, such as 2%", got=most
        )
    if calibration.predictor == "static":
        raise OptionError(
            "a bound on perplexity is met by thresholds, which fixed scores have none of",
            expected="a calibration with a predictor",
            got="static",
        )
    session = _session(loaded, calibration, replace(policy, selection="threshold"), target, dtype)
    dense: float = evaluate(session, windows, against=("dense",))["dense"]["perplexity"]
    tried: dict[float, tuple[float, Policy]] = {}

    def measure(fraction: float) -> float:
        candidate = allot(calibration, fraction, policy)
        masked = copy.copy(session)
        chosen = _thresholds(calibration, candidate)
        masked.tensors = {
            **session.tensors, **{name: t.to(session.device) for name, t in chosen.items()}
        }  # fmt: skip
        masked._bound = {}
        perplexity: float = evaluate(masked, windows, against=())["artifact"]["perplexity"]
        increase = perplexity / dense - 1.0
        tried[fraction] = increase, candidate
        report(fraction, increase)
        return increase

    whole = calibration.shape.layers * calibration.shape.layer_elements
    nothing = replace(policy, head_sparsity=0.0, neuron_sparsity=0.0)
    low = 1.0 - elements_read(calibration, nothing) / whole  # zero rows
    best = Within(nothing, low, 0.0, ())
    high = _most(calibration, policy)
    for _ in range(_STEPS):
        middle = (low + high) / 2
        if measure(middle) <= most:
            low = middle
        else:
            high = middle
    if low in tried:
        best = Within(tried[low][1], low, tried[low][0], ())
    steps = tuple((fraction, tried[fraction][0]) for fraction in sorted(tried))
    return replace(best, tried=steps)


def _most(calibration: Calibration, policy: Policy) -> float:
    """The largest fraction that `allot` can give, within 1/128."""
    low, high = 0.0, 1.0
    for _ in range(7):
        middle = (low + high) / 2
        try:
            allot(calibration, middle, policy)
        except OptionError:
            high = middle
        else:
            low = middle
    return low


def _session(
    loaded: LoadedModel, calibration: Calibration, policy: Policy, target: str, dtype: torch.dtype
) -> Session:
    """A session whose masked program takes thresholds as tensors, of any that skip both kinds."""
    some = replace(policy, head_sparsity=0.5, neuron_sparsity=0.5)
    backend = targets.load_target(target)
    traced = trace(loaded.model).module(check_guards=False)
    built = build_programs(traced, loaded, calibration, some, backend, dtype)
    limit = loaded.shape.max_positions
    session = Session(
        loaded.shape, some, built.programs, built.packed, built.keep, limit,
        predictor_bytes=built.predictor_bytes,
    )  # fmt: skip
    return backend.check_session(session)


def _thresholds(calibration: Calibration, policy: Policy) -> dict[str, Tensor]:
    """Each tap's thresholds by the names that `insert_predictor` gives them."""
    found: dict[str, Tensor] = {}
    for tap, heads, neurons in selections(calibration, policy):
        for kind, chosen in (("head", heads), ("neuron", neurons)):
            assert isinstance(chosen, Tensor)
            if len(chosen):
                found[f"predictor.{tap.layer}.{kind}_threshold"] = chosen
    return found
