"""How a fit does on held-out tokens: rank correlation, recall, quantiles, damage."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shadowc.calibration.collect import Batch
from shadowc.calibration.criteria import Criterion, Site
from shadowc.calibration.damage import Damage
from shadowc.calibration.predictor import Predictor
from shadowc.calibration.quantiles import QUANTILES, Histogram
from shadowc.calibration.ridge import Factors

SPARSITIES = (30, 50, 70)
_TOGETHER = 64  # tokens predicted at once: the scores of one may be megabytes


class Fit:
    """What was fitted for one criterion, and how it does on held-out tokens."""

    def __init__(
        self,
        criterion: Criterion,
        factors: Factors,
        means: dict[Site, Tensor],
        predictors: Sequence[Predictor],
        generator: torch.Generator,
        refresh: int = 1,
    ) -> None:
        """Take the results of `ScoreSums.ranking_units` and the fitted predictors."""
        self.criterion, self.predictors, self.refresh = criterion, predictors, refresh
        self._factors, self._means, self._generator = factors, means, generator
        self._measured: dict[str, list[Tensor]] = {}  # [N, 1 + layers]: of all units, of each
        self._predicted: dict[Site, Histogram] = defaultdict(Histogram)
        self._damage: dict[Site, Damage] = defaultdict(Damage)

    def mean(self, kind: str) -> Tensor:
        """Mean scores of all layers, fp32 [L, H] or [L, F]."""
        layers = sorted(layer for name, layer in self._means if name == kind)
        return torch.stack([self._means[kind, layer] for layer in layers]).cpu()

    def quantiles(self, kind: str) -> Tensor:
        """Quantiles of the predicted scores of all layers, fp32 [L, Q]; 0 where nobody predicts."""
        layers = sorted(layer for name, layer in self._means if name == kind)
        nothing = torch.zeros(QUANTILES)
        found = {layer: one.quantiles() for (k, layer), one in self._predicted.items() if k == kind}
        return torch.stack([found.get(layer, nothing) for layer in layers])

    def damage(self, kind: str) -> Tensor:
        """What skipping costs, of all layers, fp32 [L, 33]; 0 for layer 0's heads, which run."""
        layers = sorted(layer for name, layer in self._means if name == kind)
        return torch.stack([self._damage[kind, layer].table() for layer in layers])

    def predict(self, features: Sequence[Tensor]) -> dict[Site, Tensor]:
        """Scores of all sites but layer 0's heads: features fp32 [N, C] -> [N, U]."""
        found: dict[Site, Tensor] = {}
        for predictor, feature in zip(self.predictors, features, strict=True):
            tap = predictor.tap
            both = zip(("heads", "neurons"), (tap.heads, tap.neurons), predictor(feature[None]),
                       strict=True)  # fmt: skip
            for kind, layers, scores in both:
                found |= {(kind, layer): scores[0, :, i] for i, layer in enumerate(layers)}
        return found

    def measure(self, batch: Batch, every: int) -> None:
        """Compare predicted and true scores at every so-manieth position that counts."""
        self._measure_all(batch)
        score = self.criterion.score
        if score is None:  # no token has a true score
            return
        counted = batch.counts.flatten().nonzero()[::every]
        if not len(counted):
            return
        rows = torch.zeros_like(batch.counts)
        rows.view(-1)[counted] = True
        true: dict[str, list[Tensor]] = {"heads": [], "neurons": []}
        for units in batch.units(self._generator):
            scores = batch.ahead(score(units), self.refresh)[rows]
            if units.site != ("heads", 0):
                true[units.kind].append(scores * self._factors[units.site])
        known = {site: mean.expand(len(counted), -1) for site, mean in self._means.items()}
        known |= self.predict([feature[rows] for feature in batch.features])
        for kind in ("heads", "neurons"):
            sites = sorted(site for site in known if site[0] == kind and site != ("heads", 0))
            layers = [
                (known[site].cpu(), one.cpu()) for site, one in zip(sites, true[kind], strict=True)
            ]
            scores, true_scores = (torch.cat(both, dim=1) for both in zip(*layers, strict=True))
            by_layer = [_agreement(*both) for both in layers]
            for name, values in _agreement(scores, true_scores).items():
                prefix, _, suffix = name.partition("_")
                key = "_".join(filter(None, (prefix, kind, suffix)))
                columns = torch.stack([values, *(one[name] for one in by_layer)], dim=1)
                self._measured.setdefault(key, []).append(columns)

    def _measure_all(self, batch: Batch) -> None:
        """Add every position: thresholds and budgets are made of these."""
        # g is of each example's mean loss; its sum is what a token does to all that follow.
        scored = batch.counts.sum(dim=1).float()[:, None, None]
        effects = {
            site: ((g * a).sum(dim=-1) * scored)[batch.counts].split(_TOGETHER)
            for site, a, g in batch.sites()
            if site != ("heads", 0)
        }
        features = [feature[batch.counts].split(_TOGETHER) for feature in batch.features]
        for place in range(len(effects["neurons", 0])):
            predicted = self.predict([parts[place] for parts in features])
            for site, parts in effects.items():
                if site in predicted:
                    self._predicted[site].add(predicted[site])
                scores = predicted.get(site, self._means[site].expand_as(parts[place]))
                self._damage[site].add(scores, parts[place])

    def metrics(self) -> dict[str, Any]:
        """Means over the tokens measured: of all units, and a list of those within each layer."""
        found: dict[str, Any] = {}
        for key, rows in self._measured.items():
            found[key], *by_layer = torch.cat(rows).double().mean(dim=0).tolist()
            always = [None] * ("heads" in key)  # layer 0's heads always run
            found[f"{key}_by_layer"] = always + by_layer
        return found


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
