"""vLLM on a CPU: its own dense model beside artifacts of the same model, at batch 1 and 4.

    .venv-vllm/bin/python benchmarks/vllm_cpu.py                    random:opt-1.3b, a quarter hour
    .venv-vllm/bin/python benchmarks/vllm_cpu.py opt-books-15m

Three servers of vLLM, one after the other and round after round, so that what else the machine does
falls on all of them:

    dense       the checkpoint, in the type of the artifacts' weights, as vLLM compiles it
    shadowc 0%  an artifact that skips nothing
    shadowc 50% an artifact that skips half of all heads and neurons

A request is 128 tokens of prompt and 64 new ones, streamed; times are from a stream's first token
to its last, divided by the tokens between them, and a row has the median over streams, turns and
rounds. `make vllm` makes the environment; the table goes to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

from shadowc.evaluation.bench import device
from shadowc.evaluation.servers import served
from shadowc.models import load_model, slug
from shadowc.versions import versions

Ask = Callable[[Mapping[str, Any]], list[float]]
RESULTS = Path(__file__).parent / "results"
PROMPT, NEW, TURNS, ROUNDS, BATCHES = 128, 64, 3, 3, (1, 4)


def main() -> None:
    """Measure one model and write its table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="random:opt-1.3b")
    parser.add_argument("--cpus", default="0-1", help="as VLLM_CPU_OMP_THREADS_BIND takes them")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--work", type=Path, default=Path("artifacts/benchmarks"))
    options = parser.parse_args()
    paths = made(options.model, options.work.resolve())
    found: dict[tuple[str, int], list[float]] = {}
    for turn in range(options.rounds):
        for way in (*[*paths][turn % 3 :], *[*paths][: turn % 3]):
            with server(paths[way], options.cpus) as ask:
                for batch in BATCHES:
                    found.setdefault((way, batch), []).extend(measure(ask, batch))
                    print(f"round {turn}, {way}, batch {batch}", file=sys.stderr)
    write(options.model, found, options.cpus)


def made(model: str, work: Path) -> dict[str, Path]:
    """The checkpoint and the artifacts, each made if it is not there yet."""
    name = slug(model)
    calibration, dense = work / f"{name}-speed", work / f"{name}-dense"
    artifacts = {share: work / f"{name}-s{share}-vllm" for share in (0, 50)}
    few = ("--examples", 4, "--seq-len", 64) if model.startswith("random:") else ()
    if not calibration.exists():
        shadowc("calibrate", model, *few, "--output", calibration)
    for share, path in artifacts.items():
        if not path.exists():
            shadowc("compile", calibration, "--sparsity", share / 100, "--output", path)
    if not dense.exists():
        loaded = load_model(model)
        stored = json.loads((artifacts[0] / "manifest.json").read_text())["dtype"]
        loaded.model.to(getattr(torch, stored)).save_pretrained(dense)
        loaded.tokenizer.save_pretrained(dense)
    return {"dense": dense} | {f"shadowc {share}%": path for share, path in artifacts.items()}


def shadowc(*arguments: object) -> None:
    """Run a command in a process of its own."""
    subprocess.run([sys.executable, "-m", "shadowc", *map(str, arguments)], check=True)


def server(path: Path, cpus: str) -> AbstractContextManager[Ask]:
    """vLLM's server of a model."""
    return served(
        "vllm.entrypoints.openai.api_server", "--model", path, "--served-model-name", "it",
        "--no-enable-prefix-caching", "--max-model-len", 512, "--kv-cache-memory-bytes", "2G",
        environment={"VLLM_CPU_OMP_THREADS_BIND": cpus, "VLLM_NO_USAGE_STATS": "1"},
    )  # fmt: skip


def stream(ask: Ask, seed: int) -> list[float]:
    """When the new tokens of a random prompt came."""
    ids = torch.randint(5, 8000, (PROMPT,), generator=torch.Generator().manual_seed(seed))
    body = {"model": "it", "prompt": ids.tolist(), "max_tokens": NEW, "temperature": 0}
    return ask(body | {"ignore_eos": True})  # a chunk may hold several tokens


def measure(ask: Ask, batch: int) -> list[float]:
    """Milliseconds a token of each stream; the first turn is not counted."""
    found = []
    for turn in range(-1, TURNS):
        with ThreadPoolExecutor(batch) as pool:
            streams = list(pool.map(stream, [ask] * batch, range(batch)))
        if turn >= 0:
            found += [1e3 * (times[-1] - times[0]) / (NEW - 1) for times in streams]
    return found


def write(model: str, found: dict[tuple[str, int], list[float]], cpus: str) -> None:
    """The table, as Markdown and as JSON."""
    from vllm import __version__

    rows = [
        {"way": way, "batch": batch, "ms_per_token": statistics.median(times), "best": min(times)}
        for (way, batch), times in sorted(found.items(), key=lambda pair: pair[0][1])
    ]
    dense = {row["batch"]: row["ms_per_token"] for row in rows if row["way"] == "dense"}
    lines = ["| batch | server | ms a token | best | tokens/s, all streams | times dense |",
             "| ---: | --- | ---: | ---: | ---: | ---: |"]  # fmt: skip
    lines += [
        f"| {row['batch']} | {row['way']} | {row['ms_per_token']:.2f} | {row['best']:.2f} "
        f"| {1e3 * row['batch'] / row['ms_per_token']:.1f} "
        f"| {dense[row['batch']] / row['ms_per_token']:.2f} |"
        for row in rows
    ]
    where = device() | {"cpus": cpus, "model": model, "vllm": __version__}
    about = (
        f"{model} on {where['device']}, {where['isa']}, CPUs {cpus}, prompt {PROMPT}, {NEW} new "
        f"tokens; vllm {__version__}, "
        + ", ".join(f"{library} {number}" for library, number in versions().items())
    )
    page = "\n".join((f"# vLLM on a CPU: {model}", "", *lines, "", about, ""))
    name = f"vllm-{slug(model)}"
    (RESULTS / f"{name}.md").write_text(page)
    (RESULTS / f"{name}.json").write_text(json.dumps({"rows": rows, **where}, indent=1) + "\n")
    print(page)


if __name__ == "__main__":
    main()
