"""The whole path on two real models: calibrate, compile, generate, evaluate, benchmark.

    python examples/demo.py            about five minutes on two cores, no network

Writes calibrations, artifacts, results.json and table.txt into demo/. Figures are printed as they
are; benchmarks/ has larger samples.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from shadowc import budget, targets
from shadowc.calibration.data import calibration_examples, evaluation_windows
from shadowc.calibration.fit import FitOptions, calibrate
from shadowc.calibration.progress import showing
from shadowc.calibration.store import Calibration, save_calibration
from shadowc.compiler import build_programs
from shadowc.config import Policy
from shadowc.evaluation.bench import device
from shadowc.evaluation.numerics import check_numerics
from shadowc.evaluation.perplexity import evaluate
from shadowc.models import LoadedModel, load_model
from shadowc.runtime.session import Session
from shadowc.selection import default_selection
from shadowc.trace import trace
from shadowc.versions import versions

CRITERIA = ("plainact", "sens")
PROMPT = "It was"
SEQ_LEN = 256
BYTES = 0.5


@dataclass(frozen=True)
class Model:
    """A model of the demo.

    Attributes:
        name: Its alias.
        dtype: Type of its matrices.
        examples: Windows to calibrate on.
        tokens: Tokens to score.
    """

    name: str
    dtype: torch.dtype
    examples: int
    tokens: int


MODELS = (
    Model("opt-books-15m", torch.float16, examples=128, tokens=4096),
    Model("smollm2-135m", torch.bfloat16, examples=16, tokens=1536),
)


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("demo"))
    parser.add_argument("--models", nargs="*", default=[model.name for model in MODELS])
    parser.add_argument("--scale", type=float, default=1.0, help="of the text that is used")
    options = parser.parse_args()
    began = time.monotonic()
    results: dict[str, Any] = {"models": {}, **device(), "versions": versions()}
    for model in MODELS:
        if model.name in options.models:
            small = replace(
                model,
                examples=max(4, round(model.examples * options.scale)),
                tokens=max(SEQ_LEN, round(model.tokens * options.scale)),
            )
            results["models"][model.name] = run_model(small, options.output)
    results["seconds"] = round(time.monotonic() - began)
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print_table(results, options.output / "table.txt")


def run_model(model: Model, output: Path) -> dict[str, Any]:
    """Calibrate, measure every budget, then use the command line for one artifact."""
    say(f"{model.name}: calibrating {' and '.join(CRITERIA)} in one pass")
    loaded = load_model(model.name)
    examples = calibration_examples(loaded, "pydoc", model.examples, SEQ_LEN, seed=0)
    with showing("bar") as progress:
        calibrations = calibrate(loaded, examples, FitOptions(CRITERIA), progress=progress)
    for calibration in calibrations:
        save_calibration(calibration, directory(output, model, calibration.criterion))

    rows = measure(model, loaded, calibrations)
    del loaded
    name = f"{model.name}-{CRITERIA[0]}-s50-cpu"
    artifact, source = output / "artifacts" / name, directory(output, model, CRITERIA[0])
    shadowc("compile", source, "--target", "cpu", "--sparsity", 0.5, "--output", artifact)
    text = shadowc("run", artifact, "--prompt", PROMPT, "--max-new-tokens", 32)
    bench = shadowc("bench", artifact, "--new-tokens", 96)
    return {"rows": rows, "run": text, "bench": bench}


def directory(output: Path, model: Model, criterion: str) -> Path:
    """Where a calibration goes."""
    return output / "calibrations" / f"{model.name}-{criterion}"


def measure(
    model: Model, loaded: LoadedModel, calibrations: list[Calibration]
) -> list[dict[str, Any]]:
    """Perplexity of every criterion and budget beside dense, static and random."""
    windows = evaluation_windows(loaded, "pydoc", SEQ_LEN, model.tokens)
    traced = trace(loaded.model).module(check_guards=False)
    backend = targets.load_target("cpu")
    rows: list[dict[str, Any]] = []
    done: dict[str, dict[str, Any]] = {}  # what does not depend on the criterion
    for calibration in calibrations:
        selection = default_selection(len(calibration.taps))
        half = Policy(0.5, 0.5, selection=selection)
        for label, policy in (
            ("30% of units", Policy(0.3, 0.3, selection=selection)),
            ("50% of units", half),
            (f"{BYTES:.0%} of bytes", budget.allot(calibration, BYTES, half)),
        ):
            say(f"{model.name}: {calibration.criterion}, {label}")
            built = build_programs(traced, loaded, calibration, policy, backend, model.dtype)
            session = Session(
                loaded.shape, policy, built.programs, built.packed, built.keep,
                loaded.shape.max_positions, built.predictor_bytes,
            )  # fmt: skip
            ran = check_numerics(session, loaded, backend.tolerances(model.dtype))
            key = f"random {policy.head_sparsity} {policy.neuron_sparsity}"
            wanted = {"static": "static", "dense": "dense", key: "random"}
            against = [name for known, name in wanted.items() if known not in done]
            found = evaluate(session, windows, against=against)
            done |= {k: found[n] for k, n in wanted.items() if n in found and k != "static"}
            rows.append(
                {
                    "criterion": calibration.criterion,
                    "budget": label,
                    "head_sparsity": found["artifact"]["head_sparsity"],
                    "neuron_sparsity": found["artifact"]["neuron_sparsity"],
                    "weight_bytes_skipped": ran["weight_bytes_skipped"],
                    "tokens": found["artifact"]["tokens"],
                    "perplexity": found["artifact"]["perplexity"],
                    "static": found["static"]["perplexity"],
                    "random": done[key]["perplexity"],
                    "dense": done["dense"]["perplexity"],
                }
            )
    return rows


def shadowc(*arguments: object) -> dict[str, Any]:
    """Run a command as a user would, and read what it prints."""
    command = [str(argument) for argument in arguments]
    say("shadowc " + " ".join(command))
    done = subprocess.run(
        [sys.executable, "-m", "shadowc", *command, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def print_table(results: dict[str, Any], path: Path) -> None:
    """Print the table, and write it."""
    table = Table(title="perplexity on held-out pydoc text (lower is better), and decoding speed")
    for column in ("model", "what runs", "heads", "neurons", "bytes not read",
                   "perplexity", "static", "random", "ms a token"):  # fmt: skip
        table.add_column(column, justify="left" if column in ("model", "what runs") else "right")
    for name, model in results["models"].items():
        bench, rows = model["bench"], model["rows"]
        exact = bench["exact_ms_per_token"]
        for label, ms in (
            ("Hugging Face eager", bench["hugging_face_ms_per_token"]),
            ("Hugging Face eager, fp32", bench["hugging_face_fp32_ms_per_token"]),
        ):
            if ms is not None:
                table.add_row(name, label, "", "", "", "", "", "", f"{ms:.2f}")
        dense_ms = f"{bench['dense_ms_per_token']:.2f}"
        table.add_row(name, "dense", "", "", "", number(rows[0]["dense"]), "", "", dense_ms)
        if exact is not None:
            table.add_row(name, "exact", "", "", "", number(rows[0]["dense"]), "", "",
                          f"{exact:.2f}")  # fmt: skip
        for row in rows:
            timed = (row["criterion"], row["budget"]) == (CRITERIA[0], "50% of units")
            table.add_row(
                name,
                f"{row['criterion']}, {row['budget']}",
                f"-{row['head_sparsity']:.0%}",
                f"-{row['neuron_sparsity']:.0%}",
                f"{row['weight_bytes_skipped']:.0%}",
                number(row["perplexity"]),
                number(row["static"]),
                number(row["random"]),
                f"{bench['ms_per_token']:.2f}" if timed else "",
            )
        table.add_section()
    dtypes = ", ".join(f"{n} {m['bench']['dtype']}" for n, m in results["models"].items())
    tokens = ", ".join(f"{n} {m['rows'][0]['tokens']}" for n, m in results["models"].items())
    table.caption = (
        f"{results['device']}, {results['isa']}, {results['threads']} threads, batch 1; {dtypes}; "
        f"tokens scored: {tokens}; torch {results['versions']['torch']}, "
        f"transformers {results['versions']['transformers']}"
    )
    with path.open("w") as file:
        Console(file=file, width=118).print(table)
    print(path.read_text())
    for name, model in results["models"].items():
        print(f"{name} at 50% (plainact): {PROMPT}{model['run']['text']}\n")
    print(f"{results['seconds']} s in all; artifacts and figures are in {path.parent}/")


def number(value: float) -> str:
    """A perplexity, short."""
    return f"{value:.1f}" if value < 1e4 else f"{value:.0e}"


def say(text: str) -> None:
    """Log to stderr."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
