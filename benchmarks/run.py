"""Speed and quality of real artifacts, made and measured with the command line.

    python benchmarks/run.py                                    everything, about an hour
    python benchmarks/run.py speed random:opt-1.3b
    python benchmarks/run.py quality opt-books-15m --text books.txt --tokens 16384

Each table goes to benchmarks/results/ as .md and .json, with the hardware and the command. Run it
on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from shadowc.models import slug

SPEED = ("random:opt-1.3b", "opt-books-15m", "smollm2-135m")
QUALITY = ("opt-books-15m", "smollm2-135m")
CRITERIA = ("plainact", "sens")
BUDGETS = {
    "30% of units": ("--sparsity", 0.3),
    "50% of units": ("--sparsity", 0.5),
    "50% of bytes": ("--sparsity", 0.5, "--budget", "bytes"),
    "75% of neurons": ("--neuron-sparsity", 0.75),
}
VARIANTS = {
    "artifact, 50%": "ms_per_token",
    "exact": "exact_ms_per_token",
    "dense, same runtime": "dense_ms_per_token",
    "Hugging Face eager": "hugging_face_ms_per_token",
    "Hugging Face eager, fp32": "hugging_face_fp32_ms_per_token",
}
RESULTS = Path(__file__).parent / "results"

Result = dict[str, Any]


def main() -> None:
    """Run what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="?", choices=("speed", "quality"))
    parser.add_argument("model", nargs="?")
    parser.add_argument("--text", default="pydoc", help="to evaluate on")
    parser.add_argument("--tokens", type=int, default=8192, help="to score")
    parser.add_argument("--examples", type=int, default=32, help="to calibrate on")
    parser.add_argument("--work", type=Path, default=Path("artifacts/benchmarks"))
    options = parser.parse_args()
    for what, models, measure in (("speed", SPEED, speed), ("quality", QUALITY, quality)):
        if options.what in (None, what):
            for model in (options.model,) if options.model else models:
                measure(model, options)


def speed(model: str, options: argparse.Namespace) -> None:
    """Decode at 50% beside exact, dense and Hugging Face eager."""
    few = ("--examples", 4, "--seq-len", 64) if model.startswith("random:") else ()
    calibration = options.work / f"{slug(model)}-speed"
    artifact = options.work / f"{slug(model)}-s50"
    shadowc("calibrate", model, *few, "--output", calibration)
    shadowc("compile", calibration, "--sparsity", 0.5, "--output", artifact)
    found = shadowc("bench", artifact)
    dense = found["dense_ms_per_token"]
    lines = ["| decode | ms a token | beside dense |", "| --- | ---: | ---: |"]
    lines += [
        f"| {name} | {found[key]:.2f} | {found[key] / dense:.2f} |"
        for name, key in VARIANTS.items()
        if found[key] is not None
    ]
    memory, weights = found["peak_memory_above_start_bytes"], found["weights_bytes"]
    lines += [
        "",
        f"Weights read a token: {found['bytes_per_token'] / 1e6:.1f} MB, dense "
        f"{found['dense_bytes_per_token'] / 1e6:.1f} MB, at {found['bandwidth_share']:.0%} and "
        f"{found['dense_bandwidth_share']:.0%} of {found['read_bandwidth'] / 1e9:.1f} GB/s.",
        f"Predictor and selection: {found['selection_ms']:.3f} ms, "
        f"{found['selection_share_of_dense']:.1%} of a dense step.",
        f"Peak memory, over that of the process before loading: {memory / 1e6:.0f} MB, "
        f"{memory / weights:.2f} of the weights.",
        f"Did not run: {found['head_sparsity']:.1%} of the heads, "
        f"{found['neuron_sparsity']:.1%} of the neurons.",
    ]
    if found["random_weights"]:
        lines.append("Random weights: this is about speed only.")
    write(f"speed-{slug(model)}", f"Speed: {model}", lines, found, found)


def quality(model: str, options: argparse.Namespace) -> None:
    """Perplexity of every criterion and budget beside dense, static, random and the oracle."""
    head = "| criterion | budget | heads | neurons | bytes not read | dense | shadow | static | "
    lines = [head + "random | oracle |", "| --- | --- |" + " ---: |" * 8]
    rows: list[Result] = []
    for criterion in CRITERIA:
        calibration = options.work / f"{slug(model)}-{criterion}"
        shadowc("calibrate", model, "--criterion", criterion, "--examples", options.examples,
                "--output", calibration)  # fmt: skip
        for budget, arguments in BUDGETS.items():
            artifact = options.work / f"{slug(model)}-{criterion}-quality"
            compiled = shadowc("compile", calibration, *arguments, "--output", artifact)
            found = shadowc("eval", artifact, "--data", options.text, "--tokens", options.tokens,
                            "--against", "dense,static,random,oracle")  # fmt: skip
            rows.append({"criterion": criterion, "budget": budget, "compile": compiled, **found})
            names = ("dense", "artifact", "static", "random", "oracle")
            scores = [found["variants"][name]["perplexity"] for name in names]
            lines.append(
                f"| {criterion} | {budget} | {found['head_sparsity']:.0%} | "
                f"{found['neuron_sparsity']:.0%} | {compiled['weight_bytes_skipped']:.0%} | "
                + " | ".join(f"{score:.5g}" for score in scores)
                + " |"
            )
            print(lines[-1], flush=True)
    text = Path(options.text).stem
    lines += ["", f"{rows[0]['tokens']} tokens of {text}, windows of {rows[0]['seq_len']}."]
    machine = shadowc("bench", artifact, "--new-tokens", 16, "--no-hugging-face")
    write(f"quality-{slug(model)}-{text}", f"Quality: {model}", lines, {"rows": rows}, machine)


def shadowc(*arguments: object) -> Result:
    """Run a command in a process of its own and read what it prints."""
    command = [str(argument) for argument in arguments]
    print("shadowc", shlex.join(command), file=sys.stderr, flush=True)
    done = subprocess.run(
        [sys.executable, "-m", "shadowc", *command, "--json"], stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    result: Result = json.loads(done.stdout)
    return result


def write(name: str, title: str, lines: list[str], data: Result, machine: Result) -> None:
    """Print a table and write it with its hardware, versions and command."""
    versions = ", ".join(f"{key} {value}" for key, value in machine["versions"].items())
    command = shlex.join(["python", "benchmarks/run.py", *sys.argv[1:]])
    hardware = (
        f"{machine['device']}, {machine['isa']}, {machine['threads']} threads, batch 1, "
        f"{machine['dtype']}; {versions}."
    )
    page = "\n".join([f"# {title}", "", *lines, "", hardware, "", f"    {command}", ""])
    print(page)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(page)
    result = {"command": command, **data, "device": machine["device"]}
    (RESULTS / f"{name}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
