"""The true scores of every token, from its own activations and gradients: an upper bound."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shadowc.calibration.collect import Batch, Collector
from shadowc.calibration.criteria import Criterion, Moments, Site, find_criterion
from shadowc.calibration.data import Example
from shadowc.errors import OptionError
from shadowc.models import LoadedModel

#: What multiplies the scores of a site's units, fp32 [U].
Factors = dict[Site, Tensor]


def true_scores(
    loaded: LoadedModel,
    criterion: str,
    windows: Sequence[Sequence[int]],
    seed: int = 0,
    factors: Factors | None = None,
) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """Score with the original model what a predictor can only guess.

    Args:
        loaded: The original model.
        criterion: Name of the artifact's criterion.
        windows: The text; a criterion that weighs units by their mean gradient takes it from here.
        seed: Of criteria that draw.
        factors: What `unit_factors` gave, if it is known already.

    Returns:
        A function of ids int64 [B, T] that gives scores fp32 [B, T, L, H] and [B, T, L, F].

    Raises:
        OptionError: The criterion has no scores of single tokens.
    """
    chosen = find_criterion(criterion)
    score = chosen.score
    if score is None:
        raise OptionError(
            f"{criterion} scores units over all data, not token by token: it has no oracle",
            fix="leave the oracle out",
        )
    collector = Collector(loaded.model, loaded.shape, "residual", (), chosen.needs)
    known = _factors(collector, chosen, windows) if factors is None else factors

    calls = itertools.count(seed)

    def scores(ids: Tensor) -> tuple[Tensor, Tensor]:
        found: dict[str, list[Tensor]] = {"heads": [], "neurons": []}
        for units in _run(collector, ids.tolist(), next(calls)):
            found[units.kind].insert(0, score(units) * known.get(units.site, 1.0))
        return torch.stack(found["heads"], dim=2), torch.stack(found["neurons"], dim=2)

    return scores


def unit_factors(loaded: LoadedModel, criterion: str, windows: Sequence[Sequence[int]]) -> Factors:
    """What a criterion weighs units by, measured on text; empty if it weighs nothing."""
    collector = Collector(loaded.model, loaded.shape, "residual")
    return _factors(collector, find_criterion(criterion), windows)


def _factors(
    collector: Collector, criterion: Criterion, windows: Sequence[Sequence[int]]
) -> Factors:
    if criterion.factor is None:
        return {}
    sums: dict[Site, Tensor] = {}
    count = 0
    for window in windows:
        batch = _run(collector, [window])
        count += int(batch.counts.sum())
        for units in batch:
            square = units.g.square().sum(dim=-1)[units.counts].sum(dim=0)
            sums[units.site] = sums.get(units.site, torch.zeros(())) + square
    return {site: criterion.factor(Moments(total / count)) for site, total in sums.items()}


def _run(collector: Collector, windows: Sequence[Sequence[int]], seed: int = 0) -> Batch:
    return collector.run([Example(list(ids), [True] * len(ids)) for ids in windows], seed)
