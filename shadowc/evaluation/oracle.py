"""The true scores of every token, from its own activations and gradients: an upper bound."""

from __future__ import annotations

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
    generator = torch.Generator().manual_seed(seed)
    known = _factors(collector, chosen, windows) if factors is None else factors

    def scores(ids: Tensor) -> tuple[Tensor, Tensor]:
        batch = _run(collector, ids.tolist())

        found: dict[str, list[Tensor]] = {"heads": [], "neurons": []}
        for units in batch.units(generator):
            found[units.kind].append(score(units) * known.get(units.site, 1.0))
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
        for kind, values in (("heads", batch.heads), ("neurons", batch.neurons)):
            for layer, (_, g) in enumerate(values):
                square = g.square().sum(dim=-1)[batch.counts].sum(dim=0)
                sums[kind, layer] = sums.get((kind, layer), torch.zeros(())) + square
    return {site: criterion.factor(Moments(total / count)) for site, total in sums.items()}


def _run(collector: Collector, windows: Sequence[Sequence[int]]) -> Batch:
    examples = [Example(list(ids), [True] * len(ids)) for ids in windows]
    with torch.inference_mode(False):  # gradients need tensors that were made outside of it
        return collector.run(examples)
