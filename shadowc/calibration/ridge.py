"""The closed form: sums over one pass, and the reduced-rank ridge regression that they hold.

Scores are never kept, only sums of them (P features, U units, of a criterion's score S):

    phi^T phi   [P, P]        phi^T sqrt(S)   [P, U]        sum phi, sum S, sum sqrt(S)

Sums of several parts of the data add up (`merge`), and can be written and read back (`state`,
`load_state`). Every tap has its own phi; a unit's sums are taken with that of the tap that scores
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
P = C + M and U = H (L-1) + F L: 43 MB for opt-books-15m, 2.0 GB for OPT-1.3B.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TypeVar

import torch
from torch import Tensor, nn

from shadowc.calibration.collect import Batch
from shadowc.calibration.criteria import Criterion, Moments, Site
from shadowc.calibration.predictor import ShadowPredictor
from shadowc.config import ModelShape, taps_of
from shadowc.errors import CalibrationError

_Key = TypeVar("_Key", bound=Hashable)
#: What multiplies the scores of a site's units, fp32 [U].
Factors = dict[Site, Tensor]


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


class Tables:
    """Attributes that are tables, (name, index) -> tensor, and can be written and read back."""

    tables: tuple[str, ...]
    generator: torch.Generator | None = None

    def state(self) -> dict[str, Tensor]:
        """Every tensor as `TABLE.NAME.INDEX`, and where the generator is."""
        drawn = {"generator": self.generator.get_state()} if self.generator else {}
        return drawn | {
            f"{table}.{name}.{index}": value
            for table in self.tables
            for (name, index), value in getattr(self, table).items()
        }

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from what `state` gave."""
        for key, value in state.items():
            if self.generator and key == "generator":
                self.generator.set_state(value)
                continue
            table, name, index = key.split(".")
            getattr(self, table)[name, int(index)] = value.to(device)


class Sums(Tables):
    """Tables of sums, which add up."""

    def merge(self, other: Sums) -> None:
        """Add the sums of other data, taken with the same features."""
        for table in self.tables:
            for key, value in getattr(other, table).items():
                _add(getattr(self, table), key, value)


class FeatureSums(Sums):
    """Sums that every criterion shares.

    Args:
        shape: The model's shape.
        taps: Layers whose predictors are fitted; none for `static`.
        maps: For each tap what gives its phi.
    """

    tables = ("counts", "gram", "gradient_square", "zeros")

    def __init__(self, shape: ModelShape, taps: Sequence[int], maps: Sequence[FeatureMap]) -> None:
        """Start from nothing."""
        self.shape, self.maps = shape, list(maps)
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

    @property
    def tokens(self) -> int:
        """Positions that counted."""
        return int(self.counts["tokens", 0])

    def merge(self, other: Sums) -> None:
        """Add the sums of other data, taken with the same features.

        Raises:
            CalibrationError: If they were taken with others.
        """
        mine, theirs = (
            {k: v for k, v in sums.state().items() if k.startswith("maps.")}
            for sums in (self, other)
        )
        if mine.keys() != theirs.keys() or any(
            not torch.equal(mine[k].cpu(), theirs[k].cpu()) for k in mine
        ):
            raise CalibrationError(
                "the sums were taken with other features", expected="the same taps, data and seed"
            )
        super().merge(other)

    def state(self) -> dict[str, Tensor]:
        """Every sum, and what phi is made with."""
        return super().state() | {
            f"maps.{name}.{tap}": value
            for tap, one in enumerate(self.maps)
            for name, value in vars(one).items()
        }

    def load_state(self, state: Mapping[str, Tensor], device: torch.device) -> None:
        """Go on from what `state` gave."""
        sums = dict(state)
        self.maps = [
            FeatureMap(**{
                field.name: sums.pop(f"maps.{field.name}.{tap}").to(device)
                for field in fields(FeatureMap)
            })
            for tap in range(len(self.taps))
        ]  # fmt: skip
        super().load_state(sums, device)

    def add(self, batch: Batch) -> list[Tensor]:
        """Add a batch; returns each tap's phi, fp32 [B, T, P], zero where nothing counts."""
        _add(self.counts, ("tokens", 0), batch.counts.sum())
        for site, a, g in batch.sites():
            _add(self.gradient_square, site, _sum(batch, g.square().sum(dim=-1)))
            if site[0] == "neurons":
                _add(self.zeros, site, _sum(batch, (a == 0).float().squeeze(-1)))
        found = []
        taps = zip(self.maps, batch.features, strict=bool(self.maps))  # no phi without maps
        for tap, (feature_map, feature) in enumerate(taps):
            phi = feature_map.expand(feature) * batch.counts[..., None]
            _add(self.gram, ("square", tap), torch.einsum("btp,btq->pq", phi, phi).double())
            _add(self.gram, ("sum", tap), _sum(batch, phi))
            found.append(phi)
        return found

    def zero_rate(self) -> Tensor:
        """Share of tokens whose activation is exactly zero, fp32 [L, F]."""
        zeros = torch.stack([self.zeros[site] for site in sorted(self.zeros)])
        return (zeros / self.tokens).float().cpu()


class ScoreSums(Sums):
    """Sums of one criterion's scores; the scores themselves are never stored.

    Args:
        criterion: The criterion.
        seed: Of criteria that draw.
        refresh: Tokens that a mask serves, as in `Policy`: a predictor regresses their mean.
    """

    tables = ("totals", "roots", "products")

    def __init__(self, criterion: Criterion, seed: int, refresh: int = 1) -> None:
        """Start from nothing."""
        self.criterion, self.refresh = criterion, refresh
        self.generator: torch.Generator = torch.Generator().manual_seed(seed)
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
                scores = batch.ahead(scores, self.refresh)
                roots = scores.abs().sqrt_().copysign_(scores)  # of grasp's sign
                _add(self.roots, site, _sum(batch, roots))
                product = torch.einsum("btp,btu->pu", phi[tap_of[site]], roots)
                _add(self.products, site, product)

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
    n, mean = features.tokens, features.gram["sum", index] / features.tokens
    gram = features.gram["square", index] / n - mean[:, None] * mean
    size = len(gram)
    gram.diagonal().add_(ridge * size / n * gram.diagonal().mean())
    energy = torch.zeros_like(gram)
    biases: dict[Site, Tensor] = {}
    sites = [site for site in sorted(scores.products) if features.tap_of[site] == index]
    for site in sites:
        product, root = scores.products[site], factors[site].sqrt()
        biases[site] = (scores.roots[site] / n).float() * root
        product.div_(n).mul_(root).addr_(mean.float(), biases[site], alpha=-1.0)
        energy += (product @ product.T).double()
    identity = torch.eye(size, dtype=gram.dtype, device=gram.device)
    inverse = torch.linalg.solve_triangular(torch.linalg.cholesky(gram), identity, upper=False)
    directions = torch.linalg.eigh(inverse @ energy @ inverse.T).eigenvectors
    encoder = directions[:, -min(rank, size) :].T @ inverse  # [R, P]

    known, tap = features.maps[index], features.taps[index]
    random, width = known.weight.shape
    predictor = ShadowPredictor(features.shape, len(encoder), random, width, tap).to(mean.device)
    known.fold(predictor, encoder, -(encoder @ mean))
    for kind in ("heads", "neurons"):
        own = [site for site in sites if site[0] == kind]
        if own:
            weights = [scores.products[site].T @ encoder.T.float() for site in own]
            setattr(predictor, f"{kind}_weight", torch.cat(weights))
            setattr(predictor, f"{kind}_bias", torch.cat([biases[site] for site in own]))
    return predictor.eval()


def _sum(batch: Batch, values: Tensor) -> Tensor:
    """Sum of [B, T, U] over the positions that count, fp64 [U]."""
    return torch.einsum("bt,btu->u", batch.counts.float(), values).double()


def _add(sums: dict[_Key, Tensor], key: _Key, value: Tensor) -> None:
    if key in sums:
        sums[key] += value
    else:
        sums[key] = value
