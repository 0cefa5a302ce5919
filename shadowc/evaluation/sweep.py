"""Quality over sparsity, before anything is compiled: many budgets and ways to choose, one text.

    shadow     one predictor after layer 0, or several taps if the calibration has them
    layerwise  a predictor in every layer, by thresholds
    fullseq    one predictor of the mean of the feature over all tokens so far
    static, oracle, random, dense      as in `perplexity.py`

Of shadow, layerwise and fullseq, the calibration is one; the others are fitted here from the same
model, criterion, data and seed.
All run the masked program in fp32 with a new mask for every token, the first of a window dense.
Each batch is one unit of work: what does not depend on the budget is computed once for all of them
(true, drawn and, with one tap, predicted scores), ordered once, and cut off for every budget.
A predictor in several layers reads what its own masks left, so it runs anew for each budget.

What was measured is appended to `state.jsonl`, a line for each batch, method and budget, so that an
interrupted sweep goes on where it stopped and ends with the very same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from shadowc.budget import predictor_elements
from shadowc.calibration.collect import Collector
from shadowc.calibration.data import Example, calibration_examples, evaluation_windows
from shadowc.calibration.fit import FitOptions, calibrate
from shadowc.calibration.measure import centred_ranks
from shadowc.calibration.predictor import Predictor
from shadowc.calibration.progress import showing
from shadowc.calibration.store import JSON_FILE, Calibration, load_calibration, save_calibration
from shadowc.compiler import check_same_model
from shadowc.config import ModelShape, Policy
from shadowc.directory import check_fingerprint, replace_text, sha256
from shadowc.errors import OptionError
from shadowc.evaluation.masks import mask_source, with_given_masks
from shadowc.evaluation.oracle import true_scores, unit_factors
from shadowc.evaluation.perplexity import Scores, batches
from shadowc.models import LoadedModel
from shadowc.native import keep_mask
from shadowc.passes.canonicalize import canonicalize
from shadowc.passes.find_blocks import blocks_of, find_blocks
from shadowc.passes.insert_predictor import StaticScores, export_masks, insert_predictor
from shadowc.passes.manager import copy_module, run_passes
from shadowc.passes.mask_attention import mask_attention
from shadowc.passes.mask_mlp import mask_mlp
from shadowc.passes.prepack_linear import prepack_linear
from shadowc.runtime.program import Program, to_program
from shadowc.selection import default_selection, selections
from shadowc.trace import trace
from shadowc.versions import versions

FITTED = ("shadow", "layerwise", "fullseq")
AGAINST = ("dense", "static", "shadow", "layerwise", "oracle", "random")
_KNOWN = (*AGAINST, "fullseq")
SPARSITIES = tuple(tenths / 10 for tenths in range(1, 10))
STATE, REPORT = "state.jsonl", "report.json"

_BATCH_LOGITS = 1 << 22
_FACTOR_WINDOWS = 64  # a mean square over 16,000 tokens is known well enough
_COMPARED_TOKENS = 2048  # rank correlation costs milliseconds a token

#: Called after each piece of work with the pieces done and all pieces.
Progress = Callable[[int, int], None]
#: Bool masks of heads [B, T, L, H] and neurons [B, T, L, F].
Masks = tuple[Tensor, Tensor]
Record = dict[str, Any]


@dataclass(frozen=True)
class Options:
    """What a sweep measures.

    Attributes:
        against: Names out of `AGAINST`, or `fullseq`, beside the calibration's own predictor.
        sparsities: Of heads and of neurons, ascending; each as far as the model can go.
        neurons_only: Skip no heads.
        data: Text to score.
        tokens: About how many tokens of it.
        seq_len: Tokens of a window.
        seed: Of random masks.
    """

    against: tuple[str, ...] = AGAINST
    sparsities: tuple[float, ...] = SPARSITIES
    neurons_only: bool = False
    data: str = "pydoc"
    tokens: int = 8192
    seq_len: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be measured."""
        for name in self.against:
            if name not in _KNOWN:
                raise OptionError(
                    f"nothing to compare with is called {name!r}", expected=", ".join(_KNOWN)
                )
        found = self.sparsities
        in_range = all(0 <= s < 1 for s in found)
        if not found or not in_range or list(found) != sorted({*found}):
            raise OptionError(
                "the sparsities are out of range",
                expected="ascending numbers in [0, 1), such as 0.1,0.5,0.9",
                got=", ".join(map(str, found)) or "none",
            )

    def methods(self, calibration: Calibration) -> tuple[str, ...]:
        """What is measured: the calibration's own predictor first."""
        return tuple(dict.fromkeys((calibration.predictor, *self.against)))

    def policy(self, shape: ModelShape, sparsity: float, selection: str = "topk") -> Policy:
        """A budget: the sparsity, or the most that the model can give."""
        none = Policy(0.0, 0.0)
        heads = 1 - (shape.heads + none.min_heads * (shape.layers - 1)) / (
            shape.heads * shape.layers
        )
        return Policy(
            0.0 if self.neurons_only else min(sparsity, heads),
            min(sparsity, 1 - none.min_neurons / shape.ffn),
            selection=selection,
        )


class State:
    """Records by name in a file of JSON lines, the first of which says what they are of.

    Args:
        path: The file; made if it is not there.
        fingerprint: What the records depend on.
        fresh: Forget what is there.

    Raises:
        OptionError: If what is there depends on something else, or is no such file.
    """

    def __init__(self, path: Path, fingerprint: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Read what is there; a last line that was cut off by an interrupt is dropped."""
        self.records: dict[str, Record] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        if fresh or not path.exists():
            replace_text(path, json.dumps(fingerprint) + "\n")
        else:
            text = path.read_text()
            whole = text[: text.rfind("\n") + 1]
            try:
                first, *lines = [json.loads(line) for line in whole.splitlines()]
                self.records = {line["name"]: line["record"] for line in lines}
                check_fingerprint(first, fingerprint, path, error=OptionError)
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                raise OptionError(
                    f"{path} is damaged", got=error, fix="--fresh to start over"
                ) from error
            if whole != text:
                replace_text(path, whole)
        self._file = path.open("a")

    def get(self, name: str, measure: Callable[[], Record]) -> Record:
        """A record, measured and written if it is not there."""
        if name not in self.records:
            record = json.loads(line := json.dumps(measure()))
            self._file.write(f'{{"name": {json.dumps(name)}, "record": {line}}}\n')
            self._file.flush()
            self.records[name] = record
        return self.records[name]

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def sweep(
    loaded: LoadedModel,
    calibration: Calibration,
    calibration_file: Path,
    output: Path,
    options: Options,
    *,
    fresh: bool = False,
    progress: Progress = lambda done, total: None,
) -> dict[str, Any]:
    """Measure every method at every sparsity: what `shadowc eval CALIBRATION` does.

    Args:
        loaded: The calibration's model, in fp32.
        calibration: What chooses the units.
        calibration_file: Its JSON, whose hash stands for it.
        output: Directory of the state, the other calibrations and `report.json`.
        options: What to measure.
        fresh: Start over.
        progress: Told what is done.

    Returns:
        What `report.json` then holds: `methods`, a list of points each, and what was compared.

    Raises:
        OptionError: If `output` holds another sweep, or something else.
        CalibrationError: If the calibration belongs to another model.
    """
    check_same_model(loaded, calibration)
    if (output / REPORT).exists() and not (output / STATE).exists():
        raise OptionError(
            f"{output} holds a report of something else",
            expected="a new directory, or that of a sweep",
            fix="choose another place with --output",
        )
    windows = evaluation_windows(
        loaded, options.data, options.seq_len, options.tokens, calibrated_on=calibration.data
    )
    about: dict[str, Any] = {
        "model": calibration.model["name"],
        "model_fingerprint": calibration.model["fingerprint"],
        "calibration": sha256(calibration_file),
        **{key: list(v) if isinstance(v, tuple) else v for key, v in asdict(options).items()},
        "text": hashlib.sha256(json.dumps(windows).encode()).hexdigest(),
        "versions": versions(),
    }
    state = State(output / STATE, about, fresh=fresh)
    try:
        found = _Sweep(loaded, calibration, output, options, windows, state).run(progress)
    finally:
        state.close()
    facts = {
        "criterion": calibration.criterion,
        "predictor": calibration.predictor,
        "feature": calibration.feature,
        "taps": list(calibration.taps),
        "rank": calibration.rank,
        "calibrated_on": calibration.data,
        "calibration_examples": calibration.examples,
        "calibration_seed": calibration.seed,
    }
    result = {"kind": "sweep", **about, **facts, **found}
    replace_text(output / REPORT, json.dumps(result, indent=2) + "\n")
    return result


@dataclass
class _Sweep:
    """One sweep: what its pieces share."""

    loaded: LoadedModel
    calibration: Calibration
    output: Path
    options: Options
    windows: Sequence[Sequence[int]]
    state: State

    def run(self, progress: Progress) -> dict[str, Any]:
        """All pieces of work, in an order that never changes."""
        options, state, shape = self.options, self.state, self.loaded.shape
        methods = options.methods(self.calibration)
        self.predictors = {self.calibration.predictor: self.calibration}
        self.predictors.pop("static", None)
        for name in FITTED:
            if name in methods and name not in self.predictors:
                self.predictors[name] = self._fitted(name)
        groups = batches(self.windows, shape.vocab, _BATCH_LOGITS)
        pieces = [
            (method, sparsity)
            for method in methods
            for sparsity in ((0.0,) if method == "dense" else options.sparsities)
        ]
        names = [
            f"{batch}/{method}/{sparsity}"
            for batch in range(len(groups))
            for method, sparsity in pieces
        ]
        done = sum(name in state.records for name in names)
        progress(done, len(names))
        self._prepare()
        records: dict[tuple[str, float], list[Record]] = {piece: [] for piece in pieces}
        for batch, ids in enumerate(groups):
            ranked = lru_cache(maxsize=1)(partial(self._rank, ids, batch))  # methods take turns
            for method, sparsity in pieces:
                name = f"{batch}/{method}/{sparsity}"
                new = name not in state.records
                measure = partial(self._measure, ids, method, sparsity, ranked)
                records[method, sparsity].append(state.get(name, measure))
                done += new
                progress(done, len(names))
        points: dict[str, list[Record]] = {method: [] for method in methods}
        for (method, sparsity), parts in records.items():
            points[method].append(self._point(method, sparsity, parts))
        return {
            "scored": points[methods[0]][0]["tokens"],
            "methods": points,
            **state.get("compared", self._compare),
        }

    def _fitted(self, name: str) -> Calibration:
        """Another kind of predictor, fitted as the calibration was, or read back."""
        own, directory = self.calibration, self.output / name

        def fit() -> Record:
            examples = calibration_examples(
                self.loaded, own.data, own.examples, own.seq_len, own.seed
            )
            fitting = FitOptions((own.criterion,), name, seed=own.seed)
            with showing("bar") as progress:
                (fitted,) = calibrate(
                    self.loaded, examples, fitting, data=own.data, progress=progress
                )
            save_calibration(fitted, directory)
            return {"sha256": sha256(directory / JSON_FILE)}

        file = directory / JSON_FILE
        if self.state.get(name, fit)["sha256"] != (sha256(file) if file.exists() else None):
            raise OptionError(
                f"{directory} is not what was fitted for this sweep", fix="--fresh to start over"
            )
        return load_calibration(directory)

    def _prepare(self) -> None:
        """Programs and true scores: made when they are first needed, or not at all."""
        traced = cache(lambda: traced_graph(self.loaded))
        shape = self.loaded.shape

        @cache
        def given() -> Callable[..., tuple[Tensor, ...]]:
            program, tensors = masked_program(traced(), shape, self.calibration.static(), _HALF)
            return with_given_masks(program).bind(tensors)

        @cache
        def layered(method: str) -> tuple[Program, dict[str, Tensor]]:
            policy = replace(_HALF, selection="threshold")
            return masked_program(traced(), shape, self.predictors[method], policy)

        @cache
        def predicting(method: str, sparsity: float) -> Callable[..., tuple[Tensor, ...]]:
            program, tensors = layered(method)
            policy = self.options.policy(shape, sparsity, "threshold")
            own = dict(tensors)
            for tap, *chosen in selections(self.predictors[method], policy):
                for kind, threshold in zip(("head", "neuron"), chosen, strict=True):
                    assert isinstance(threshold, Tensor)
                    own[f"predictor.{tap.layer}.{kind}_threshold"] = threshold
            return program.bind(own)

        @cache
        def oracle() -> Scores:
            stride = max(1, len(self.windows) // _FACTOR_WINDOWS)
            sample = self.windows[::stride]

            def measure() -> Record:
                found = unit_factors(self.loaded, self.calibration.criterion, sample)
                return {f"{kind} {layer}": v.tolist() for (kind, layer), v in found.items()}

            factors = {}
            for site, values in self.state.get("factors", measure).items():
                kind, layer = site.split()
                factors[kind, int(layer)] = torch.tensor(values)
            return true_scores(
                self.loaded, self.calibration.criterion, sample, self.options.seed, factors
            )

        self.given, self.predicting, self.oracle = given, predicting, oracle

    def _one_ranking(self, method: str) -> bool:
        """Whether a predictor scores the whole model before any mask applies."""
        return default_selection(len(self.predictors[method].taps)) == "topk"

    def _rank(self, ids: Tensor, batch: int, method: str) -> tuple[Ranking, Ranking]:
        """Heads of layers 1.. and neurons of a batch, ordered."""
        shape, seed = self.loaded.shape, self.options.seed
        if method == "static":
            own = self.calibration
            heads, neurons = own.mean_head_scores, own.mean_neuron_scores
            return Ranking(heads[None, 1:]), Ranking(neurons[None])
        if method == "random":
            generator = torch.Generator().manual_seed(seed + batch)
            heads, neurons = (
                torch.rand(*ids.shape, shape.layers, units, generator=generator)
                for units in (shape.heads, shape.ffn)
            )
        elif method == "oracle":
            heads, neurons = self.oracle()(ids)
        else:
            heads, neurons = predicted(self.loaded, self.predictors[method], ids)
            return Ranking(heads.flatten(0, 1)), Ranking(neurons.flatten(0, 1))
        return Ranking(heads[:, :, 1:].flatten(0, 1)), Ranking(neurons.flatten(0, 1))

    @torch.inference_mode()
    def _measure(
        self,
        ids: Tensor,
        method: str,
        sparsity: float,
        ranked: Callable[[str], tuple[Ranking, Ranking]],
    ) -> Record:
        """Run a batch with one kind of masks, and count."""
        (batch, tokens), shape = ids.shape, self.loaded.shape
        causal = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
        inputs = [ids, torch.arange(tokens).expand(batch, -1), causal]
        if method in self.predictors and not self._one_ranking(method):
            source = mask_source(tokens, prompt=1, refresh=1).expand(batch, -1)
            results = self.predicting(method, sparsity)(*inputs, source)
        else:
            heads, neurons = (
                torch.ones(batch, tokens, shape.layers, units, dtype=torch.bool)
                for units in (shape.heads, shape.ffn)
            )
            if method != "dense":
                policy = self.options.policy(shape, sparsity)
                first, second = ranked(method)
                for mask, kept in (
                    (heads[:, 1:, 1:], first.best(policy.heads_kept(shape), policy.min_heads)),
                    (neurons[:, 1:], second.best(policy.neurons_kept(shape), policy.min_neurons)),
                ):  # layer 0's heads and a window's first token run whole
                    each = kept if len(kept) == 1 else kept.unflatten(0, ids.shape)[:, 1:]
                    mask.copy_(each)
            results = self.given()(*inputs, heads, neurons)
        return tally(ids, results, dense=method == "dense")

    def _point(self, method: str, sparsity: float, parts: Sequence[Record]) -> Record:
        """What all batches together say of one method and sparsity."""
        predictor = 0
        if method in self.predictors and sparsity:
            predictor = predictor_elements(
                self.predictors[method], heads=not self.options.neurons_only, neurons=True
            )
        return {"sparsity": sparsity, **summary(self.loaded.shape, parts, predictor)}

    @torch.inference_mode()
    def _compare(self) -> Record:
        """Predicted against true scores, layer by layer, and how a head's rank varies.

        On every so-manieth window, dense: the ranks are those among the units of a layer, except
        for the variance, which is of a head's rank among all heads of the model.
        """
        shape = self.loaded.shape
        count = max(1, _COMPARED_TOKENS // len(self.windows[0]))
        stride = max(1, len(self.windows) // count)
        ranks = []
        found: dict[str, dict[str, list[Tensor]]] = {}
        for window in self.windows[::stride][:count]:
            ids = torch.tensor([window])
            true = [scores[0, 1:-1] for scores in self.oracle()(ids)]
            ranks.append(centred_ranks(true[0].flatten(1)))
            for name, calibration in self.predictors.items():
                heads, neurons = (s[0, 1:-1] for s in predicted(self.loaded, calibration, ids))
                agreement = found.setdefault(name, {"heads": [], "neurons": []})
                agreement["heads"].append(_spearman(heads, true[0][:, 1:]))
                agreement["neurons"].append(_spearman(neurons, true[1]))
        variance = torch.cat(ranks).var(dim=0, correction=0).view(shape.layers, shape.heads)

        def mean(kind: str, rows: list[Tensor]) -> list[float | None]:
            values = torch.cat(rows).mean(dim=0).tolist()
            return [*[None] * (kind == "heads"), *values]  # nobody scores layer 0's heads

        return {
            "compared_tokens": sum(map(len, ranks)),
            "rank_correlation": {
                name: {kind: mean(kind, rows) for kind, rows in kinds.items()}
                for name, kinds in found.items()
            },
            "head_rank_variance": variance.tolist(),
        }


def tally(ids: Tensor, results: Sequence[Tensor], *, dense: bool = False) -> Record:
    """Loss and what ran, summed over the tokens that are scored: all but a window's first and last.

    Args:
        ids: int64 [B, T].
        results: What a program of `masked_program` gave.
        dense: Every row is read, zero or not.
    """
    (batch, tokens), (logits, heads, neurons, *rows) = ids.shape, results
    losses = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
    )
    counted = slice(1, tokens - 1)
    ran = neurons[:, counted].sum(-1, dtype=torch.int32)  # int64 takes 20 times as long
    read = rows[0][:, counted] if rows and not dense else ran
    return {
        "loss": float(losses.view(batch, -1)[:, counted].sum(dtype=torch.float64)),
        "tokens": batch * (tokens - 2),
        "heads": heads[:, counted].sum((0, 1, 3)).tolist(),
        "neurons": ran.sum((0, 1)).tolist(),
        "rows": read.sum((0, 1)).tolist(),
    }


def summary(shape: ModelShape, parts: Sequence[Record], predictor: int) -> Record:
    """What all batches together say.

    Args:
        shape: The model's shape.
        parts: What `tally` gave for each.
        predictor: Elements of the predictor that a token reads.
    """
    tokens = sum(part["tokens"] for part in parts)
    loss = sum(part["loss"] for part in parts) / tokens
    heads, neurons, rows = (
        [sum(layer) / tokens for layer in zip(*(part[name] for part in parts), strict=True)]
        for name in ("heads", "neurons", "rows")
    )
    first = 2 if shape.gated else 1
    heads_read = 2 * shape.head_dim * (sum(heads) + shape.kv_heads * shape.layers)
    read = shape.hidden * (heads_read + first * sum(neurons) + sum(rows))
    whole = shape.layers * shape.layer_elements
    return {
        "perplexity": math.exp(min(loss, 700.0)),
        "tokens": tokens,
        "head_sparsity": 1 - sum(heads) / (shape.heads * shape.layers),
        "neuron_sparsity": 1 - sum(neurons) / (shape.ffn * shape.layers),
        "weight_bytes_skipped": 1 - (read + predictor) / whole,
        "predictor_bytes_share": predictor / whole,
        "heads_by_layer": [value / shape.heads for value in heads],
        "neurons_by_layer": [value / shape.ffn for value in neurons],
    }


_HALF = Policy(0.5, 0.5)  # any policy that skips both: what the graphs are made with


class Ranking:
    """Scores of many tokens, ordered once for every budget.

    Args:
        scores: fp32 [N, L, U].
    """

    def __init__(self, scores: Tensor) -> None:
        """Sort the scores of each token; numpy does it with vector instructions."""
        finite = scores.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        self.scores = finite.contiguous()
        self.ordered = torch.from_numpy(np.sort(self.scores.flatten(1).numpy(), axis=1))

    def best(self, keep: int, floor: int) -> Tensor:
        """What `select_reference` keeps of the whole model: bool [N, L, U].

        Units above the keep-th best score are the answer unless others equal it, or a layer is left
        with fewer than its floor: those tokens go through the exact selection of the runtime.
        """
        scores, ordered = self.scores, self.ordered
        units = ordered.shape[1]
        if keep == units:
            return torch.ones_like(scores, dtype=torch.bool)
        if keep == 0:
            return torch.zeros_like(scores, dtype=torch.bool)
        least = ordered[:, units - keep]
        mask = scores >= least[:, None, None]
        hard = (least == ordered[:, units - keep - 1]) | (mask.sum(2).amin(1) < floor)
        if hard.any():
            chosen = scores[hard]
            index, count = torch.ops.shadowc.select(chosen, keep, floor, False)
            exact = keep_mask(index.flatten(0, 1), count.flatten(), scores.shape[2])
            if exact is not None:
                mask[hard] = exact.view(*index.shape).transpose(0, 1)
        return mask


def masked_program(
    traced: fx.GraphModule, shape: ModelShape, calibration: Calibration, policy: Policy
) -> tuple[Program, dict[str, Tensor]]:
    """The masked program of a calibration in fp32, and its weights.

    Returns:
        A program that returns (logits, head mask, neuron mask) and, for ReLU models, how many rows
        of the second projections a token reads, int64 [B, T, L].
    """
    scores = StaticScores(calibration.mean_head_scores, calibration.mean_neuron_scores)
    predictors: list[Predictor | StaticScores] = [*calibration.build_predictors()]
    predictors = predictors or [scores]
    masks = export_masks(predictors, selections(calibration, policy), calibration.width)
    relu = shape.activation == "relu"
    module = run_passes(
        copy_module(traced),
        (
            partial(find_blocks, shape=shape),
            partial(insert_predictor, masks=masks, feature=calibration.feature),
            mask_attention,
            mask_mlp,
            *([_count_rows] if relu else []),
            prepack_linear,  # last: the others look for aten.linear
        ),
    )
    outputs = ("logits", "head_mask", "neuron_mask", *(["rows"] if relu else []))
    program = to_program(module, outputs)
    return program, {name: _tensor(module, name) for name in program.weights}


def predicted(loaded: LoadedModel, calibration: Calibration, ids: Tensor) -> Masks:
    """Scores of a calibration's predictors where nothing is skipped.

    Args:
        loaded: The model.
        calibration: Gives the predictors.
        ids: int64 [B, T].

    Returns:
        fp32 [B, T, L-1, H], of layers 1.., and [B, T, L, F].
    """
    pooled = calibration.predictor == "fullseq"
    collector = Collector(
        loaded.model, loaded.shape, calibration.feature, calibration.taps, pooled=pooled
    )
    features, _ = collector.features([Example(row, [True] * len(row)) for row in ids.tolist()])
    scores = [
        predictor(feature)
        for predictor, feature in zip(calibration.build_predictors(), features, strict=True)
    ]
    heads, neurons = (torch.cat(kind, dim=2) for kind in zip(*scores, strict=True))
    return heads, neurons


def traced_graph(loaded: LoadedModel) -> fx.GraphModule:
    """The model's canonical graph, from which masked programs are made."""
    module = trace(loaded.model).module(check_guards=False)
    return run_passes(module, (canonicalize,))


def _count_rows(module: fx.GraphModule) -> bool:
    """Return also how many activations of each layer are not zero, int64 [B, T, L]."""
    blocks, graph = blocks_of(module), module.graph
    output = graph.output_node()
    (returned,) = output.args
    call, aten = graph.call_function, torch.ops.aten
    with graph.inserting_before(output):
        counts = [
            call(aten.count_nonzero.dim_IntList, (mlp.output.args[0], [-1])) for mlp in blocks.mlp
        ]
        rows = call(aten.stack.default, (counts, 2))
    output.args = ((*returned, rows),)
    return True


def _tensor(module: fx.GraphModule, name: str) -> Tensor:
    owner, _, leaf = name.rpartition(".")
    value: Tensor = getattr(module.get_submodule(owner), leaf)
    return value.detach()


def _spearman(predicted_scores: Tensor, true: Tensor) -> Tensor:
    """Rank correlation over the last dimension: [N, L, U] -> fp64 [N, L]."""
    x, y = (centred_ranks(scores.flatten(0, 1)) for scores in (predicted_scores, true))
    scale = (x.square().sum(dim=1) * y.square().sum(dim=1)).sqrt()
    return ((x * y).sum(dim=1) / scale.clamp(min=1e-12)).view(true.shape[:2])
