"""The examples run as their docstrings say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shadowc.compiler import compile_model
from shadowc.config import Policy

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, *arguments, cwd):
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    environment = {**os.environ, "PYTHONUTF8": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_generate(tiny_opt, tmp_path):
    compile_model(tiny_opt.loaded, None, Policy(0.0, 0.0), tmp_path / "artifact")
    assert "It was" in run("generate.py", "artifact", "It was", cwd=tmp_path)


@pytest.mark.skipif("CI_SLOW" not in os.environ, reason="minutes: `make demo` runs it")
def test_demo(tmp_path):
    printed = run("demo.py", "--models", "opt-books-15m", "--scale", 0.1, cwd=tmp_path)
    for word in ("dense", "exact", "plainact, 50% of units", "sens, 50% of bytes", "random"):
        assert word in printed
    assert (tmp_path / "demo" / "results.json").is_file()
