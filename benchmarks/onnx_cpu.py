"""Decoding in ONNX Runtime: custom ops, dense, and the functions that run without our library.

    python benchmarks/onnx_cpu.py                        random:opt-1.3b and smollm2-135m, minutes
    python benchmarks/onnx_cpu.py smollm2-135m --threads 1

Models are compiled with the command line, fp32, 50% of heads and neurons. All variants decode the
same text after the same prompt in one process, in turns of eight tokens, each with its own cache:

    custom ops, in place    `shadowc run`: the library registered, past and present share memory
    custom ops, growing     the library registered, the cache a new one at every token
    dense                   dense.onnx, plain operators, ONNX Runtime's own optimisations; growing
    functions               model.onnx without the library; growing

Times are medians of tokens; ratios are to dense. The table goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

from shadowc.artifact import open_artifact
from shadowc.evaluation.bench import TURN, device
from shadowc.evaluation.sources import held_out
from shadowc.models import slug
from shadowc.onnx.names import MODEL
from shadowc.runtime.loading import load
from shadowc.runtime.onnx import OnnxCache, open_model
from shadowc.versions import versions

MODELS = ("random:opt-1.3b", "smollm2-135m")
RESULTS = Path(__file__).parent / "results"
PROMPT, NEW, WARM_UP = 128, 128, 8


def main() -> None:
    """Measure every model and write one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("artifacts/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for model in options.models:
        rows += measure(model, compiled(model, options.work))
    write(rows, options.threads)


def compiled(model: str, work: Path) -> Path:
    """The artifact, made if it is not there yet."""
    calibration, artifact = work / f"{slug(model)}-speed", work / f"{slug(model)}-s50-onnx"
    few = ("--examples", 4, "--seq-len", 64) if model.startswith("random:") else ()
    if not artifact.exists():
        shadowc("calibrate", model, *few, "--output", calibration)
        shadowc("compile", calibration, "--target", "onnx-cpu", "--dtype", "fp32", "--sparsity",
                0.5, "--output", artifact)  # fmt: skip
    return artifact


def shadowc(*arguments: object) -> None:
    """Run a command in a process of its own."""
    command = [str(argument) for argument in arguments]
    print("shadowc", shlex.join(command), file=sys.stderr, flush=True)
    subprocess.run([sys.executable, "-m", "shadowc", *command], check=True)


@torch.inference_mode()
def measure(name: str, path: Path) -> list[dict[str, Any]]:
    """One row a variant."""
    artifact, model = open_artifact(path), load(path)
    session: Any = model.session
    (window, *_) = held_out(model, "pydoc", PROMPT + NEW, PROMPT + NEW)
    text = torch.tensor([window])
    grown = {
        "custom ops, growing": open_model(path / MODEL),
        "functions": open_model(path / MODEL, library=False),
    }
    variants = {
        "custom ops, in place": lambda ids, cache: session.step(ids, cache),
        "dense": lambda ids, cache: session.step(ids, cache, program="dense"),
    } | {title: growing(session, opened) for title, opened in grown.items()}
    times: dict[str, list[float]] = {title: [] for title in variants}
    for _ in range(2):  # the first prompt opens the session and makes room in it
        caches = {title: session.new_cache(1, PROMPT + NEW) for title in variants}
        prompts = {title: seconds(run, text[:, :PROMPT], caches[title])
                   for title, run in variants.items()}  # fmt: skip
    for first in range(PROMPT, PROMPT + NEW, TURN):
        turn = (first - PROMPT) // TURN % len(variants)
        titles = [*variants]
        for title in (*titles[turn:], *titles[:turn]):
            for place in range(first, first + TURN):
                took = seconds(variants[title], text[:, place : place + 1], caches[title])
                if place >= PROMPT + WARM_UP:
                    times[title].append(took)
    ms = {title: 1e3 * statistics.median(values) for title, values in times.items()}
    skipped = artifact.report()["compile"]["weight_bytes_skipped"]
    return [
        {
            "model": name,
            "variant": title,
            "ms_per_token": value,
            "best_ms": 1e3 * min(times[title]),
            "beside_dense": value / ms["dense"],
            "prompt_ms": 1e3 * prompts[title],
            "weight_bytes_skipped": skipped,
        }
        for title, value in ms.items()
    ]


def growing(session: Any, opened: Any) -> Callable[[Tensor, OnnxCache], None]:
    """A step of a model whose cache grows."""

    def step(ids: Tensor, cache: OnnxCache) -> None:
        session.run_grown(opened, ids, cache)
        cache.length += ids.shape[1]

    return step


def seconds(run: Callable[[Tensor, OnnxCache], object], ids: Tensor, cache: OnnxCache) -> float:
    """How long a step takes."""
    began = time.perf_counter()
    run(ids, cache)
    return time.perf_counter() - began


def write(rows: list[dict[str, Any]], threads: int) -> None:
    """Print the table and write it with its hardware, versions and command."""
    where, known = device(), {**versions(), "onnxruntime": onnxruntime.__version__}
    lines = [
        "# Decoding in ONNX Runtime", "",
        "| model | variant | ms a token | beside dense | fastest token | prompt, ms |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['model']} | {row['variant']} | {row['ms_per_token']:.1f} | "
            f"{row['beside_dense']:.2f} | {row['best_ms']:.1f} | {row['prompt_ms']:.0f} |"
            for row in rows
        ),
        "",
        f"Float32, 50% of heads and of neurons, batch 1, prompt {PROMPT}, {NEW} new tokens. "
        "Weights of `random:` models are random: speed only.",
        "",
        f"{where['device']}, {where['isa']}, {threads} threads; "
        + ", ".join(f"{key} {value}" for key, value in known.items()) + ".",
        "",
        f"    {(command := shlex.join(['python', 'benchmarks/onnx_cpu.py', *sys.argv[1:]]))}", "",
    ]  # fmt: skip
    print("\n".join(lines))
    stem = RESULTS / f"onnx-{threads}-threads"
    stem.with_suffix(".md").write_text("\n".join(lines))
    result = {"command": command, "rows": rows, **where, "threads": threads, "versions": known}
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
