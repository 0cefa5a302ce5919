"""What each way to serve from Python adds to a decode step: transformers, its pipeline, its server.

    python benchmarks/serving.py                         random:opt-1.3b and opt-books-15m, minutes
    python benchmarks/serving.py opt-books-15m --threads 1

Models are compiled with the command line for cpu and for onnx-cpu (fp32), 50% of heads and neurons.
Every way goes on greedily from the same prompt, in turns; times are from the first new token to the
last, divided by the tokens between them, and a row has the median over the turns:

    step        the loop of `shadowc bench`: `session.step` and argmax
    generate    `model.generate`, streamed
    pipeline    `pipeline("text-generation")`, streamed
    server      `shadowc serve`, streamed over HTTP, in a process of its own

Ratios are to the step loop in the same turn, medians too. The table goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from transformers import pipeline

from shadowc.evaluation.bench import device
from shadowc.evaluation.servers import served
from shadowc.evaluation.sources import held_out
from shadowc.models import slug
from shadowc.runtime.loading import load
from shadowc.runtime.streaming import TimedStreamer
from shadowc.versions import versions

MODELS, TARGETS = ("random:opt-1.3b", "opt-books-15m"), ("cpu", "onnx-cpu")
RESULTS = Path(__file__).parent / "results"
PROMPT, NEW, TURNS = 128, 64, 9
GREEDY = {"do_sample": False, "max_new_tokens": NEW, "min_new_tokens": NEW}


def main() -> None:
    """Measure every model and write one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--targets", nargs="+", default=TARGETS)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--work", type=Path, default=Path("artifacts/benchmarks"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = [
        row
        for model in options.models
        for target in options.targets
        for row in measure(model, target, compiled(model, target, options.work), options.threads)
    ]
    write(rows, options.threads)


def compiled(model: str, target: str, work: Path) -> Path:
    """The artifact, made if it is not there yet."""
    calibration, artifact = work / f"{slug(model)}-speed", work / f"{slug(model)}-s50-{target}"
    few = ("--examples", 4, "--seq-len", 64) if model.startswith("random:") else ()
    if not calibration.exists():
        shadowc("calibrate", model, *few, "--output", calibration)
    if not artifact.exists():
        dtype = ("--dtype", "fp32") if target == "onnx-cpu" else ()
        shadowc("compile", calibration, "--target", target, *dtype, "--output", artifact)
    return artifact


def shadowc(*arguments: object) -> None:
    """Run a command in a process of its own."""
    subprocess.run([sys.executable, "-m", "shadowc", *map(str, arguments)], check=True)


def measure(name: str, target: str, path: Path, threads: int) -> list[dict[str, Any]]:
    """One row a way."""
    model = load(path)
    (window, *_) = held_out(model, "pydoc", PROMPT, PROMPT)
    ids = torch.tensor([window])
    text = model.tokenizer.decode(window, skip_special_tokens=True)
    write_ = pipeline("text-generation", model=model, tokenizer=model.tokenizer)

    def step() -> list[float]:
        cache, tokens, times = model.session.new_cache(1, PROMPT + NEW), ids, []
        for _ in range(NEW):
            logits = model.session.step(tokens, cache)["logits"]
            tokens = logits[:, -1:].argmax(-1)
            times.append(time.perf_counter())
        return times

    def streamed(run: Callable[[TimedStreamer], object]) -> list[float]:
        streamer = TimedStreamer(model.tokenizer, None)
        run(streamer)
        return streamer.times[1:]  # the first is the prompt's

    body = {"prompt": text, "generation_config": json.dumps({**GREEDY, "eos_token_id": None})}
    settings = {"OMP_NUM_THREADS": str(threads)}
    with served("shadowc", "serve", path, environment=settings) as ask:
        ways: dict[str, Callable[[], list[float]]] = {
            "step": step,
            "generate": lambda: streamed(lambda s: model.generate(ids, streamer=s, **GREEDY)),
            "pipeline": lambda: streamed(lambda s: write_(text, streamer=s, **GREEDY)),
            "server": lambda: ask(body)[:NEW],
        }
        found: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(-1, TURNS):
            for way in (*[*ways][turn % len(ways) :], *[*ways][: turn % len(ways)]):
                times = ways[way]()
                if turn >= 0:
                    found[way].append(1e3 * (times[-1] - times[0]) / (len(times) - 1))
    ms = {way: statistics.median(values) for way, values in found.items()}
    return [
        {
            "model": name,
            "target": target,
            "way": way,
            "ms_per_token": value,
            "best_ms": min(found[way]),
            "beside_step": statistics.median(map(truediv, found[way], found["step"])),
        }
        for way, value in ms.items()
    ]


def write(rows: list[dict[str, Any]], threads: int) -> None:
    """The table, as Markdown and as JSON."""
    where = device() | {"threads": threads}
    lines = [
        "| model | target | way | ms a token | best | beside `step` |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {row['model']} | {row['target']} | {row['way']} | {row['ms_per_token']:.2f} "
        f"| {row['best_ms']:.2f} | {row['beside_step']:.3f} |"
        for row in rows
    ]
    about = (
        f"{where['device']}, {where['isa']}, {threads} threads, batch 1, prompt {PROMPT}, "
        f"{NEW} new tokens, medians of {TURNS} turns; "
        + ", ".join(f"{library} {number}" for library, number in versions().items())
    )
    page = "\n".join(("# What serving from Python adds to a step", "", *lines, "", about, ""))
    name = f"serving-{threads}-threads"
    (RESULTS / f"{name}.md").write_text(page)
    (RESULTS / f"{name}.json").write_text(json.dumps({"rows": rows, **where}, indent=1) + "\n")
    print(page)


if __name__ == "__main__":
    main()
