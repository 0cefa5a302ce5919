"""The closed form: sums over one pass, and the reduced-rank ridge regression that they hold.

Scores are never kept, only sums of them (P features, U units, of a criterion's score S):

    phi^T phi   [P, P]        phi^T sqrt(S)   [P, U]        sum phi, sum S, sum sqrt(S)

Every tap has its own phi; a unit's sums are taken with that of the tap that scores
it, so several taps need no more memory than one.

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
P = C' + M, C' at most 1,024 (`fit.DIRECTIONS`), and U = H (L-1) + F L: 17 MB for opt-books-15m,
0.8 GB for OPT-1.3B and 3.4 GB for OPT-13B, with the layerwise predictor's M of 0.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor, nn

from shadowc.calibration.collect import Batch
from shadowc.calibration.criteria import Criterion, Moments, Site, Units, over_values
from shadowc.calibration.predictor import ShadowPredictor
from shadowc.config import ModelShape, taps_of

_Key = TypeVar("_Key", bound=Hashable)
#: What multiplies the scores of a site's units, fp32 [U].
Factors = dict[Site, Tensor]


@dataclass(frozen=True)
class FeatureMap:
    """Feature -> phi: z = (x - mean) * scale, and relu(weight z + bias) beside basis z.

    Attributes:
        mean: fp32 [C].
        scale: fp32 [C].
        weight: fp32 [M, C], random.
        bias: fp32 [M], random.
        basis: fp32 [C', C], orthonormal: the directions in which z varies most, all of them where
            it is empty [0, C].
    """

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor
    basis: Tensor

    def expand(self, feature: Tensor) -> Tensor:
        """Phi, what the ridge regression sees: fp32 [..., C] -> [..., C' + M]."""
        z = (feature - self.mean) * self.scale
        with _rounded_products():
            linear = nn.functional.linear(z, self.basis) if len(self.basis) else z
            if not len(self.weight):
                return linear
            random = torch.relu(nn.functional.linear(z, self.weight, self.bias))
        return torch.cat((linear, random), dim=-1)

    def fold(self, predictor: ShadowPredictor, encoder: Tensor, bias: Tensor) -> None:
        """Write code = encoder phi + bias into a predictor, which reads x itself."""
        width = len(self.basis) or len(self.mean)
        linear = encoder[:, :width]
        if len(self.basis):
            linear = linear @ self.basis.double()
        weight = torch.cat((self.weight.double(), linear)) * self.scale
        predictor.first_weight = weight.float()
        predictor.first_bias = (torch.cat((self.bias, bias)) - weight @ self.mean.double()).float()
        predictor.mixer_weight = encoder[:, width:].float()


class FeatureMoments:
    """What a tap's map is made of: the moments of its feature over some tokens.

    The directions in which z varies most are the range of Z^T Z Omega for a random Omega [C, C'].

    Args:
        width: C.
        most: C', at most; where C is not above it, phi has all of z.
        generator: Draws Omega, and what the map draws.

    Source: Halko, Martinsson and Tropp 2011 (arXiv 0909.4061).
    """

    def __init__(self, width: int, most: int, generator: torch.Generator) -> None:
        """Start from nothing."""
        self.generator = generator
        self.omega = torch.randn(width, most if width > most else 0, generator=generator)
        self.tokens = 0
        self.sum = self.square = self.range = torch.zeros(())

    def add(self, rows: Tensor) -> None:
        """Add a feature of some tokens, fp32 [N, C]."""
        self.omega = self.omega.to(rows.device)
        self.tokens += len(rows)
        self.sum = self.sum.to(rows.device) + rows.double().sum(dim=0)
        self.square = self.square.to(rows.device) + rows.double().square().sum(dim=0)
        self.range = self.range.to(rows.device) + (rows.T @ (rows @ self.omega)).double()

    def map(self, random: int) -> FeatureMap:
        """The map, with M random features."""
        mean, width = self.sum / self.tokens, len(self.sum)
        scale = (self.square / self.tokens - mean.square()).clamp(min=1e-12).rsqrt()
        weight = torch.randn(random, width, generator=self.generator) * width**-0.5
        bias = torch.randn(random, generator=self.generator)
        centred = self.range - torch.outer(self.sum, mean @ self.omega.double())
        basis = torch.linalg.qr((scale[:, None] * centred).float()).Q.T.contiguous()
        return FeatureMap(
            mean.float(), scale.float(), weight.to(mean.device), bias.to(mean.device), basis
        )


class Tables:
    """Attributes that are tables of sums, (name, layer) -> tensor.

    Those of several parts of the data add up, and can be written and read back.
    """

    tables: tuple[str, ...]

    def sums(self) -> dict[str, Tensor]:
        """Every sum, itself, as `TABLE.NAME.LAYER`."""
        return {
            f"{table}.{name}.{layer}": value
            for table in self.tables
            for (name, layer), value in getattr(self, table).items()
        }

    def made(self) -> dict[str, Tensor]:
        """What the sums are made with, which does not add up."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """All that it takes to go on."""
        return self.sums() | self.made()

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        for table in self.tables:
            getattr(self, table).clear()
        for key, value in state.items():
            table, name, layer = key.split(".")
            getattr(self, table)[name, int(layer)] = value


class FeatureSums(Tables):
    """Sums that every criterion shares.

    Args:
        shape: The model's shape.
        taps: Layers whose predictors are fitted; none for `static`.

    Attributes:
        maps: For each tap what gives its phi; to be filled before the first batch.
    """

    tables = ("counts", "gram", "gradient_square", "zeros")

    def __init__(self, shape: ModelShape, taps: Sequence[int]) -> None:
        """Start from nothing."""
        self.shape, self.maps = shape, list[FeatureMap]()
        self.taps = taps_of(shape.layers, taps) if taps else ()
        self.counts: dict[tuple[str, int], Tensor] = {}
        self.gram: dict[tuple[str, int], Tensor] = {}
        self.gradient_square: dict[Site, Tensor] = {}
        self.zeros: dict[Site, Tensor] = {}
        #: Which tap scores the units of a site; nobody scores layer 0's heads, which always run.
        self.tap_of = {
            (kind, layer): index
            for index, tap in enumerate(self.taps)
            for kind, layers in (("heads", tap.heads), ("neurons", tap.neurons))
            for layer in layers
        }

    def made(self) -> dict[str, Tensor]:
        """What phi is made with."""
        return {
            f"maps.{name}.{tap.layer}": value
            for tap, one in zip(self.taps, self.maps, strict=bool(self.maps))
            for name, value in vars(one).items()
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` gave."""
        names = [field.name for field in fields(FeatureMap)]
        if any(key.startswith("maps.") for key in state):
            self.maps = [
                FeatureMap(*(state[f"maps.{name}.{tap.layer}"] for name in names))
                for tap in self.taps
            ]
        super().load_state({k: v for k, v in state.items() if not k.startswith("maps.")})

    @property
    def tokens(self) -> int:
        """Positions that counted."""
        return int(self.counts["tokens", 0])

    def count(self, batch: Batch) -> None:
        """Add a batch's positions; its features and units follow."""
        add(self.counts, ("tokens", 0), batch.counts.sum())

    def add(self, units: Units) -> None:
        """Add a layer's units."""
        site = units.site
        add(self.gradient_square, site, units.sum(over_values(units.g.square())))
        if site[0] == "neurons":
            add(self.zeros, site, units.sum((units.a == 0).float().squeeze(-1)))

    def add_feature(self, batch: Batch, tap: int) -> Tensor:
        """Add what a tap read; returns phi, fp32 [B, T, P], zero where nothing counts."""
        feature = batch.feature(tap)
        counts = batch.counts.to(feature.device)[..., None]
        phi = self.maps[tap].expand(feature).mul_(counts)
        flat = phi.flatten(0, 1)
        layer = self.taps[tap].layer
        add(self.gram, ("square", layer), (flat.T @ flat).double())
        add(self.gram, ("sum", layer), flat.sum(dim=0).double())
        return phi

    def zero_rate(self) -> Tensor:
        """Share of tokens whose activation is exactly zero, fp32 [L, F]."""
        zeros = torch.stack([self.zeros[site] for site in sorted(self.zeros)])
        return (zeros / self.tokens).float().cpu()


class ScoreSums(Tables):
    """Sums of one criterion's scores; the scores themselves are never stored.

    Args:
        criterion: The criterion.
        refresh: Tokens that a mask serves, as in `Policy`: a predictor regresses their mean.
    """

    tables = ("totals", "roots", "products")

    def __init__(self, criterion: Criterion, refresh: int = 1) -> None:
        """Start from nothing."""
        self.criterion, self.refresh = criterion, refresh
        self.totals: dict[Site, Tensor] = {}
        self.roots: dict[Site, Tensor] = {}
        self.products: dict[Site, Tensor] = {}

    def add(self, units: Units, phi: Tensor | None) -> None:
        """Add a layer's units; `phi` is of the tap that scores them, None if nobody does."""
        criterion, site = self.criterion, units.site
        scores = criterion.score(units) if criterion.score else None
        if criterion.total:
            add(self.totals, site, criterion.total(units))
        elif scores is not None:
            add(self.totals, site, units.sum(scores))
        if scores is not None and phi is not None:
            scores = units.ahead(scores, self.refresh)
            roots = scores.sqrt()
            if criterion.signed:
                roots = scores.abs().sqrt_().copysign_(scores)
            add(self.roots, site, units.sum(roots))
            phi = phi.to(roots.device)
            with _rounded_products():
                product = phi.flatten(0, 1).T @ roots.flatten(0, 1)
            add(self.products, site, product)

    def ranking_units(self, features: FeatureSums) -> tuple[Factors, dict[Site, Tensor]]:
        """What brings scores to the scale in which units are ranked, and the mean scores in it."""
        factors, means = {}, {}
        for site, total in self.totals.items():
            moments = Moments((features.gradient_square[site] / features.tokens).float())
            known = self.criterion.factor(moments) if self.criterion.factor else 1.0
            finish = self.criterion.finish
            mean = (finish(total) if finish else total / features.tokens).float() * known
            scale = mean.abs().mean().clamp(min=1e-30) ** -self.criterion.balance
            factors[site], means[site] = torch.ones_like(mean) * known * scale, mean * scale
        return factors, means


def regress(
    features: FeatureSums,
    scores: ScoreSums,
    factors: Factors,
    index: int,
    *,
    rank: int,
    ridge: float,
) -> ShadowPredictor:
    """A tap's reduced-rank ridge regression of sqrt(S) on phi.

    Args:
        features: Sums of phi.
        scores: Sums of one criterion's scores; changed, since they are what fills the memory.
        factors: As `ScoreSums.ranking_units` gives them.
        index: Which of the taps.
        rank: R, at most P.
        ridge: Strength of the regularisation, in units of P / tokens.
    """
    known, tap = features.maps[index], features.taps[index]
    n, mean = features.tokens, features.gram["sum", tap.layer] / features.tokens
    gram = features.gram["square", tap.layer] / n - mean[:, None] * mean
    size = len(gram)
    gram.diagonal().add_(ridge * size / n * gram.diagonal().mean())
    energy = torch.zeros_like(gram)
    biases: dict[Site, Tensor] = {}
    sites = [site for site in sorted(scores.products) if features.tap_of[site] == index]
    for site in sites:
        product, root = scores.products[site], factors[site].sqrt()
        biases[site] = (scores.roots[site] / n).float() * root
        product.div_(n).mul_(root).addr_(mean.float().to(root.device), biases[site], alpha=-1.0)
        energy += (product @ product.T).double().to(energy.device)
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), identity, upper=False)
    directions = torch.linalg.eigh(inverse @ energy @ inverse.T).eigenvectors
    encoder = directions[:, -min(rank, size) :].T @ inverse  # [R, P]

    random, width = known.weight.shape
    predictor = ShadowPredictor(features.shape, len(encoder), random, width, tap).to(mean.device)
    known.fold(predictor, encoder, -(encoder @ mean))
    for kind in ("heads", "neurons"):
        own = [site for site in sites if site[0] == kind]
        if own:
            decoder = encoder.T.float()
            products = [scores.products[site] for site in own]
            weights = [(one.T @ decoder.to(one.device)).to(mean.device) for one in products]
            setattr(predictor, f"{kind}_weight", torch.cat(weights))
            setattr(
                predictor, f"{kind}_bias", torch.cat([biases[site].to(mean.device) for site in own])
            )
    return predictor.eval()


@contextmanager
def _rounded_products() -> Iterator[None]:
    """Let a GPU's tensor cores take fp32 as tf32: 10 bits of what is summed over all tokens."""
    matmul = torch.backends.cuda.matmul
    before, matmul.allow_tf32 = matmul.allow_tf32, True
    try:
        yield
    finally:
        matmul.allow_tf32 = before


def add(sums: dict[_Key, Tensor], key: _Key, value: Tensor) -> None:
    """Add to a table."""
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value
