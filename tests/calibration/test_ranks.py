"""Several processes, as torchrun starts them: the same predictor, and errors that end them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from shadowc.calibration.store import load_calibration

#: Sums of fp32 in another order, and what the fit makes of them: of a value's standard deviation.
BOUND = 1e-3


def calibrate(folder, name, processes, *more, model="opt-books-15m"):
    command = [
        sys.executable, "-m", "shadowc", "calibrate", model, "--criterion", "sens",
        "--examples", "12", "--seq-len", "24", "--batch-tokens", "24", "--rank", "8",
        "--nproc", str(processes), "--output", name, "--json", *more,
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=environment, timeout=300
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("ranks")
    done = calibrate(path, "one", 1)
    assert done.returncode == 0, done.stderr
    return path


def test_several_processes_find_what_one_finds(folder):
    name = "of-3"
    done = calibrate(folder, name, 3)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # of one process alone
    assert result["output"] == name and result["examples"] == 12
    one, other = load_calibration(folder / "one"), load_calibration(folder / name)
    assert one.tokens == other.tokens
    for field in ("mean_head_scores", "mean_neuron_scores", "zero_rate", "head_damage"):
        x, y = getattr(one, field), getattr(other, field)
        assert (x - y).abs().max() <= BOUND * x.std(), field
    feature = torch.randn(1, 9, one.shape.hidden, generator=torch.Generator().manual_seed(0))
    for mine, theirs in zip(one.build_predictors(), other.build_predictors(), strict=True):
        for x, y in zip(mine(feature), theirs(feature), strict=True):
            if x.numel():  # the last layer's tap scores no heads
                assert (x - y).abs().max() <= BOUND * x.std()
    for key, value in one.metrics.items():
        if isinstance(value, float) and key != "seconds":
            assert other.metrics[key] == pytest.approx(value, abs=0.01), key
    assert not list(folder.glob(".*"))


def test_an_error_of_several_processes_is_one_message(folder):
    done = calibrate(folder, "never", 2, model="no-such-model")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("unknown model") == 1 and "Traceback" not in done.stderr


def test_an_error_of_one_process_ends_the_others(folder):
    """Only the first reads the state: the others wait for it."""
    state = folder / ".foreign.unfinished"
    state.write_bytes(b"nothing")
    done = calibrate(folder, "foreign", 2)
    assert done.returncode == 2 and "is damaged" in done.stderr
    assert "Traceback" not in done.stderr
    state.unlink()


def test_no_processes(folder):
    done = calibrate(folder, "never", 0)
    assert done.returncode == 2 and "--nproc" in done.stderr
