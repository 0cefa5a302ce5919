"""Decoding in ONNX Runtime on the GPU that is here: custom ops, dense, and the functions.

    python benchmarks/onnx_cuda.py                    opt-1.3b and opt-6.7b, minutes
    python benchmarks/onnx_cuda.py opt-1.3b --profile

Models are shapes with random weights, fp16, 50% of heads and neurons, masks of a predictor of rank
128 at every token. All variants decode the same tokens after the same prompt in one process, in
turns of eight tokens, each with its own cache on the GPU:

    custom ops, in place    as `shadowc run`: past and present share memory
    custom ops, growing     the library registered, the cache a new one at every token
    dense                   dense.onnx, plain operators, ONNX Runtime's own optimisations; growing
    functions               model.onnx without the library; growing

Times are medians of tokens, what Python takes to bind inputs included; ratios are to dense. With
--profile the operators of a few steps of each model are listed. The table goes to
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import gc
import json
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import safetensors.torch
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from gpu import meta_model, random_calibration, random_weights

from shadowc.compiler import build_programs
from shadowc.config import Policy
from shadowc.evaluation.bench import TURN, device
from shadowc.onnx import plan
from shadowc.onnx.names import MODEL
from shadowc.runtime.onnx import CUDA, OnnxCache, OnnxSession, open_model
from shadowc.runtime.session import Session
from shadowc.targets import load_target
from shadowc.trace import trace
from shadowc.versions import versions

MODELS = ("opt-1.3b", "opt-6.7b")
RESULTS = Path(__file__).parent / "results"
PROMPT, NEW, WARM_UP, RANK = 128, 128, 8, 128


def main() -> None:
    """Measure every model and write one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=MODELS)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--no-functions", action="store_true", help="where memory is short")
    options = parser.parse_args()
    major, minor = torch.cuda.get_device_capability()
    here = {k: v for k, v in plan.FAMILIES.items() if v == 10 * major + minor}
    plan.FAMILIES = here or plan.FAMILIES  # others would only be compiled
    rows = []
    for name in options.models:
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            session = made(name, Path(folder))
            print(f"{name}: made and loaded in {time.perf_counter() - began:.0f} s", flush=True)
            rows += measure(name, session, Path(folder), functions=not options.no_functions)
            del session
            gc.collect()
            if options.profile:
                profile(Path(folder))
        write(rows)


def made(name: str, folder: Path) -> OnnxSession:
    """The models of random weights, loaded."""
    target, policy = load_target("onnx-cuda"), Policy(0.5, 0.5)
    loaded = meta_model(name, torch.float16)
    traced = trace(loaded.model).module(check_guards=False)
    built = build_programs(
        traced, loaded, random_calibration(loaded.shape, RANK), policy, target, torch.float16
    )
    tensors = random_weights(built.packed, loaded.shape.hidden)
    tensors = {key: value.cpu() for key, value in tensors.items()}
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    session = Session(
        loaded.shape, policy, built.programs, tensors, {}, PROMPT + NEW, built.predictor_bytes
    )
    (folder / "config.json").write_text("{}")
    target.save(session, (1,), folder)
    session.dense_from_batch = 2
    return OnnxSession.of(session, folder, cuda=True)


@torch.inference_mode()
def measure(
    name: str, session: OnnxSession, folder: Path, *, functions: bool
) -> list[dict[str, Any]]:
    """One row a variant."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(5, session.shape.vocab, (1, PROMPT + NEW), generator=generator)
    variants: dict[str, Callable[[Tensor, OnnxCache], Any]] = {
        "custom ops, in place": lambda ids, cache: session.step(ids, cache),
        "custom ops, growing": growing(session, open_model(folder / MODEL, cuda=True)),
        "dense": lambda ids, cache: session.step(ids, cache, program="dense"),
    }
    if functions:
        opened = open_model(folder / MODEL, library=False, cuda=True)
        variants["functions"] = growing(session, opened)
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
    found = [
        {"model": name, "variant": title, "ms_per_token": value, "best_ms": 1e3 * min(times[title]),
         "beside_dense": value / ms["dense"], "prompt_ms": 1e3 * prompts[title]}
        for title, value in ms.items()
    ]  # fmt: skip
    for row in found:
        print(json.dumps(row), flush=True)
    return found


def growing(session: OnnxSession, opened: Any) -> Callable[[Tensor, OnnxCache], None]:
    """A step of a model whose cache grows."""

    def step(ids: Tensor, cache: OnnxCache) -> None:
        session.run_grown(opened, ids, cache)
        cache.length += ids.shape[1]

    return step


def seconds(run: Callable[[Tensor, OnnxCache], object], ids: Tensor, cache: OnnxCache) -> float:
    """How long a step takes; ONNX Runtime waits for the GPU."""
    began = time.perf_counter()
    run(ids, cache)
    return time.perf_counter() - began


def profile(folder: Path, steps: int = 8) -> None:
    """Where a step's time goes, as ONNX Runtime's profiler sees it: mostly launches."""
    import numpy as np

    from shadowc.onnx import library_path

    for file, library in ((MODEL, True), ("dense.onnx", False)):
        options = onnxruntime.SessionOptions()
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / file)
        if library:
            options.register_custom_ops_library(str(library_path()))
        model = onnxruntime.InferenceSession(
            str(folder / file), options, providers=[CUDA, "CPUExecutionProvider"]
        )
        past = {i.name: np.zeros((1, i.shape[1], PROMPT, i.shape[3]), np.float32)
                for i in model.get_inputs() if i.name.startswith("past")}  # fmt: skip
        inputs = past | {
            "input_ids": np.array([[7]]), "position_ids": np.array([[PROMPT]]),
            "attention_mask": np.ones((1, PROMPT + 1), np.int64),
        }  # fmt: skip
        for _ in range(steps):
            model.run(["logits"], inputs)
        events = json.loads(Path(model.end_profiling()).read_text())
        spent: dict[tuple[str, str], list[float]] = defaultdict(list)
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith("_kernel_time"):
                args = event["args"]
                key = args.get("op_name", "?"), args.get("provider", "?")
                spent[key].append(event["dur"])
        print(f"{file}: operator, provider, nodes a step, microseconds a step (host)")
        for (kind, provider), took in sorted(spent.items(), key=lambda item: -sum(item[1]))[:14]:
            print(f"  {kind:24} {provider:24} {len(took) / steps:6.0f} {sum(took) / steps:10.0f}")


def write(rows: list[dict[str, Any]]) -> None:
    """Print the table and write it with its hardware, versions and command."""
    where, known = device("cuda"), versions()
    lines = [
        "# Decoding in ONNX Runtime on a GPU", "",
        "| model | variant | ms a token | beside dense | fastest token | prompt, ms |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        *(
            f"| {row['model']} | {row['variant']} | {row['ms_per_token']:.2f} | "
            f"{row['beside_dense']:.2f} | {row['best_ms']:.2f} | {row['prompt_ms']:.0f} |"
            for row in rows
        ),
        "",
        f"Random weights in float16, 50% of heads and of neurons, batch 1, prompt {PROMPT}, {NEW} "
        "new tokens.",
        "",
        f"{where['device']}; " + ", ".join(f"{key} {value}" for key, value in known.items()) + ".",
        "",
        f"    {(command := shlex.join(['python', 'benchmarks/onnx_cuda.py', *sys.argv[1:]]))}", "",
    ]  # fmt: skip
    print("\n".join(lines), flush=True)
    stem = RESULTS / "onnx-cuda"
    stem.with_suffix(".md").write_text("\n".join(lines))
    result = {"command": command, "rows": rows, **where, "versions": known}
    stem.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
