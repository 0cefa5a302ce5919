"""Kill -9 at random moments: nothing is lost but the last batches, and nothing is corrupt."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shadowc.calibration.store import JSON_FILE, TENSOR_FILE

KILLS = int(os.environ.get("KILLS", "6"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="it forks")
def test_what_is_killed_again_and_again_ends_with_the_same_bytes(tmp_path, capsys):
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("killed.py")), str(tmp_path), str(KILLS)],
        capture_output=True,
        text=True,
        env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    with capsys.disabled():
        print(f"\n{found}")
    assert found["kills"] >= KILLS and max(found["after"]) >= (2 if KILLS >= 20 else 1)
    # Of batches of one example: those of a state that is being written, and those since.
    assert max(found["lost"]) <= 2 * 2 + 1
    for number in range(found["finished"]):
        for criterion in ("plainact", "random"):
            whole, other = (tmp_path / name / criterion for name in ("whole", f"killed-{number}"))
            assert (whole / TENSOR_FILE).read_bytes() == (other / TENSOR_FILE).read_bytes()
            facts = [json.loads((one / JSON_FILE).read_text()) for one in (whole, other)]
            for one in facts:
                one["metrics"].pop("seconds")
            assert facts[0] == facts[1]
    assert {path.name for path in tmp_path.iterdir()} == {
        "whole", *(f"killed-{number}" for number in range(found["finished"]))
    }  # fmt: skip


def test_the_command_goes_on_where_it_was_killed(tmp_path):
    command = [
        sys.executable, "-m", "shadowc", "calibrate", "opt-books-15m", "--examples", "24",
        "--seq-len", "64", "--batch-tokens", "64", "--output", "found", "--json",
    ]  # fmt: skip
    state = tmp_path / ".found.unfinished"
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as first:
        deadline = time.monotonic() + 120
        while not state.exists() and time.monotonic() < deadline:
            time.sleep(0.01)
        first.send_signal(signal.SIGKILL)
    assert state.exists()
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "going on with the calibration" in again.stderr
    events = [json.loads(line) for line in again.stderr.splitlines() if line.startswith("{")]
    assert events[0]["examples"] >= 16 and events[-1]["examples"] == 24
    assert json.loads(again.stdout)["examples"] == 24
    assert [path.name for path in tmp_path.iterdir()] == ["found"]
