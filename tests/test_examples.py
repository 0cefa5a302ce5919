"""The examples run as their docstrings say."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import torch

from shadowc.compiler import compile_model
from shadowc.config import Policy
from shadowc.evaluation.bench import device

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, *arguments, cwd):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_generate(tiny_opt, tmp_path):
    compile_model(tiny_opt.loaded, None, Policy(0.0, 0.0), tmp_path / "artifact")
    assert "It was" in run("generate.py", "artifact", "It was", cwd=tmp_path)


def test_demo_measures_every_budget_and_prints_one_table(tiny_opt, tmp_path, monkeypatch, capsys):
    """All of it but the subprocesses, on a tiny model: `make demo` takes minutes."""
    demo = load_example("demo")
    monkeypatch.setattr(demo, "SEQ_LEN", 32)
    monkeypatch.setattr(demo, "BYTES", 0.3)  # half is more than its predictor leaves
    model = demo.Model("tiny", torch.float32, examples=4, tokens=64)
    calibrations = [dataclasses.replace(tiny_opt.calibration, criterion=c) for c in demo.CRITERIA]
    rows = demo.measure(model, tiny_opt.loaded, calibrations)
    assert [(row["criterion"], row["budget"]) for row in rows] == [
        (criterion, budget)
        for criterion in ("plainact", "sens")
        for budget in ("30% of units", "50% of units", "30% of bytes")
    ]
    for row in rows:
        assert row["tokens"] == 2 * 30 and row["dense"] == rows[0]["dense"]
        assert row["dense"] not in (row["perplexity"], row["static"], row["random"])
    assert rows[2]["weight_bytes_skipped"] >= 0.3

    times = ("ms_per_token", "dense_ms_per_token", "exact_ms_per_token",
             "hugging_face_ms_per_token", "hugging_face_fp32_ms_per_token")  # fmt: skip
    speed = {name: 1.25 + index for index, name in enumerate(times)} | {"dtype": "float32"}
    result = {"rows": rows, "run": {"text": " late."}, "bench": speed}
    versions = {"torch": "1", "transformers": "2"}
    results = {"models": {"tiny": result}, "seconds": 1, **device(), "versions": versions}
    demo.print_table(results, tmp_path / "table.txt")
    printed = capsys.readouterr().out
    assert all(f"{speed[name]:.2f}" in printed for name in times)
    assert "It was late." in printed
