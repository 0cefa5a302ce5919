"""The calibration itself: collect, score, fit, measure on held-out examples.

One pass of forward and backward over the training examples serves every criterion: they only add to
sums (`ridge.py`), or keep some tokens' scores (`trained.py`). After every few batches the sums can
be written, so that an interrupted pass goes on where it was (`checkpoint.py`).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shadowc.calibration.checkpoint import Checkpoint
from shadowc.calibration.collect import Collector
from shadowc.calibration.criteria import Criterion, find_criterion
from shadowc.calibration.data import Example
from shadowc.calibration.measure import Fit
from shadowc.calibration.predictor import Predictor
from shadowc.calibration.ridge import FeatureMap, FeatureSums, ScoreSums, Tables, regress
from shadowc.calibration.store import Calibration
from shadowc.calibration.trained import Samples, train
from shadowc.config import DEFAULT_PREDICTOR, FEATURES, FITS, PREDICTORS
from shadowc.errors import DataError, OptionError
from shadowc.models import LoadedModel
from shadowc.versions import versions

#: Called with each batch's examples and loss; no loss if it was done before.
Advance = Callable[[Sequence[Example], float | None], None]

#: Rank and random features of each kind of predictor. A layer's own input needs less of both: with
#: 75% of opt-books-15m's neurons skipped by sens, perplexity is 27.1 for 2.1 MB a token at (64, 0),
#: 26.6 for 8.7 MB at (128, 512), and 30.0 for the 3.8 MB of one tap.
SIZES = {"shadow": (128, 512), "layerwise": (64, 0), "fullseq": (128, 512), "static": (128, 512)}
EXAMPLES = 32
SEQ_LEN = 256
_HELD_OUT_EVERY = 8
_MEASURED_TOKENS = 128  # rank correlation over all units costs milliseconds a token


@dataclass(frozen=True)
class FitOptions:
    """How to calibrate.

    Attributes:
        criteria: Names of the criteria; all are fitted from one pass.
        predictor: `shadow` (after the attention of layer 0), `layerwise` (a tap at every layer),
            `fullseq` (as `shadow`, but it reads the mean of the feature over all tokens so far) or
            `static`. Empty: `shadow` where another option asks for it, or else the usual one.
        feature: `residual`, `normed`, `entry` or `context`; None: `entry` for `layerwise`, which
            costs a GPU the least time, and `residual` for `shadow`, which knows no more of a token.
        rank: R of the predictor, what a token pays for; None: as `SIZES` says.
        random_features: M of the predictor; None: as `SIZES` says.
        ridge: Strength of the regularisation, in units of P / tokens.
        batch_tokens: Tokens of a forward and backward, about.
        seed: Of the random features and of criteria that draw.
        every: A tap of `shadow` at every so-manieth layer; None: at layer 0 alone.
        refresh: Tokens that a mask will serve, as in `Policy`: a predictor learns their mean score.
        fit: `ridge` (the closed form) or `paper` (the paper's recipe: two layers, trained).
    """

    criteria: tuple[str, ...] = ("plainact",)
    predictor: str = ""
    feature: str | None = None
    rank: int | None = None
    random_features: int | None = None
    ridge: float = 2.0
    batch_tokens: int = 1024
    seed: int = 0
    every: int | None = None
    refresh: int = 1
    fit: str = "ridge"

    def __post_init__(self) -> None:
        """Refuse what cannot be fitted."""
        if not self.predictor:
            one = self.every is not None or self.fit == "paper" or self.feature == "context"
            object.__setattr__(self, "predictor", "shadow" if one else DEFAULT_PREDICTOR)
        for name, value, known in (
            ("predictor", self.predictor, PREDICTORS),
            ("feature", self.reads, FEATURES),
            ("fit", self.fit, FITS),
        ):
            if value not in known:
                raise OptionError(f"unknown {name} {value!r}", expected=", ".join(known))
        if self.every is not None and self.predictor != "shadow":
            raise OptionError(
                "only shadow's taps can be placed",
                expected="--taps with --predictor shadow",
                got=f"--predictor {self.predictor}",
            )
        if self.fit == "paper" and (self.every or self.predictor not in ("shadow", "fullseq")):
            raise OptionError(
                "the paper's recipe is one predictor after layer 0",
                expected="--fit paper with --predictor shadow and no --taps",
                got=f"--predictor {self.predictor}",
            )
        if self.fit == "paper" and self.rank is not None:
            raise OptionError(
                "the paper's recipe has sizes of its own", expected="--fit paper without --rank"
            )
        if self.refresh < 0:
            raise OptionError("refresh is out of range", expected="at least 0", got=self.refresh)
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
    checkpoint: Path | None = None,
    fresh: bool = False,
) -> list[Calibration]:
    """Calibrate a model with one or more criteria.

    Every eighth example (the last, if there are fewer) is held out of the fit and measured on.

    Args:
        loaded: The model.
        examples: Token sequences, at least two.
        options: What to fit.
        data: Name of the data, to be recorded.
        progress: Show a progress bar on stderr.
        checkpoint: File that keeps the state of the pass, so that the same call goes on after an
            interrupt, with the very same result; the caller removes it once that is stored.
        fresh: Start over, whatever `checkpoint` holds.

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
        CalibrationError: If `checkpoint` belongs to another calibration, or cannot be written.
    """
    start = time.monotonic()
    training, held_out = _split(examples)
    criteria = [find_criterion(name, predictor=options.predictor) for name in options.criteria]
    taps = options.taps(loaded.shape.layers)
    needs = {need for criterion in criteria for need in criterion.needs}
    pooled = options.predictor == "fullseq"
    collector = Collector(loaded.model, loaded.shape, options.reads, taps, needs, pooled=pooled)
    saved = None
    if checkpoint is not None:
        saved = Checkpoint(checkpoint, _about(loaded, examples, options, data), fresh=fresh)
    total = sum(len(example.ids) for example in examples)
    with _progress(total, progress) as advance:
        features, fits = _pass(collector, training, options, criteria, saved, advance)
        every = max(1, sum(len(example.ids) for example in held_out) // _MEASURED_TOKENS)
        for group in _batches(held_out, options.batch_tokens):
            batch = collector.run(group)
            for fit in fits:
                fit.measure(batch, every)
            advance(group, batch.loss)
    seconds = time.monotonic() - start
    closed = bool(taps) and options.fit == "ridge"
    return [
        Calibration(
            model=asdict(loaded.source),
            shape=loaded.shape,
            criterion=fit.criterion.name,
            predictor=options.predictor,
            feature=options.reads,
            taps=taps,
            fit=options.fit,
            refresh=options.refresh,
            rank=len(fit.predictors[0].get_buffer("mixer_weight")) if closed else 0,
            random_features=fit.predictors[0].get_buffer("mixer_weight").shape[1] if closed else 0,
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


def _pass(
    collector: Collector,
    training: Sequence[Example],
    options: FitOptions,
    criteria: Sequence[Criterion],
    saved: Checkpoint | None,
    advance: Advance,
) -> tuple[FeatureSums, list[Fit]]:
    """The pass over the training examples and the fits that it ends in."""
    shape, device = collector.shape, collector.model.device
    seed, refresh, closed = options.seed, options.refresh, options.fit == "ridge"
    done = saved.done if saved else 0
    maps = [] if done or not closed else _feature_maps(collector, training, options)
    features = FeatureSums(shape, options.taps(shape.layers) if closed else (), maps)
    scores = [ScoreSums(criterion, seed, refresh) for criterion in criteria]
    tokens = sum(len(example.ids) for example in training)
    samples = [Samples(one, tokens, seed, refresh) for one in criteria if not closed]
    parts: dict[str, Tables] = {"features": features}
    parts |= {f"scores {part.criterion.name}": part for part in scores}
    parts |= {f"samples {part.criterion.name}": part for part in samples}
    if saved and done:
        for name, part in parts.items():
            start = f"{name}/"
            own = {
                k.removeprefix(start): v for k, v in saved.tensors.items() if k.startswith(start)
            }
            part.load_state(own, torch.device("cpu") if isinstance(part, Samples) else device)
        saved.tensors.clear()
    for number, group in enumerate(_batches(training, options.batch_tokens), start=1):
        if number <= done:
            advance(group, None)
            continue
        batch = collector.run(group)
        phi = features.add(batch)
        for one in scores:
            one.add(batch, phi, features.tap_of)
        for kept in samples:
            kept.add(batch)
        advance(group, batch.loss)
        if saved and saved.due(number):
            tensors = {f"{n}/{k}": v for n, part in parts.items() for k, v in part.state().items()}
            saved.save(number, tensors)
    fits = []
    for index, one in enumerate(scores):
        factors, means = one.ranking_units(features)
        if closed:
            predictors: list[Predictor] = [
                regress(features, one, factors, tap, rank=options.size[0], ridge=options.ridge)
                for tap in range(len(features.taps))
            ]
        else:
            predictors = [train(samples[index], factors, shape, seed).to(device)]
        fits.append(Fit(one.criterion, factors, means, predictors, one.generator, refresh))
    return features, fits


def _feature_maps(
    collector: Collector, training: Sequence[Example], options: FitOptions
) -> list[FeatureMap]:
    """Each tap's first stage: feature statistics and seeded random features."""
    if not collector.taps:
        return []
    zero = torch.zeros((), dtype=torch.float64)
    sums, squares = [zero] * len(collector.taps), [zero] * len(collector.taps)
    tokens = 0
    for group in _batches(training, options.batch_tokens):
        features, counts = collector.features(group)
        tokens += int(counts.sum())
        for tap, feature in enumerate(features):
            rows = feature[counts].double()
            sums[tap] = sums[tap] + rows.sum(dim=0)
            squares[tap] = squares[tap] + rows.square().sum(dim=0)
    generator = torch.Generator().manual_seed(options.seed)
    maps, random = [], options.size[1]
    for tap in range(len(collector.taps)):
        mean = sums[tap] / tokens
        scale = (squares[tap] / tokens - mean.square()).clamp(min=1e-12).rsqrt()
        weight = torch.randn(random, len(mean), generator=generator) * len(mean) ** -0.5
        bias = torch.randn(random, generator=generator)
        device = mean.device
        maps.append(FeatureMap(mean.float(), scale.float(), weight.to(device), bias.to(device)))
    return maps


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
def _progress(tokens: int, visible: bool) -> Iterator[Advance]:
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

        def advance(group: Sequence[Example], loss: float | None) -> None:
            bar.advance(task, sum(len(example.ids) for example in group))
            if loss is not None:
                losses.append(loss)
                speed = bar.tasks[0].speed or 0.0
                bar.update(task, rate=speed, loss=sum(losses) / len(losses))

        yield advance


def _about(
    loaded: LoadedModel, examples: Sequence[Example], options: FitOptions, data: str
) -> dict[str, object]:
    """All that the sums of a pass depend on."""
    text = json.dumps([[one.ids, one.scored] for one in examples])
    return {
        "model": loaded.source.name,
        "weights": loaded.source.fingerprint,
        "dtype": str(loaded.model.dtype),
        "data": data,
        "examples": hashlib.sha256(text.encode()).hexdigest(),
        **asdict(options),
        "versions": versions(),
    }
