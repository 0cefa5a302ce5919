"""How a fit does on held-out tokens: rank correlation, recall, quantiles, damage."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shadowc.calibration.collect import Batch
from shadowc.calibration.criteria import Criterion, Site, Units, over_values
from shadowc.calibration.damage import LEVELS, damage, damage_table
from shadowc.calibration.predictor import Predictor
from shadowc.calibration.quantiles import QUANTILES, histogram, quantiles
from shadowc.calibration.ridge import Factors, Tables, add

SPARSITIES = (30, 50, 70)
_TOGETHER = {"cpu": 1 << 22, "cuda": 1 << 24}  # scores that are sorted at once


class Fit(Tables):
    """What was fitted for one criterion, and sums of how it does on held-out tokens."""

    tables = ("histograms", "damages", "measured", "counts")

    def __init__(
        self,
        criterion: Criterion,
        factors: Factors,
        means: dict[Site, Tensor],
        predictors: Sequence[Predictor],
        refresh: int = 1,
    ) -> None:
        """Take the results of `ScoreSums.ranking_units` and the fitted predictors."""
        self.criterion, self.predictors, self.refresh = criterion, list(predictors), refresh
        self.factors, self.means = factors, means
        self.predictor_of = {
            (kind, layer): index
            for index, predictor in enumerate(predictors)
            for kind, layers in (("heads", predictor.tap.heads), ("neurons", predictor.tap.neurons))
            for layer in layers
        }
        self.histograms: dict[Site, Tensor] = {}
        self.damages: dict[Site, Tensor] = {}
        #: fp64 [1 + layers]: of all units, of each layer's.
        self.measured: dict[tuple[str, int], Tensor] = {}
        self.counts: dict[tuple[str, int], Tensor] = {}

    def mean(self, kind: str) -> Tensor:
        """Mean scores of all layers, fp32 [L, H] or [L, F]."""
        return torch.stack([self.means[kind, layer].cpu() for layer in self._layers(kind)])

    def quantiles(self, kind: str) -> Tensor:
        """Quantiles of the predicted scores of all layers, fp32 [L, Q]; 0 where nobody predicts."""
        counts = [self.histograms.get((kind, layer)) for layer in self._layers(kind)]
        return torch.stack(
            [torch.zeros(QUANTILES) if one is None else quantiles(one.cpu()) for one in counts]
        )

    def damage(self, kind: str) -> Tensor:
        """What skipping costs, of all layers, fp32 [L, 33]; 0 for layer 0's heads, which run."""
        tokens = int(self.counts["tokens", 0])
        nothing = torch.zeros(LEVELS, dtype=torch.float64)
        squares = [self.damages.get((kind, layer), nothing).cpu() for layer in self._layers(kind)]
        return torch.stack([damage_table(one, tokens) for one in squares])

    def metrics(self) -> dict[str, Any]:
        """Means over the tokens measured: of all units, and a list of those within each layer."""
        found: dict[str, Any] = {}
        for (name, _), total in self.measured.items():
            found[name], *by_layer = (total / self.counts["measured", 0]).tolist()
            always = [None] * ("heads" in name)  # layer 0's heads always run
            found[f"{name}_by_layer"] = always + by_layer
        return found

    def recall(self) -> float:
        """Of the neurons that matter most, so far; NaN if nothing is known."""
        total = self.measured.get(("recall_neurons_50", 0))
        return float("nan") if total is None else float(total[0] / self.counts["measured", 0])

    def _layers(self, kind: str) -> list[int]:
        return sorted(layer for name, layer in self.means if name == kind)


class Measurement:
    """A fit and one held-out batch.

    Args:
        fit: Is added to.
        batch: The batch; its units follow by `add`.
        spread: bool [B, T], the positions that quantiles and damage are taken at.
        ranked: bool [B, T], the few at which all units are ranked.
    """

    def __init__(self, fit: Fit, batch: Batch, spread: Tensor, ranked: Tensor) -> None:
        """Start with what predictors see."""
        self.fit, self.spread, self.ranked = fit, spread, ranked
        add(fit.counts, ("tokens", 0), spread.sum())
        self._codes = []
        for tap, predictor in enumerate(fit.predictors):
            x = batch.feature(tap)
            rows = (places.to(x.device) for places in (spread, ranked))
            self._codes.append(tuple(predictor.encode(x[own]) for own in rows))
        # g is of each example's mean loss; its sum is what a token does to all that follow.
        self._scored = batch.counts.sum(dim=1).float()[:, None, None]
        self._known: dict[Site, Tensor] = {}
        self._true: dict[Site, Tensor] = {}

    def add(self, units: Units) -> None:
        """Add a layer's units."""
        fit, site = self.fit, units.site
        if site == ("heads", 0):
            return
        device = units.a.device
        spread, ranked = self.spread.to(device), self.ranked.to(device)
        effects = (
            over_values(units.g * units.a)[spread]
            * self._scored.to(device).expand(*spread.shape, 1)[spread]
        )
        scores, known = self._predict(site, 0), self._predict(site, 1)
        if scores is not None:
            add(fit.histograms, site, histogram(scores))
        else:
            scores = fit.means[site].expand_as(effects)
        rows = max(1, _TOGETHER[device.type] // effects.shape[1])
        for part in zip(scores.to(device).split(rows), effects.split(rows), strict=True):
            add(fit.damages, site, damage(*part))
        if fit.criterion.score is not None:  # else no token has a true score
            true = units.ahead(fit.criterion.score(units), fit.refresh)[ranked]
            self._true[site] = (true * fit.factors[site]).to(self.ranked.device)
            mean = fit.means[site].expand_as(self._true[site])
            self._known[site] = (mean if known is None else known).to(self.ranked.device)

    def finish(self) -> None:
        """Rank what was added."""
        if not self.ranked.any():
            return
        add(self.fit.counts, ("measured", 0), self.ranked.sum())
        for kind in ("heads", "neurons"):
            sites = sorted(site for site in self._true if site[0] == kind)
            if not sites:
                continue
            layers = [(self._known[site], self._true[site]) for site in sites]
            scores, true = (torch.cat(both, dim=1) for both in zip(*layers, strict=True))
            by_layer = [_agreement(*both) for both in layers]
            for name, values in _agreement(scores, true).items():
                prefix, _, suffix = name.partition("_")
                columns = torch.stack([values, *(one[name] for one in by_layer)], dim=1)
                key = "_".join(filter(None, (prefix, kind, suffix)))
                add(self.fit.measured, (key, 0), columns.double().sum(dim=0))

    def _predict(self, site: Site, which: int) -> Tensor | None:
        """Predicted scores at the spread (0) or ranked (1) positions; None if nobody predicts."""
        index = self.fit.predictor_of.get(site)
        if index is None:
            return None
        return self.fit.predictors[index].score(self._codes[index][which], *site)


def _agreement(predicted: Tensor, true: Tensor) -> dict[str, Tensor]:
    """Spearman and recalls of each token: {`spearman`, `recall_30`, ...} -> [N]."""
    x, y = centred_ranks(predicted), centred_ranks(true)
    scale = (x.square().sum(dim=1) * y.square().sum(dim=1)).sqrt()
    found = {"spearman": (x * y).sum(dim=1) / scale.clamp(min=1e-12)}
    units = true.shape[1]
    for sparsity in SPARSITIES:
        keep = max(1, round(units * (100 - sparsity) / 100))
        kept, best = (torch.zeros_like(true, dtype=torch.bool) for _ in range(2))
        kept.scatter_(1, predicted.topk(keep, dim=1).indices, True)
        best.scatter_(1, true.topk(keep, dim=1).indices, True)
        best &= true > 0
        hits, wanted = (kept & best).sum(dim=1), best.sum(dim=1)
        found[f"recall_{sparsity}"] = torch.where(wanted > 0, hits / wanted, 1.0)
    return found


def centred_ranks(scores: Tensor) -> Tensor:
    """Ranks within each row, ties averaged, minus their mean: fp64 [N, U]."""
    ordered = scores.sort(dim=1).values
    scores = scores.contiguous()
    below = torch.searchsorted(ordered, scores)
    up_to = torch.searchsorted(ordered, scores, right=True)
    return (below + up_to).double() / 2 - scores.shape[1] / 2
