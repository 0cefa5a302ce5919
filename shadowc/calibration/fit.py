"""The calibration itself: collect, score, fit in closed form, measure on held-out examples.

One pass of forward and backward over the training examples serves every criterion. What is kept of
it are sums, never scores (P features, U units, of a criterion's score S):

    phi^T phi   [P, P]        phi^T sqrt(S)   [P, U]        sum phi, sum S, sum sqrt(S)

Every tap has its own phi; a unit's sums are taken with that of the tap that scores it, so several
taps need no more memory than one.

The `static` score of a unit is its mean S. A predictor regresses sqrt(S): importance per
token is heavy-tailed, and the square root, which leaves any token's ranking as it is, keeps a few
large values from deciding the fit (opt-books-15m, plainact, 50% of both units, global scope:
perplexity 43.9 instead of 45.4 on held-out text of the same kind, 55 and 172 on other text). Of a
negative score it is -sqrt(-S). A criterion may have another sum than that of its token scores for
`static`, of its own shape (`Criterion.total`).
Layers are brought part of the way to one scale before they are ranked together
(`Criterion.balance`): without it sens starves the late layers, whose gradients are small
(smollm2-135m at 50%: 72 with it, 80 without); all the way, it feeds layers that matter little
(opt-books-15m, plainact: 79 instead of 43).

    ridge:   W = (G + lambda I)^-1 X,  G, X centred,  lambda = ridge * P / tokens * mean diag G
    rank R:  the encoder spans the R directions of phi that carry most of phi W in the norm of
             G + lambda I (eigenvectors of a P x P matrix), so the output layer is encoder^T X

Source: ridge regression, Hoerl and Kennard 1970; reduced-rank regression, Izenman 1975.

Memory beside the model and one batch: 4 P U bytes a criterion for phi^T sqrt(S), with
P = C + M and U = H (L-1) + F L: 43 MB for opt-books-15m, 2.0 GB for OPT-1.3B.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn

from shadowc.calibration.collect import Batch, Collector
from shadowc.calibration.criteria import Criterion, Moments, Site, find_criterion
from shadowc.calibration.damage import Damage
from shadowc.calibration.data import Example
from shadowc.calibration.predictor import ShadowPredictor
from shadowc.calibration.quantiles import QUANTILES, Histogram
from shadowc.calibration.store import Calibration
from shadowc.config import FEATURES, PREDICTORS, ModelShape, taps_of
from shadowc.errors import DataError, OptionError
from shadowc.models import LoadedModel
from shadowc.versions import versions

#: Rank and random features of each kind of predictor. A layer's own input needs less of both: with
#: 75% of opt-books-15m's neurons skipped by sens, perplexity is 27.1 for 2.1 MB a token at (64, 0),
#: 26.6 for 8.7 MB at (128, 512), and 30.0 for the 3.8 MB of one tap.
SIZES = {"shadow": (128, 512), "layerwise": (64, 0), "static": (128, 512)}
EXAMPLES = 32
SEQ_LEN = 256
SPARSITIES = (30, 50, 70)
_HELD_OUT_EVERY = 8
_TOGETHER = 64  # tokens predicted at once: the scores of one may be megabytes
_MEASURED_TOKENS = 128  # rank correlation over all units costs milliseconds a token

_Key = TypeVar("_Key", bound=Hashable)


@dataclass(frozen=True)
class FitOptions:
    """How to calibrate.

    Attributes:
        criteria: Names of the criteria; all are fitted from one pass.
        predictor: `shadow`, `layerwise` (a tap at every layer) or `static`.
        feature: `residual`, `normed`, `entry` or `context`; None: `entry` for `layerwise`, which
            costs a GPU the least time, and `residual` for `shadow`, which knows no more of a token.
        rank: R of the predictor, what a token pays for; None: as `SIZES` says.
        random_features: M of the predictor; None: as `SIZES` says.
        ridge: Strength of the regularisation, in units of P / tokens.
        batch_tokens: Tokens of a forward and backward, about.
        seed: Of the random features and of criteria that draw.
        every: A tap of `shadow` at every so-manieth layer; None: at layer 0 alone.
    """

    criteria: tuple[str, ...] = ("plainact",)
    predictor: str = "shadow"
    feature: str | None = None
    rank: int | None = None
    random_features: int | None = None
    ridge: float = 2.0
    batch_tokens: int = 1024
    seed: int = 0
    every: int | None = None

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted."""
        for name, value, known in (
            ("predictor", self.predictor, PREDICTORS),
            ("feature", self.reads, FEATURES),
        ):
            if value not in known:
                raise OptionError(f"unknown {name} {value!r}", expected=", ".join(known))
        if self.every is not None and self.predictor != "shadow":
            raise OptionError(
                "only shadow's taps can be placed",
                expected="--taps with --predictor shadow",
                got=f"--predictor {self.predictor}",
            )
        for name in ("rank", "batch_tokens", "every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise OptionError(f"{name} is out of range", expected="at least 1", got=value)
        if self.feature == "context" and (self.every or self.predictor == "layerwise"):
            raise OptionError(
                "the feature context is made for one predictor after layer 0",
                expected="residual or normed",
                got="context with several taps",
            )
        if self.size[1] < 0 or not self.ridge > 0:
            raise OptionError(
                "random_features or ridge is out of range",
                expected="random_features >= 0 and ridge > 0",
                got=(self.size[1], self.ridge),
            )
        for criterion in self.criteria:
            find_criterion(criterion, predictor=self.predictor)

    @property
    def reads(self) -> str:
        """The feature."""
        return self.feature or ("entry" if self.predictor == "layerwise" else "residual")

    @property
    def size(self) -> tuple[int, int]:
        """R and M."""
        rank, random_features = SIZES[self.predictor]
        return (
            rank if self.rank is None else self.rank,
            random_features if self.random_features is None else self.random_features,
        )

    def taps(self, layers: int) -> tuple[int, ...]:
        """The layers in which predictors read, of L; none for `static`."""
        if self.predictor == "static":
            return ()
        every = 1 if self.predictor == "layerwise" else self.every or layers
        return tuple(range(0, layers, every))


def calibrate(
    loaded: LoadedModel,
    examples: Sequence[Example],
    options: FitOptions,
    *,
    data: str = "pydoc",
    progress: bool = False,
) -> list[Calibration]:
    """Calibrate a model with one or more criteria.

    Every eighth example (the last, if there are fewer) is held out of the fit and measured on.

    Args:
        loaded: The model.
        examples: Token sequences, at least two.
        options: What to fit.
        data: Name of the data, to be recorded.
        progress: Show a progress bar on stderr.

    Returns:
        One calibration for each of `options.criteria`, in that order. Their metrics, over units in
        the order of a global ranking, heads of layers 1 to L-1 and neurons of all layers apart,
        each the mean over held-out tokens:
        `spearman_heads`, `spearman_neurons`: rank correlation of predicted and true scores;
        `recall_heads_50` and so on (30, 50 and 70% sparsity): of the true best units, the share
        that is among the predicted best. Units whose true score is 0 do not count as best.
        With `_by_layer` after the name: the same within each layer, a list of L; None for layer
        0's heads, which nobody predicts.

    Raises:
        DataError: If there are fewer than two examples, or nothing in them can be scored.
    """
    start = time.monotonic()
    training, held_out = _split(examples)
    criteria = [find_criterion(name, predictor=options.predictor) for name in options.criteria]
    taps = options.taps(loaded.shape.layers)
    needs = {need for criterion in criteria for need in criterion.needs}
    collector = Collector(loaded.model, loaded.shape, options.reads, taps, needs)
    total = sum(len(example.ids) for example in examples)
    with _progress(total, progress) as advance:
        maps = _feature_maps(collector, training, options)
        features = FeatureSums(loaded.shape, taps, maps)
        scores = [ScoreSums(criterion, options.seed) for criterion in criteria]
        for group in _batches(training, options.batch_tokens):
            batch = collector.run(group)
            phi = features.add(batch)
            for sums in scores:
                sums.add(batch, phi, features.tap_of)
            advance(group, batch.loss)
        fits = [sums.fit(features, options) for sums in scores]
        every = max(1, sum(len(example.ids) for example in held_out) // _MEASURED_TOKENS)
        for group in _batches(held_out, options.batch_tokens):
            batch = collector.run(group)
            for fit in fits:
                fit.measure(batch, every)
            advance(group, batch.loss)
    seconds = time.monotonic() - start
    return [
        Calibration(
            model=asdict(loaded.source),
            shape=loaded.shape,
            criterion=fit.criterion.name,
            predictor=options.predictor,
            feature=options.reads,
            taps=taps,
            rank=len(fit.predictors[0].mixer_weight) if taps else 0,
            random_features=fit.predictors[0].mixer_weight.shape[1] if taps else 0,
            data=data,
            examples=len(examples),
            tokens=features.tokens,
            seq_len=max(len(example.ids) for example in examples),
            seed=options.seed,
            metrics=fit.metrics() | {"seconds": round(seconds, 3)},
            versions=versions(),
            mean_head_scores=fit.mean("heads"),
            mean_neuron_scores=fit.mean("neurons"),
            zero_rate=features.zero_rate(),
            head_quantiles=fit.quantiles("heads"),
            neuron_quantiles=fit.quantiles("neurons"),
            head_damage=fit.damage("heads"),
            neuron_damage=fit.damage("neurons"),
            weights={
                f"{predictor.tap.layer}.{name}": value.cpu()
                for predictor in fit.predictors
                for name, value in predictor.state_dict().items()
            },
        )
        for fit in fits
    ]


@dataclass(frozen=True)
class FeatureMap:
    """Feature -> phi: z = (x - mean) * scale, and relu(weight z + bias) beside it.

    Attributes:
        mean: fp32 [C].
        scale: fp32 [C].
        weight: fp32 [M, C], random.
        bias: fp32 [M], random.
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def expand(self, feature: Tensor) -> Tensor:
        """Phi, what the ridge regression sees: fp32 [..., C] -> [..., C + M]."""
        z = (feature - self.mean) * self.scale
        random = torch.relu(nn.functional.linear(z, self.weight, self.bias))
        return torch.cat((z, random), dim=-1)

    def fold(self, predictor: ShadowPredictor, encoder: Tensor, bias: Tensor) -> None:
        """Write code = encoder phi + bias into a predictor, which reads x itself."""
        width = len(self.mean)
        weight = torch.cat((self.weight.double(), encoder[:, :width])) * self.scale
        predictor.first_weight = weight.float()
        predictor.first_bias = (torch.cat((self.bias, bias)) - weight @ self.mean.double()).float()
        predictor.mixer_weight = encoder[:, width:].float()


class FeatureSums:
    """Sums that every criterion shares.

    Args:
        shape: The model's shape.
        taps: Layers whose predictors are fitted; none for `static`.
        maps: For each tap what gives its phi.
    """

    def __init__(self, shape: ModelShape, taps: Sequence[int], maps: Sequence[FeatureMap]) -> None:
        """Start from nothing."""
        self.shape, self.maps = shape, maps
        self.taps = taps_of(shape.layers, taps) if taps else ()
        self.tokens = 0
        self.gram: dict[tuple[str, int], Tensor] = {}
        self.gradient_square: dict[Site, Tensor] = {}
        self.zeros: dict[int, Tensor] = {}
        #: Which tap scores the units of a site; nobody scores layer 0's heads, which always run.
        self.tap_of = {
            (kind, layer): index
            for index, tap in enumerate(self.taps)
            for kind, layers in (("heads", tap.heads), ("neurons", tap.neurons))
            for layer in layers
        }

    def add(self, batch: Batch) -> list[Tensor]:
        """Add a batch; returns each tap's phi, fp32 [B, T, P], zero where nothing counts."""
        self.tokens += int(batch.counts.sum())
        for site, a, g in _sites(batch):
            _add(self.gradient_square, site, _sum(batch, g.square().sum(dim=-1)))
            if site[0] == "neurons":
                _add(self.zeros, site[1], _sum(batch, (a == 0).float().squeeze(-1)))
        found = []
        for tap, (feature_map, feature) in enumerate(zip(self.maps, batch.features, strict=True)):
            phi = feature_map.expand(feature) * batch.counts[..., None]
            _add(self.gram, ("square", tap), torch.einsum("btp,btq->pq", phi, phi).double())
            _add(self.gram, ("sum", tap), _sum(batch, phi))
            found.append(phi)
        return found

    def zero_rate(self) -> Tensor:
        """Share of tokens whose activation is exactly zero, fp32 [L, F]."""
        zeros = torch.stack([self.zeros[layer] for layer in sorted(self.zeros)])
        return (zeros / self.tokens).float().cpu()


class ScoreSums:
    """Sums of one criterion's scores; the scores themselves are never stored."""

    def __init__(self, criterion: Criterion, seed: int) -> None:
        """Start from nothing."""
        self.criterion = criterion
        self.generator = torch.Generator().manual_seed(seed)
        self.totals: dict[Site, Tensor] = {}
        self.roots: dict[Site, Tensor] = {}
        self.products: dict[Site, Tensor] = {}

    def add(self, batch: Batch, phi: Sequence[Tensor], tap_of: Mapping[Site, int]) -> None:
        """Add a batch whose features are `phi`, a tap each."""
        criterion = self.criterion
        for units in batch.units(self.generator):
            site = units.site
            scores = criterion.score(units) if criterion.score else None
            if criterion.total:
                _add(self.totals, site, criterion.total(units))
            elif scores is not None:
                _add(self.totals, site, _sum(batch, scores))
            if scores is not None and site in tap_of:
                roots = scores.abs().sqrt_().copysign_(scores)  # of grasp's sign
                _add(self.roots, site, _sum(batch, roots))
                product = torch.einsum("btp,btu->pu", phi[tap_of[site]], roots)
                _add(self.products, site, product)

    def fit(self, features: FeatureSums, options: FitOptions) -> Fit:
        """Mean scores and each tap's predictor."""
        factors, means = {}, {}
        for site, total in self.totals.items():
            moments = Moments((features.gradient_square[site] / features.tokens).float())
            known = self.criterion.factor(moments) if self.criterion.factor else 1.0
            finish = self.criterion.finish
            mean = (finish(total) if finish else total / features.tokens).float() * known
            scale = mean.abs().mean().clamp(min=1e-30) ** -self.criterion.balance
            factors[site], means[site] = torch.ones_like(mean) * known * scale, mean * scale
        predictors = [
            self._regress(index, features, options, factors) for index in range(len(features.taps))
        ]
        return Fit(self.criterion, factors, means, predictors, self.generator)

    def _regress(
        self, index: int, features: FeatureSums, options: FitOptions, factors: dict[Site, Tensor]
    ) -> ShadowPredictor:
        """A tap's reduced-rank ridge regression of sqrt(S) on phi."""
        n, mean = features.tokens, features.gram["sum", index] / features.tokens
        gram = features.gram["square", index] / n - mean[:, None] * mean
        size = len(gram)
        gram.diagonal().add_(options.ridge * size / n * gram.diagonal().mean())
        energy = torch.zeros_like(gram)
        biases: dict[Site, Tensor] = {}
        sites = [site for site in self.products if features.tap_of[site] == index]
        for site in sites:  # in place: they are what fills the memory
            product, root = self.products[site], factors[site].sqrt()
            biases[site] = (self.roots[site] / n).float() * root
            product.div_(n).mul_(root).addr_(mean.float(), biases[site], alpha=-1.0)
            energy += (product @ product.T).double()
        identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
        inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), identity, upper=False)
        directions = torch.linalg.eigh(inverse @ energy @ inverse.T).eigenvectors
        encoder = directions[:, -min(options.size[0], size) :].T @ inverse  # [R, P]

        known, tap = features.maps[index], features.taps[index]
        rank, (random, width) = len(encoder), known.weight.shape
        predictor = ShadowPredictor(features.shape, rank, random, width, tap).to(mean.device)
        known.fold(predictor, encoder, -(encoder @ mean))
        for kind in ("heads", "neurons"):
            own = [site for site in sites if site[0] == kind]
            if own:
                weights = [self.products[site].T @ encoder.T.float() for site in own]
                setattr(predictor, f"{kind}_weight", torch.cat(weights))
                setattr(predictor, f"{kind}_bias", torch.cat([biases[site] for site in own]))
        return predictor.eval()


class Fit:
    """What was fitted for one criterion, and how it does on held-out tokens."""

    def __init__(
        self,
        criterion: Criterion,
        factors: dict[Site, Tensor],
        means: dict[Site, Tensor],
        predictors: Sequence[ShadowPredictor],
        generator: torch.Generator,
    ) -> None:
        """Take the results of `ScoreSums.fit`."""
        self.criterion, self.predictors = criterion, predictors
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
            scores = score(units)[rows]
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
            for site, a, g in _sites(batch)
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


def _feature_maps(
    collector: Collector, training: Sequence[Example], options: FitOptions
) -> list[FeatureMap]:
    """Each tap's first stage: feature statistics and seeded random features."""
    if not collector.taps:
        return []
    sums: dict[tuple[str, int], Tensor] = {}
    tokens = 0
    for group in _batches(training, options.batch_tokens):
        features, counts = collector.features(group)
        tokens += int(counts.sum())
        for tap, feature in enumerate(features):
            rows = feature[counts].double()
            _add(sums, ("rows", tap), rows.sum(dim=0))
            _add(sums, ("squares", tap), rows.square().sum(dim=0))
    generator = torch.Generator().manual_seed(options.seed)
    maps, random = [], options.size[1]
    for tap in range(len(collector.taps)):
        mean = sums["rows", tap] / tokens
        scale = (sums["squares", tap] / tokens - mean.square()).clamp(min=1e-12).rsqrt()
        weight = torch.randn(random, len(mean), generator=generator) * len(mean) ** -0.5
        bias = torch.randn(random, generator=generator)
        device = mean.device
        maps.append(FeatureMap(mean.float(), scale.float(), weight.to(device), bias.to(device)))
    return maps


def _sites(batch: Batch) -> Iterator[tuple[Site, Tensor, Tensor]]:
    """Each layer's heads, then each layer's neurons, with a and g."""
    for kind, values in (("heads", batch.heads), ("neurons", batch.neurons)):
        for layer, (a, g) in enumerate(values):
            yield (kind, layer), a, g


def _sum(batch: Batch, values: Tensor) -> Tensor:
    """Sum of [B, T, U] over the positions that count, fp64 [U]."""
    return torch.einsum("bt,btu->u", batch.counts.float(), values).double()


def _add(sums: dict[_Key, Tensor], key: _Key, value: Tensor) -> None:
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value


def _split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples."""
    usable = [example for example in examples if any(example.scored[2:])]
    if len(usable) < 2:
        raise DataError(
            "too few examples to calibrate on",
            expected="at least two of three tokens or more, one to fit and one to measure",
            got=len(usable),
            fix="a larger --examples or more text",
        )
    last = min(_HELD_OUT_EVERY, len(usable)) - 1
    parts: tuple[list[Example], list[Example]] = ([], [])
    for index, example in enumerate(usable):
        parts[index % _HELD_OUT_EVERY == last].append(example)
    return parts


def _batches(examples: Sequence[Example], tokens: int) -> Iterator[Sequence[Example]]:
    """Consecutive examples, about `tokens` padded tokens at a time."""
    group: list[Example] = []
    for example in examples:
        longest = max(len(one.ids) for one in [*group, example])
        if group and longest * (len(group) + 1) > tokens:
            yield group
            group = []
        group.append(example)
    if group:
        yield group


@contextmanager
def _progress(tokens: int, visible: bool) -> Iterator[Callable[[Sequence[Example], float], None]]:
    """A progress bar on stderr; yields what is called with each batch's examples and loss."""
    columns = (
        TextColumn("calibrating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens, {task.fields[rate]:,.0f}/s, loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not visible, transient=False) as bar:
        task = bar.add_task("calibrating", total=tokens, rate=0.0, loss=float("nan"))
        losses: list[float] = []

        def advance(group: Sequence[Example], loss: float) -> None:
            losses.append(loss)
            bar.advance(task, sum(len(example.ids) for example in group))
            speed = bar.tasks[0].speed or 0.0
            bar.update(task, rate=speed, loss=sum(losses) / len(losses))

        yield advance
