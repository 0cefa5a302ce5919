"""One artifact of the trained model, made by the command line, and what `shadowc run` says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROMPTS = ("It was", "She said that the old house", "The captain", "When the morning came, they")


@pytest.fixture(scope="session")
def python():
    """Runs Python on something in a process of its own."""
    return run


def run(*arguments, cwd, check=True):
    """Run Python on something in a process of its own."""
    environment = {**os.environ, "PYTHONUTF8": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0 or not check, done.stderr
    return done


@pytest.fixture(scope="session")
def artifact(tmp_path_factory) -> Path:
    """Its directory."""
    home = tmp_path_factory.mktemp("serving")
    sizes = ("--examples", 16, "--seq-len", 64)
    run("-m", "shadowc", "calibrate", "opt-books-15m", *sizes, cwd=home)
    made = run("-m", "shadowc", "compile", "--sparsity", 0.5, "--json", cwd=home)
    return home / json.loads(made.stdout)["output"]


SAY = """
import sys
from shadowc.cli import app
path, *prompts = sys.argv[1:]
for prompt in prompts:
    arguments = ["run", path, "--prompt", prompt, "--max-new-tokens", "48", "--json"]
    app(arguments, standalone_mode=False)
"""


@pytest.fixture(scope="session")
def greedy(artifact) -> dict[str, str]:
    """Prompt -> what `shadowc run` makes of it, 48 tokens; all in one process, to save time."""
    lines = run("-c", SAY, artifact, *PROMPTS, cwd=artifact).stdout.splitlines()
    return {p: json.loads(line)["text"] for p, line in zip(PROMPTS, lines, strict=True)}
