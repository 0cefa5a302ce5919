"""The calibration itself: collect, score, fit, measure on held-out examples.

One pass of forward and backward over the training examples serves every criterion: they only add to
sums (`ridge.py`), or keep some tokens' scores (`trained.py`); a second over the held-out examples
adds to sums again (`measure.py`). Sums add up, so several processes can share a pass (`ranks.py`),
and they can be written every few batches, so that an interrupted pass goes on where it was
(`checkpoint.py`).
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from shadowc.calibration.batches import Group, Plan, counting, groups, plan, split
from shadowc.calibration.checkpoint import Checkpoint, temporary
from shadowc.calibration.collect import Collector, check_weights
from shadowc.calibration.criteria import find_criterion
from shadowc.calibration.data import Example
from shadowc.calibration.measure import Fit, Measurement
from shadowc.calibration.predictor import Predictor
from shadowc.calibration.progress import Progress
from shadowc.calibration.ranks import Ranks
from shadowc.calibration.ridge import (
    FeatureMap,
    FeatureMoments,
    FeatureSums,
    ScoreSums,
    Tables,
    regress,
)
from shadowc.calibration.store import Calibration
from shadowc.calibration.trained import Samples, train
from shadowc.config import DEFAULT_PREDICTOR, FEATURES, FITS, PREDICTORS
from shadowc.errors import CalibrationError, OptionError, out_of_memory
from shadowc.models import LoadedModel
from shadowc.versions import versions

#: Rank and random features of each kind of predictor. A layer's own input needs less of both: with
#: 75% of opt-books-15m's neurons skipped by sens, perplexity is 27.1 for 2.1 MB a token at (64, 0),
#: 26.6 for 8.7 MB at (128, 512), and 30.0 for the 3.8 MB of one tap.
SIZES = {"shadow": (128, 512), "layerwise": (64, 0), "fullseq": (128, 512), "static": (128, 512)}
EXAMPLES = 32
SEQ_LEN = 256
#: The most directions of a feature that are regressed on, C' of `FeatureMap`.
DIRECTIONS = 1024
_MAPPED_EXAMPLES = 64  # what maps are made of: first and second moments need no more
_RANKED_TOKENS = 128  # rank correlation over all units costs milliseconds a token
_SPREAD_TOKENS = 16384  # quantiles and damage sort a layer's units


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
        batch_tokens: Tokens of a forward and backward, about; None: as many as memory allows.
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
    batch_tokens: int | None = None
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


@dataclass(frozen=True)
class _Work:
    """All that a pass needs."""

    loaded: LoadedModel
    options: FitOptions
    training: list[Example]
    held_out: list[Example]
    about: dict[str, object]
    checkpoint: Path | None
    ranks: Ranks
    progress: Progress

    @property
    def closed(self) -> bool:
        """Whether predictors are fitted in closed form."""
        return self.options.fit == "ridge"

    @property
    def taps(self) -> tuple[int, ...]:
        """The layers that predictors read in."""
        return self.options.taps(self.loaded.shape.layers)


def calibrate(
    loaded: LoadedModel,
    examples: Sequence[Example],
    options: FitOptions,
    *,
    data: str = "pydoc",
    progress: Progress | None = None,
    checkpoint: Path | None = None,
    fresh: bool = False,
    ranks: Ranks | None = None,
) -> list[Calibration]:
    """Calibrate a model with one or more criteria.

    Every eighth example (the last, if there are fewer) is held out of the fit and measured on.

    Args:
        loaded: The model.
        examples: Token sequences, at least two.
        options: What to fit.
        data: Name of the data, to be recorded.
        progress: Is told how far it is.
        checkpoint: File that keeps the state of the pass, so that the same call goes on after an
            interrupt, with the very same result; to be removed (`forget`) once that is stored.
        fresh: Start over, whatever `checkpoint` holds.
        ranks: The processes that share the work; all of them get the result. It is that of one
            process but for the order in which floating-point numbers are added.

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
        CalibrationError: If `checkpoint` belongs to another calibration or cannot be written, if
            memory does not suffice for one example, or if numbers are not finite.
    """
    start = time.monotonic()
    check_weights(loaded.model)
    training, held_out = split(examples)
    work = _Work(
        loaded, options, training, held_out, _about(loaded, examples, options, data),
        checkpoint, ranks or Ranks(), progress or Progress(),
    )  # fmt: skip
    if fresh and checkpoint is not None and not work.ranks.rank:
        forget(checkpoint)
    shape, device = loaded.shape, loaded.model.device
    # One plan for all processes: batches are dealt out by their numbers.
    chosen: Plan | None = work.ranks.said(
        plan(shape, loaded.model.dtype, device, _bytes_of_sums(work), options.batch_tokens)
    )
    longest = max(len(example.ids) for example in examples)
    while chosen is not None:
        try:
            features, fits = _passes(work, chosen)
            break
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            tried, chosen = chosen, chosen.smaller(longest)
            if work.ranks.size > 1 or chosen is None:
                raise CalibrationError(
                    "not enough memory",
                    got=f"batches of {tried.tokens} tokens, {tried.keep} layers' graphs kept",
                    fix="a smaller --batch-tokens or --seq-len, --dtype bf16, or more memory; what "
                    "was done so far is kept",
                ) from error
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    seconds = time.monotonic() - start
    return [_calibration(work, features, fit, data, longest, seconds) for fit in fits]


def unfinished(checkpoint: Path) -> tuple[Path, Path]:
    """The files of an unfinished calibration: of the training pass and of the held-out one."""
    return checkpoint, checkpoint.with_name(f"{checkpoint.name}.measured")


def forget(checkpoint: Path) -> None:
    """Remove the state of a calibration, and what a kill left of it."""
    for path in unfinished(checkpoint):
        for one in (path, temporary(path)):
            one.unlink(missing_ok=True)


class _Stage:
    """One pass over some examples, whose sums are written every few batches.

    Args:
        work: What is to be done.
        collector: Reads the model.
        examples: The examples, in the order in which they are dealt out.
        parts: What is added to, by name.
        path: File of its state, if it is to be kept.
    """

    def __init__(
        self,
        work: _Work,
        collector: Collector,
        examples: Sequence[Example],
        parts: Mapping[str, Tables],
        path: Path | None,
    ) -> None:
        """Go on from the state that is there."""
        self.work, self.examples, self.parts = work, examples, parts
        self.saves, self.checkpoint = path is not None, None
        if path is not None and not work.ranks.rank:
            self.checkpoint = Checkpoint(path, work.about)
            for name, part in parts.items():
                samples = isinstance(part, Samples)
                device = (lambda _: torch.device("cpu")) if samples else collector.device
                part.load_state(self.checkpoint.state(name, device))
            self.checkpoint.tensors.clear()
        self.done = work.ranks.said(self.checkpoint.done if self.checkpoint else 0)

    def run(self, tokens: int, take: Callable[[Group], float]) -> None:
        """Give every process its batches of about so many tokens."""
        ranks, progress = self.work.ranks, self.work.progress
        progress.skip(self.done)
        parts = list(self.parts.values())
        batches = list(groups(self.examples, tokens, self.done))
        try:
            for start in range(0, len(batches), ranks.size):
                together = batches[start : start + ranks.size]
                loss = take(together[ranks.rank]) if ranks.rank < len(together) else None
                self.done = together[-1].first + len(together[-1].examples)
                progress.advance(sum(len(group.examples) for group in together), loss)
                if self.saves and ranks.said(self._due()):
                    ranks.add_up(parts, to_first=True)
                    if self.checkpoint:
                        states = {name: part.state() for name, part in self.parts.items()}
                        self.checkpoint.save(self.done, states)
        finally:
            if self.checkpoint:
                self.checkpoint.written()
        ranks.add_up(parts)

    @property
    def complete(self) -> bool:
        """Whether the state after all of it is on disk."""
        return self.checkpoint is not None and self.checkpoint.done == len(self.examples)

    def _due(self) -> bool:
        if not self.checkpoint:
            return False
        size = sum(one.nbytes for part in self.parts.values() for one in part.state().values())
        return self.checkpoint.due(size, last=self.done == len(self.examples))


def _passes(work: _Work, chosen: Plan) -> tuple[FeatureSums, list[Fit]]:
    """The pass over the training examples, and the one over those that are held out."""
    options, ranks, progress = work.options, work.ranks, work.progress
    model, shape = work.loaded.model, work.loaded.shape
    criteria = [find_criterion(name, predictor=options.predictor) for name in options.criteria]
    needs = {need for criterion in criteria for need in criterion.needs}
    pooled = options.predictor == "fullseq"
    collector = Collector(
        model, shape, options.reads, work.taps, needs, pooled=pooled, keep=chosen.keep
    )
    progress.begin(len(work.training) + len(work.held_out))
    files = unfinished(work.checkpoint) if work.checkpoint else (None, None)

    features = FeatureSums(shape, work.taps if work.closed else ())
    scores = [ScoreSums(criterion, options.refresh) for criterion in criteria]
    positions = sum(counting(example) for example in work.training)
    samples = [Samples(one, positions, options.refresh) for one in criteria if not work.closed]
    parts: dict[str, Tables] = {"features": features}
    parts |= {f"scores {part.criterion.name}": part for part in scores}
    parts |= {f"samples {part.criterion.name}": part for part in samples}
    training = _Stage(work, collector, work.training, parts, files[0])
    if features.taps:
        if not training.done and not ranks.rank:
            features.maps = _feature_maps(collector, work.training, chosen.tokens, options)
        ranks.share(features)

    def add(group: Group) -> float:
        batch = collector.run(group.examples, hash((options.seed, group.first, 0)))
        features.count(batch)
        tap, phi = None, None
        for units in batch:
            wanted = features.tap_of.get(units.site)
            if wanted is not None and wanted != tap:
                tap, phi = wanted, features.add_feature(batch, wanted)
            features.add(units)
            for one in scores:
                one.add(units, None if wanted is None else phi)
            for kept in samples:
                kept.add(batch, units, group.start)
        return batch.loss

    training.run(chosen.tokens, add)

    fits = []
    for index, one in enumerate(scores):
        factors, means = one.ranking_units(features)
        if work.closed:
            predictors: list[Predictor] = [
                regress(features, one, factors, tap, rank=options.size[0], ridge=options.ridge)
                for tap in range(len(features.taps))
            ]
        else:
            predictors = [train(samples[index], factors, shape, options.seed).to(model.device)]
        fits.append(Fit(one.criterion, factors, means, predictors, options.refresh))

    positions = sum(counting(example) for example in work.held_out)
    spread, ranked = (max(1, positions // most) for most in (_SPREAD_TOKENS, _RANKED_TOKENS))

    def measure(group: Group) -> float:
        batch = collector.run(group.examples, hash((options.seed, group.first, 1)))
        places = [_every(batch.counts, step) for step in (spread, ranked)]
        measurements = [Measurement(fit, batch, *places) for fit in fits]
        for units in batch:
            for one in measurements:
                one.add(units)
        for one in measurements:
            one.finish()
        progress.recall = fits[0].recall()
        return batch.loss

    measured: dict[str, Tables] = {f"fit {fit.criterion.name}": fit for fit in fits}
    # It goes on from what the whole of the training pass fitted, or not at all.
    whole = ranks.said(training.complete)
    held_out = _Stage(work, collector, work.held_out, measured, files[1] if whole else None)
    held_out.run(chosen.tokens, measure)
    return features, fits


def _calibration(
    work: _Work, features: FeatureSums, fit: Fit, data: str, longest: int, seconds: float
) -> Calibration:
    """What is stored of a fit."""
    options, shape = work.options, work.loaded.shape
    closed = bool(work.taps) and work.closed
    size = fit.predictors[0].get_buffer("mixer_weight").shape if closed else (0, 0)
    return Calibration(
        model=asdict(work.loaded.source),
        shape=shape,
        criterion=fit.criterion.name,
        predictor=options.predictor,
        feature=options.reads,
        taps=work.taps,
        fit=options.fit,
        refresh=options.refresh,
        rank=size[0],
        random_features=size[1],
        data=data,
        examples=len(work.training) + len(work.held_out),
        tokens=features.tokens,
        seq_len=longest,
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


def _feature_maps(
    collector: Collector, training: Sequence[Example], tokens: int, options: FitOptions
) -> list[FeatureMap]:
    """Each tap's first stage, of the first examples: moments and seeded random features."""
    generator = torch.Generator().manual_seed(options.seed)
    moments: list[FeatureMoments] = []
    for group in groups(training[:_MAPPED_EXAMPLES], tokens):
        features, counts = collector.features(group.examples)
        for tap, feature in enumerate(features):
            if tap == len(moments):
                moments.append(FeatureMoments(feature.shape[-1], DIRECTIONS, generator))
            moments[tap].add(feature[counts.to(feature.device)])
    return [one.map(options.size[1]) for one in moments]


def _every(counts: Tensor, step: int) -> Tensor:
    """Every so-manieth position that counts: bool [B, T]."""
    chosen = torch.zeros_like(counts)
    chosen.view(-1)[counts.flatten().nonzero()[::step]] = True
    return chosen


def _bytes_of_sums(work: _Work) -> int:
    """What the sums of a pass take."""
    shape, options = work.loaded.shape, work.options
    units = shape.layers * (shape.heads + shape.ffn)
    width = min(DIRECTIONS, shape.hidden) + options.size[1]
    if not work.taps:
        return 32 * units * len(options.criteria)
    return 4 * units * width * len(options.criteria) + 24 * width**2 * len(work.taps)


def _about(
    loaded: LoadedModel, examples: Sequence[Example], options: FitOptions, data: str
) -> dict[str, object]:
    """All that the sums of a pass depend on, but for how they are rounded."""
    text = json.dumps([[one.ids, one.scored] for one in examples])
    settings = asdict(options)
    del settings["batch_tokens"]
    return {
        "model": loaded.source.name,
        "weights": loaded.source.fingerprint,
        "dtype": str(loaded.model.dtype),
        "data": data,
        "examples": hashlib.sha256(text.encode()).hexdigest(),
        **settings,
        "versions": versions(),
    }
