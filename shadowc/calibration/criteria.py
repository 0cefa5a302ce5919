"""Criteria: how much a unit matters, from its activation a and the loss gradient g there.

A unit's a and g are the D values of a head, or the single value of a neuron, at the input of its
block's output projection. Sums over d run over them, sums over t over an example's positions that
count. A criterion scores one layer's units of one kind at a time, token by token: a predictor
learns those scores, and the `static` score of a unit is their mean. Where the sum over t is not
outermost, the criterion adds up something else over batches (`Criterion.total`), which its static
score is made of; if no score of a token is left in it, it gives static pruning only.

Everything is computed in fp32 and nothing of a token is kept. What is added up takes, in bytes for
each unit, 8 where not said otherwise, 4 (N + 1)^2 for jacov (N = 8 rows) and 4 K (D + 1) for
epenas (K = 128 classes): 64 and 227 MB for OPT-1.3B.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shadowc.errors import OptionError

_ROWS = 8  # of jacov
_CLASSES = 128  # of epenas

Site = tuple[str, int]  # (`heads` or `neurons`, layer)


class WeightGradient(NamedTuple):
    """A first projection of an MLP; its weight's gradient at token t is outer(g_t, x_t).

    Attributes:
        weight: [F, C].
        x: fp32 [B, T, C], its input.
        g: fp32 [B, T, F], the loss gradient at its output.
    """

    weight: Tensor
    x: Tensor
    g: Tensor


@dataclass(frozen=True)
class Units:
    """One layer's heads or neurons in one batch.

    Attributes:
        kind: `heads` or `neurons`.
        layer: Index of the layer.
        a: fp32 [B, T, U, D], activations (D is 1 for neurons).
        g: fp32 [B, T, U, D], gradient of the sum over examples of their mean loss.
        seed: Of criteria that draw, for these units of this batch.
        counts: bool [B, T], the positions that count: those from 1 to some last one.
        following: int64 [B, T], the next tokens.
        weight: [C, U*D], the output projection's.
        curvature: fp32 [B, T, U], for a criterion that needs `curvature`: Hessian times gradient of
            gates that the counting positions of an example share, split over the positions.
        first: The MLP's first projections, for neurons and a criterion that needs `first`.
    """

    kind: str
    layer: int
    a: Tensor
    g: Tensor
    seed: int
    counts: Tensor
    following: Tensor
    weight: Tensor
    curvature: Tensor | None = None
    first: tuple[WeightGradient, ...] = ()

    @property
    def site(self) -> Site:
        """Kind and layer."""
        return self.kind, self.layer

    def sum(self, values: Tensor) -> Tensor:
        """Sum of [B, T, U] over the positions that count, fp64 [U]."""
        return torch.einsum("bt,btu->u", self.counts.float(), values).double()

    def ahead(self, values: Tensor, refresh: int) -> Tensor:
        """Means over the tokens that a mask made at a position would serve.

        Args:
            values: fp32 [B, T, U].
            refresh: As in `Policy`: positions t to t + refresh - 1, or, if 0, t to the end; of
                these, those that count.

        Returns:
            fp32 [B, T, U].
        """
        if refresh == 1:
            return values
        tokens = values.shape[1]
        last = torch.arange(tokens, device=values.device) + (refresh or tokens) - 1
        last = last.clamp(max=tokens - 1)
        one = self.counts[..., None].double()

        def spanned(own: Tensor) -> Tensor:
            sums = own.cumsum(dim=1)
            return sums[:, last] - sums + own

        return (spanned(values * one) / spanned(one).clamp(min=1)).float()


@dataclass(frozen=True)
class Moments:
    """What is known of one layer's units after the whole pass.

    Attributes:
        gradient_square: fp32 [U], E[sum_d g^2] over tokens.
    """

    gradient_square: Tensor


@dataclass(frozen=True)
class Criterion:
    """One way to score units.

    Attributes:
        name: What it is called on the command line.
        formula: Score of a unit over an example.
        source: Where it is from.
        score: Units -> fp32 [B, T, U]; None: a single token has no score, so the criterion gives
            static pruning only.
        factor: Moments -> fp32 [U], multiplied onto the scores once the pass is over.
        balance: How far layers are brought to one scale before they are ranked together: scores
            are divided by (mean score of their layer)^balance. 0: not at all; 1: equal means.
            Measured: the more a score says of the loss itself, the less it needs.
        total: Units -> [U, ...], what is added up over batches for the static score; None: the
            scores of the tokens that count.
        finish: The sum of that, [U, ...] -> [U], the static score; None: divided by the tokens.
        needs: What the collector must provide besides a and g: `curvature`, `first`.
        signed: Scores may be negative.
    """

    name: str
    formula: str
    source: str
    score: Callable[[Units], Tensor] | None
    factor: Callable[[Moments], Tensor] | None = None
    balance: float = 0.0
    total: Callable[[Units], Tensor] | None = None
    finish: Callable[[Tensor], Tensor] | None = None
    needs: tuple[str, ...] = ()
    signed: bool = False

    @property
    def per_token(self) -> bool:
        """Whether a predictor can learn it."""
        return self.score is not None


def plainact(units: Units) -> Tensor:
    """First-order effect on the loss of removing the unit: abs(sum_d g a).

    Source: Molchanov 2016, Michel 2019; the criterion of ShadowLLM (arXiv 2406.16635).
    """
    return _effect(units).abs()


def plainact_weights(units: Units) -> Tensor:
    """Saliency of a neuron's first weights: for each example sum_e abs(dW W), fp64 [U].

    e runs over the neuron's rows of the first projections (fc1; gate and up), dW is the example's
    gradient, sum_t outer(g_t, x_t): one product of matrices an example. Heads are scored by
    plainact. Source: the published code of ShadowLLM.
    """
    if not units.first:
        return _counted(units, plainact(units)).sum(dim=0).double()
    total = torch.zeros(units.a.shape[2], dtype=torch.float64, device=units.a.device)
    for weight, x, g in units.first:
        for inputs, gradients in zip(x, g * units.counts[..., None], strict=True):
            total += (gradients.T @ inputs).mul_(weight).abs_().sum(dim=1)
    return total


def l2norm(units: Units) -> Tensor:
    """Magnitude of the activation, what DejaVu-style predictors learn: sqrt(sum_d a^2).

    Source: DejaVu (arXiv 2310.17157).
    """
    return _norm(units.a)


def gradient_rms(moments: Moments) -> Tensor:
    """The factor of `sens`: the unit's RMS gradient, sqrt(E[sum_d g^2])."""
    return moments.gradient_square.sqrt()


def contrib(units: Units) -> Tensor:
    """Length of what the unit adds to the residual stream: norm(W_out,u a_u).

    Computed as sqrt(a^T (W^T W) a), D x D a head, and abs(a) norm(column) for a neuron.
    Source: WINA (arXiv 2505.19427).
    """
    width = units.a.shape[-1]
    weight = units.weight.float().unflatten(1, (-1, width))  # [C, U, D]
    if width == 1:
        lengths: Tensor = weight.squeeze(-1).norm(dim=0)
        return units.a.squeeze(-1).abs() * lengths
    gram = torch.einsum("cud,cue->ude", weight, weight)
    along = torch.einsum("btud,ude->btue", units.a, gram)
    return (along * units.a).sum(dim=-1).clamp(min=0).sqrt()


def gradnorm(units: Units) -> Tensor:
    """Magnitude of the gradient: sqrt(sum_d g^2).

    Source: as a score of architectures, Abdelfattah 2021 (arXiv 2101.08134).
    """
    return _norm(units.g)


def fisher(units: Units) -> Tensor:
    """Empirical Fisher information of a gate on the unit: (sum_d g a)^2.

    Source: Theis 2018 (arXiv 1801.05787), Turner 2019 (arXiv 1906.04113).
    """
    return _effect(units).square()


def snip(units: Units) -> Tensor:
    """Sensitivity to a gate on the unit, for each example abs(sum_t sum_d g a): fp64 [U].

    Effects of opposite sign cancel over the tokens; the score of one token is that of plainact.
    Source: Lee 2018 (arXiv 1810.02340).
    """
    return _counted(units, _effect(units)).abs().sum(dim=0).double()


def grasp(units: Units) -> Tensor:
    """What a gate on the unit does to the gradient's norm: -(gate . (H gate gradient)), signed.

    Gates are 1 and shared by an example's positions that count; H is over the gates of all units,
    so the score of an example is the sum of its tokens' scores.
    Source: Wang 2020 (arXiv 2002.07376), signed as in Abdelfattah 2021.
    """
    if units.curvature is None:
        raise ValueError("the collector was not told that grasp needs the curvature")
    return -units.curvature


def nwot(units: Units) -> Tensor:
    """Of the binary code A of the unit's values: log(1 + sum_d (1 - A_d)^2).

    A is 1 where a value is above 0: after a ReLU, and by sign for SiLU, gated products and heads.
    The 1 keeps the logarithm finite. So a neuron scores log 2 where it is not active: as the paper
    writes it, the criterion keeps what is off (its formula counts what differs from all ones).
    Source: Mellor 2021 (arXiv 2006.04647), as ShadowLLM adapts it.
    """
    return (units.a <= 0).float().sum(dim=-1).log1p()


def jacov(units: Units) -> Tensor:
    """Products of gradient rows at N regular positions of each example: fp32 [U, N + 1, N + 1].

    Row N is all ones, so that it holds the sums of the others. A shorter example repeats positions.
    """
    last = units.counts.sum(dim=1)  # positions 1 .. last count
    steps = torch.arange(_ROWS, device=last.device)
    places = 1 + steps * (last[:, None] - 1).clamp(min=0) // (_ROWS - 1)
    rows = units.g[torch.arange(len(last), device=last.device)[:, None], places]  # [B, N, U, D]
    rows = rows * (last > 0)[:, None, None, None]
    rows = torch.cat((rows, torch.ones_like(rows[:, :1])), dim=1)
    return torch.einsum("bnud,bmud->unm", rows, rows)


def jacov_score(total: Tensor) -> Tensor:
    """Spectrum of the correlations between those rows: -sum_i(log(v_i + k) + 1 / (v_i + k)).

    v are the eigenvalues of the N x N correlation matrix over examples and d, k is 1e-5: highest
    where gradients of different positions are unrelated. Neurons (D = 1) need more examples than N,
    or all of them have a v of 0. Source: Mellor 2021, Lopes 2021.
    """
    total = total.double()
    count, sums = total[:, -1, -1, None, None], total[:, :-1, -1]
    covariance = total[:, :-1, :-1] / count - sums[:, :, None] * sums[:, None] / count.square()
    deviation = covariance.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    known = deviation[:, :, None] * deviation[:, None]
    correlation = torch.where(known > 0, covariance / known, 0.0)
    values: Tensor = torch.linalg.eigvalsh(correlation).clamp(min=0) + 1e-5
    return -(values.log() + 1 / values).sum(dim=1)


def epenas(units: Units) -> Tensor:
    """Sums of gradient rows of length one, by class of the next token: fp32 [U, K, D + 1].

    The last value counts the rows. The class is the token's id modulo K: unrelated tokens that
    share one pull intra towards inter, of all units alike.
    """
    g = units.g[units.counts]  # [N, U, D]
    length = g.norm(dim=-1, keepdim=True)
    rows = torch.cat((g / length.clamp(min=1e-30), (length > 0).float()), dim=-1)
    classes = nn.functional.one_hot(units.following[units.counts] % _CLASSES, _CLASSES).float()
    sums: Tensor = (classes.T @ rows.flatten(1)).unflatten(1, rows.shape[1:])
    return sums.transpose(0, 1)


def epenas_score(total: Tensor) -> Tensor:
    """Mean correlation of gradient rows of the same class, less that of different classes.

    The correlation of two rows is their cosine (for a neuron the product of their signs).
    Source: EPE-NAS, Lopes 2021 (arXiv 2102.08099), classes = next tokens.
    """
    sums, counts = total[..., :-1].double(), total[..., -1].double()
    rows = counts.sum(dim=1)
    within = sums.square().sum(dim=(1, 2)) - rows
    between = sums.sum(dim=1).square().sum(dim=1) - rows - within
    pairs = (counts * (counts - 1)).sum(dim=1)
    others = rows * (rows - 1) - pairs
    return within / pairs.clamp(min=1) - between / others.clamp(min=1)


def random(units: Units) -> Tensor:
    """Uniform in [0, 1), seeded: the control that every other criterion must beat."""
    generator = torch.Generator().manual_seed(units.seed)
    return torch.rand(units.a.shape[:-1], generator=generator).to(units.a.device)


def _effect(units: Units) -> Tensor:
    """What removing the unit does to the loss, to first order and negated: sum_d g a."""
    return over_values(units.g * units.a)


def over_values(values: Tensor) -> Tensor:
    """Sum over a unit's own values: [..., U, D] -> [..., U]."""
    return values.squeeze(-1) if values.shape[-1] == 1 else values.sum(dim=-1)


def _counted(units: Units, values: Tensor) -> Tensor:
    """Sum of [B, T, U] over each example's positions that count: [B, U]."""
    return torch.einsum("bt,btu->bu", units.counts.float(), values)


def _norm(values: Tensor) -> Tensor:
    return values.abs().squeeze(-1) if values.shape[-1] == 1 else values.norm(dim=-1)


CRITERIA = {
    criterion.name: criterion
    for criterion in (
        Criterion(
            "plainact",
            "sum_t abs( sum_d g*a )",
            "first-order effect of removing the unit (Molchanov 2016, Michel 2019)",
            plainact,
            balance=0.25,
        ),
        Criterion(
            "plainact-weights",
            "sum_e abs( dW*W ), rows of the first FFN matrix (heads: plainact)",
            "the published code's variant for neurons (Akhauri 2024)",
            None,
            balance=0.25,
            total=plainact_weights,
            needs=("first",),
        ),
        Criterion(
            "sens",
            "sum_t sqrt( sum_d a^2 ) * sqrt( E[sum_d g^2] )",
            "magnitude with a stable gradient, the expectation over calibration",
            l2norm,
            factor=gradient_rms,
            balance=0.5,
        ),
        Criterion(
            "contrib",
            "sum_t norm( W_out,u a_u )",
            "what the unit adds to the residual stream (WINA, Chen 2025)",
            contrib,
            balance=0.75,
        ),
        Criterion(
            "l2norm",
            "sum_t sqrt( sum_d a^2 )",
            "magnitude, what DejaVu learns (Liu 2023)",
            l2norm,
            balance=0.75,
        ),
        Criterion(
            "gradnorm",
            "sum_t sqrt( sum_d g^2 )",
            "magnitude of the gradient (Abdelfattah 2021)",
            gradnorm,
        ),
        Criterion(
            "fisher",
            "mean_t ( sum_d g*a )^2",
            "Fisher information of a gate on the unit (Theis 2018, Turner 2019)",
            fisher,
        ),
        Criterion(
            "snip",
            "abs( sum_t sum_d g*a )",
            "sensitivity to a gate on the unit (Lee 2018)",
            plainact,
            balance=0.5,
            total=snip,
        ),
        Criterion(
            "grasp",
            "-( gate . (Hessian * gate gradient) ), signed",
            "effect of a gate on the gradient's norm (Wang 2020)",
            grasp,
            needs=("curvature",),
            signed=True,
        ),
        Criterion(
            "nwot",
            "sum_t log( 1 + sum_d (1 - A)^2 ), A = (a > 0)",
            "binary codes (Mellor 2021), as the paper adapts them",
            nwot,
        ),
        Criterion(
            "jacov",
            "-sum_i( log(v_i + k) + 1 / (v_i + k) ), v: correlation spectrum of g's rows",
            "unrelated gradients (Mellor 2021, Lopes 2021)",
            None,
            total=jacov,
            finish=jacov_score,
        ),
        Criterion(
            "epenas",
            "mean correlation of g's rows within, less between, classes of next tokens",
            "EPE-NAS (Lopes 2021)",
            None,
            total=epenas,
            finish=epenas_score,
        ),
        Criterion("random", "uniform in [0, 1), seeded", "control", random),
    )
}


def find_criterion(name: str, *, predictor: str = "static") -> Criterion:
    """The criterion of that name, if `predictor` can be fitted to it.

    Raises:
        OptionError: It is unknown, or has no per-token scores and the predictor needs them.
    """
    if name not in CRITERIA:
        raise OptionError(
            f"unknown criterion {name!r}", expected=", ".join(CRITERIA), fix="shadowc criteria"
        )
    criterion = CRITERIA[name]
    if predictor != "static" and not criterion.per_token:
        raise OptionError(
            f"{name} scores units over all data, not token by token: no predictor can learn it",
            expected="--predictor static",
            got=f"--predictor {predictor}",
        )
    return criterion
