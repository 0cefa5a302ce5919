"""The paper's recipe: a two-layer network for each kind of unit, trained on stored samples.

A sample is one token: its feature, and the scores S of all units, brought to [0, 1] within each
layer, which is what makes layers comparable there. Mean squared error, AdamW, a cosine from the
first learning rate to 0.

Source: ShadowLLM (arXiv 2406.16635), whose samples are whole sequences; here they are tokens,
because masks are.

Memory: 4 U bytes a sample, with U all units: 0.2 GB for opt-books-15m, 3.2 GB for OPT-1.3B.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shadowc.calibration.collect import Batch
from shadowc.calibration.criteria import Criterion, Site, Units
from shadowc.calibration.predictor import TwoLayerPredictor
from shadowc.calibration.ridge import Factors, Tables
from shadowc.config import ModelShape

#: The most tokens that are kept; about as many as the paper has examples.
SAMPLES = 4096
_LEARNING_RATE = 1e-3


class Schedule(NamedTuple):
    """How the network of one kind of unit is trained."""

    hidden: int
    epochs: int
    batch: int


SCHEDULES = {"heads": Schedule(2048, 100, 32), "neurons": Schedule(1024, 20, 16)}


class Samples(Tables):
    """Features and scores of tokens that are evenly spaced over the data.

    Args:
        criterion: What scores them.
        tokens: Positions of the data that count.
        refresh: Tokens that a mask serves.
    """

    tables = ("rows",)

    def __init__(self, criterion: Criterion, tokens: int, refresh: int = 1) -> None:
        """Start from nothing."""
        self.criterion, self.refresh = criterion, refresh
        self.every = -(-tokens // SAMPLES)
        #: By what it is of and where its first token is: fp32 [N, C] and [N, U].
        self.rows: dict[tuple[str, int], Tensor] = {}

    def add(self, batch: Batch, units: Units, start: int) -> None:
        """Keep every so-manieth position that counts, at the one tap there is.

        Args:
            batch: Of the units.
            units: A layer's.
            start: Positions that count in the data before this batch.
        """
        counted = units.counts.flatten().nonzero()[:, 0]
        places = torch.arange(start, start + len(counted), device=counted.device)
        chosen = counted[places % self.every == 0]
        if units.site == ("heads", 0):
            feature = batch.feature(0)
            self.rows["feature", start] = feature.flatten(0, 1)[chosen.to(feature.device)].cpu()
        else:
            assert self.criterion.score is not None
            scores = units.ahead(self.criterion.score(units), self.refresh)
            self.rows[f"{units.kind} {units.layer}", start] = scores.flatten(0, 1)[chosen].cpu()

    def of(self, name: str) -> Tensor:
        """All rows of one name, in the order of the data."""
        return torch.cat([self.rows[key] for key in sorted(self.rows) if key[0] == name])


def train(
    samples: Samples,
    factors: Factors,
    shape: ModelShape,
    seed: int,
    advance: Callable[[str, int, int, float], None] = lambda kind, epoch, epochs, loss: None,
) -> TwoLayerPredictor:
    """Train both networks.

    Args:
        samples: Features and scores.
        factors: What brings a criterion's scores to its ranking units.
        shape: The model's shape.
        seed: Of the first weights and of the order of samples.
        advance: Told kind, epoch, epochs and mean loss after each epoch.
    """
    feature = samples.of("feature")
    mean, scale = feature.mean(dim=0), feature.std(dim=0).clamp(min=1e-6)
    x = (feature - mean) / scale
    hidden = SCHEDULES["heads"].hidden, SCHEDULES["neurons"].hidden
    predictor = TwoLayerPredictor(shape, hidden, feature.shape[1])
    layers = {"heads": predictor.tap.heads, "neurons": predictor.tap.neurons}
    with torch.inference_mode(False), torch.enable_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for kind, schedule in SCHEDULES.items():
            sites: list[Site] = [(kind, layer) for layer in layers[kind]]
            targets = [
                _to_unit_range(samples.of(f"{k} {layer}") * factors[k, layer].cpu())
                for k, layer in sites
            ]
            first, last = _train(x, torch.cat(targets, dim=1), schedule, kind, advance)
            weight = first.weight.detach() / scale
            setattr(predictor, f"{kind}_first", weight)
            setattr(predictor, f"{kind}_first_bias", first.bias.detach() - weight @ mean)
            setattr(predictor, f"{kind}_weight", last.weight.detach())
            setattr(predictor, f"{kind}_bias", last.bias.detach())
    return predictor.eval()


def _train(
    x: Tensor,
    target: Tensor,
    schedule: Schedule,
    kind: str,
    advance: Callable[[str, int, int, float], None],
) -> tuple[nn.Linear, nn.Linear]:
    """One network: x fp32 [N, C], target [N, U]."""
    first = nn.Linear(x.shape[1], schedule.hidden)
    last = nn.Linear(schedule.hidden, target.shape[1])
    parameters = [*first.parameters(), *last.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=_LEARNING_RATE, fused=True)
    steps = schedule.epochs * -(-len(x) // schedule.batch)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for epoch in range(schedule.epochs):
        total = 0.0
        for rows in torch.randperm(len(x)).split(schedule.batch):
            loss = nn.functional.mse_loss(last(first(x[rows]).relu()), target[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
            total += float(loss.detach()) * len(rows)
        advance(kind, epoch + 1, schedule.epochs, total / len(x))
    return first, last


def _to_unit_range(scores: Tensor) -> Tensor:
    """Each token's scores of one layer from 0 to 1: [N, U] -> [N, U]."""
    low, high = scores.amin(dim=1, keepdim=True), scores.amax(dim=1, keepdim=True)
    return (scores - low) / (high - low).clamp(min=1e-30)
