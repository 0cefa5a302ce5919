"""The demo and the reproduction of the paper; tests/serving, vllm and test_cpp run the others."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

from shadowc.calibration.criteria import CRITERIA
from shadowc.errors import OptionError
from shadowc.evaluation.bench import device

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def load_example(name):
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


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


@pytest.fixture
def reproduce(tiny_opt, tmp_path, monkeypatch):
    """Run the protocol with tiny samples of a tiny model and of one task; returns the example."""
    example = load_example("reproduce_paper")
    monkeypatch.setattr(example, "load_model", lambda name: tiny_opt.loaded)
    for letter, table in example.TABLES.items():  # a row takes half a second
        some = table.rows[: 7 if letter == "e" else 4]
        monkeypatch.setitem(example.TABLES, letter, table._replace(rows=some))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    question = {"choice1": "It rained.", "choice2": "He sang.", "question": "cause"}
    rows = [question | {"premise": f"Number {i} was wet.", "label": i % 2} for i in range(12)]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "copa.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["", "tiny", "--quick", *arguments])
        example.main()
        (model,) = json.loads((tmp_path / "paper" / "paper.json").read_text())["models"]
        return model, (tmp_path / "paper" / "paper.md").read_text()

    example.run = run
    return example


def test_every_criterion_is_in_the_papers_tables():
    rows = load_example("reproduce_paper").TABLES["a"].rows
    assert [row.criterion for row in rows[1:]] == list(CRITERIA)
    assert {row.predictor for row in rows[1:]} == {"static"}


def test_the_papers_tables_are_measured_once(reproduce, monkeypatch):
    model, page = reproduce.run("--tasks", "tasks")
    tables = {
        letter: {row["label"]: row for row in rows} for letter, rows in model["tables"].items()
    }
    for letter, table in reproduce.TABLES.items():
        assert f"### {letter}. {table.title}" in page
        assert list(tables[letter]) == [choice.label for choice in table.rows]
        assert all(f"| {label} | " in page for label in tables[letter])
    assert model["questions"] == {"copa": 3} and len(model["not_run"]) == 6
    assert "Not run: piqa (ybisk/piqa) cannot be fetched" in page
    for rows in tables.values():
        assert rows["dense"]["head_sparsity"] == rows["dense"]["neuron_sparsity"] == 0.0
        assert set(rows["dense"]["tasks"]) == {"copa"}
    half = [tables["b"]["shadow, plainact"], tables["c"]["global"], tables["d"]["text"],
            tables["e"]["50%: shadow, plainact, global"]]  # fmt: skip
    assert len({row["perplexity"] for row in half}) == 1  # the same row in four tables
    others = [tables["c"]["local"], tables["d"]["zero-shot"], tables["d"]["five-shot"],
              tables["a"]["plainact"], tables["e"]["50%: DejaVu-style"]]  # fmt: skip
    assert len({row["perplexity"] for row in half + others}) == 1 + len(others)
    for row in half + others:
        assert row["head_sparsity"] == 0.5 and row["neuron_sparsity"] == pytest.approx(
            0.5, abs=0.01
        )
    zero, five = (tables["d"][prompts]["calibration_tokens"] for prompts in reproduce.SHOTS)
    assert 0 < zero < five
    assert -1 < tables["b"]["shadow, l2norm"]["spearman_heads"] < 1

    for name in ("calibrate", "evaluate"):
        monkeypatch.setattr(reproduce, name, None)
    assert reproduce.run("--tasks", "tasks") == (model, page)
    with pytest.raises(OptionError, match=r"rows.jsonl was \w+ with another questions"):
        reproduce.run()


def test_the_paper_without_any_task(reproduce):
    model, page = reproduce.run("--tables", "d")
    assert [row["label"] for row in model["tables"]["d"]] == ["dense", "text"]
    assert len(model["not_run"]) == 7 and "copa |" not in page
    with pytest.raises(OptionError, match="tasks/none holds no task"):
        reproduce.run("--tasks", "tasks/none")
