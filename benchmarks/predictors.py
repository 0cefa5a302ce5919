"""What a predictor's place, fit, feature and rank buy: held-out recall, perplexity, bytes read.

    python benchmarks/predictors.py opt-books-15m --text books.txt

Every row is calibrated on the same examples of the text and measured on the same other tokens, by
the masked program in fp32, with a new mask for every token. Writes
benchmarks/results/predictors-MODEL-CRITERION.md and .json. Columns (bytes are of the layers'
weights: what a token does not read, the predictor's own counted as read, rows of zeros as not):

    50/50      half of the heads and of the neurons
    47/47      what a predictor in every layer skips in the time in which one predictor skips half:
               OPT-13B on an H100 takes 5.40 ms with one, 5.67 with forty, 0.08 for each percent
    0/75       three quarters of the neurons, no head
    30%, half  `--budget bytes --sparsity 0.3` and `0.5`
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from shadowc.budget import allot, predictor_elements
from shadowc.calibration.data import calibration_examples, evaluation_windows
from shadowc.calibration.fit import FitOptions, calibrate
from shadowc.calibration.store import Calibration
from shadowc.config import Policy
from shadowc.errors import OptionError
from shadowc.evaluation.masks import mask_source
from shadowc.evaluation.perplexity import batches
from shadowc.evaluation.sweep import masked_program, summary, tally, traced_graph
from shadowc.models import LoadedModel, load_model, slug
from shadowc.selection import default_selection
from shadowc.versions import versions

BUDGETS: dict[str, Policy | float] = {
    "50/50": Policy(0.5, 0.5),
    "47/47": Policy(0.465, 0.465),
    "0/75": Policy(0.0, 0.75),
    "30%": 0.3,
    "half": 0.5,
}
ROWS: dict[str, dict[str, Any]] = {
    **{f"shadow, rank {r}": {"predictor": "shadow", "rank": r} for r in (16, 32, 64, 128, 256)},
    "shadow, rank 128, linear": {"predictor": "shadow", "random_features": 0},
    "shadow, of the attention's context": {"feature": "context"},
    "shadow, the paper's recipe": {"fit": "paper"},
    **{f"a tap every {n} layers": {"every": n} for n in (5, 2)},
    **{f"layerwise, rank {r}": {"rank": r} for r in (16, 32, 64, 128)},
    "layerwise, rank 128, 512 random features": {"rank": 128, "random_features": 512},
    "static": {"predictor": "static"},
}
RESULTS = Path(__file__).parent / "results"


class Measure:
    """One model and its text."""

    def __init__(self, loaded: LoadedModel, options: argparse.Namespace) -> None:
        self.loaded, self.options = loaded, options
        self.graph = traced_graph(loaded)
        self.examples = calibration_examples(loaded, options.text, options.examples, 256, 0)
        windows = evaluation_windows(
            loaded, options.text, 256, options.tokens, calibrated_on=options.text
        )
        self.batches = batches(windows, loaded.shape.vocab)

    def row(self, fitting: dict[str, Any]) -> dict[str, Any]:
        """Calibrate, and measure every budget."""
        (found,) = calibrate(
            self.loaded, self.examples, FitOptions((self.options.criterion,), **fitting)
        )
        row = {name: found.metrics.get(name) for name in
               ("spearman_heads", "spearman_neurons", "recall_neurons_50", "seconds")}  # fmt: skip
        return row | {name: self.at(found, budget) for name, budget in BUDGETS.items()}

    @torch.inference_mode()
    def at(self, calibration: Calibration, budget: Policy | float) -> dict[str, Any] | None:
        """Perplexity and bytes; None where the budget is out of reach."""
        usual = default_selection(len(calibration.taps))
        if isinstance(budget, float):
            try:
                policy = allot(calibration, budget, Policy(0.0, 0.0, selection=usual))
            except OptionError:
                return None
        else:
            policy = replace(budget, selection=usual)
        program, tensors = masked_program(self.graph, self.loaded.shape, calibration, policy)
        run: Callable[..., Any] = program.bind(tensors)
        parts = []
        for ids in self.batches:
            batch, tokens = ids.shape
            causal = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(batch, 1, -1, -1)
            source = mask_source(tokens, prompt=1, refresh=1).expand(batch, -1)
            inputs = ids, torch.arange(tokens).expand(batch, -1), causal, source
            parts.append(tally(ids, run(*inputs)))
        read = partial(predictor_elements, calibration)
        skips = policy.head_sparsity > 0, policy.neuron_sparsity > 0  # else nothing is predicted
        used = read(heads=skips[0], neurons=skips[1]) if any(skips) else 0
        return summary(self.loaded.shape, parts, used)


def main() -> None:
    """Measure every row and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--text", default="pydoc", help="to calibrate on, and to measure with")
    parser.add_argument("--criterion", default="sens")
    parser.add_argument("--examples", type=int, default=96)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--rows", nargs="*", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    options = parser.parse_args()
    measure = Measure(load_model(options.model), options)
    (static,) = calibrate(
        measure.loaded, measure.examples, FitOptions((options.criterion,), "static")
    )
    dense = measure.at(static, Policy(0.0, 0.0))
    facts: dict[str, Any] = {
        "model": options.model, "criterion": options.criterion, "text": Path(options.text).name,
        "examples": options.examples, "dense": dense, "rows": {}, "versions": versions(),
    }  # fmt: skip
    file = RESULTS / f"predictors-{slug(options.model)}-{options.criterion}.json"
    for name in options.rows:
        facts["rows"][name] = measure.row(ROWS[name])
        print(_line(name, facts["rows"][name]), flush=True)
        file.write_text(json.dumps(facts, indent=2) + "\n")
        file.with_suffix(".md").write_text(page(facts))


def page(facts: dict[str, Any]) -> str:
    """The table as Markdown."""
    budgets = [f"{name}: perplexity, bytes not read" for name in BUDGETS]
    columns = ("predictor", "its bytes", "Spearman heads, neurons", "recall of neurons", *budgets)
    lines = [
        f"# Predictors of {facts['model']}",
        "",
        f"`python benchmarks/predictors.py {facts['model']} --text {facts['text']} --criterion "
        f"{facts['criterion']}`: {facts['examples']} examples of 256 tokens to calibrate, "
        f"{facts['dense']['tokens']} other tokens, dense {facts['dense']['perplexity']:.2f}. "
        "What the columns are: `benchmarks/predictors.py`.",
        "",
        "| " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
        *(_line(name, row) for name, row in facts["rows"].items()),
    ]
    return "\n".join(lines) + "\n"


def _line(name: str, row: dict[str, Any]) -> str:
    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.2f}"

    def cell(point: dict[str, Any] | None) -> str:
        if point is None:
            return "out of reach"
        return f"{point['perplexity']:.2f}, {point['weight_bytes_skipped']:.0%}"

    spearman = f"{number(row['spearman_heads'])}, {number(row['spearman_neurons'])}"
    cells = [cell(row[budget]) for budget in BUDGETS]
    share = f"{row['50/50']['predictor_bytes_share']:.1%}"
    return f"| {' | '.join([name, share, spearman, number(row['recall_neurons_50']), *cells])} |"


if __name__ == "__main__":
    main()
