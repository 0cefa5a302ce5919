"""Calibrates in processes that are killed at random moments; `test_killed.py` runs it.

    python killed.py FOLDER KILLS

The model is loaded once and every process is a fork: so many kills would take minutes otherwise.
"""

import json
import mmap
import os
import random
import signal
import struct
import sys
import time
from pathlib import Path

import torch

from shadowc.calibration import checkpoint
from shadowc.calibration.data import Example
from shadowc.calibration.fit import FitOptions, calibrate, forget, unfinished
from shadowc.calibration.progress import Progress
from shadowc.calibration.store import save_calibration
from shadowc.models import load_model

EVERY = 2  # batches of one example


class Counted(Progress):
    """Leaves the number of examples that are done where the other process sees it."""

    def __init__(self, memory):
        super().__init__()
        self.memory = memory

    def show(self):
        self.memory[:8] = struct.pack("q", self.done)


def on_disk(state: Path) -> int:
    """Examples whose state is on disk."""
    return sum(
        checkpoint.Checkpoint(path, json.loads(_header(path))["about"]).done
        for path in unfinished(state)
        if path.exists()
    )


def _header(path: Path) -> str:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.metadata()["calibration"]


def main() -> None:
    torch.set_num_threads(1)  # threads do not survive a fork
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    checkpoint.EVERY, checkpoint.SHARE = EVERY, 1e9
    loaded = load_model("opt-books-15m")
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(5, 8192, (16, 24), generator=generator).tolist()
    examples = [Example(row, [True] * len(row)) for row in rows]
    options = FitOptions(("plainact", "random"), rank=8, batch_tokens=24)
    memory = mmap.mmap(-1, 8)

    def start(target: Path) -> int:
        if pid := os.fork():
            return pid
        state = target.with_name(f".{target.name}.unfinished")
        found = calibrate(loaded, examples, options, progress=Counted(memory), checkpoint=state)
        for one in found:
            save_calibration(one, target / one.criterion)
        forget(state)
        os._exit(0)

    before = time.monotonic()
    assert os.waitpid(start(folder / "whole"), 0)[1] == 0
    whole = time.monotonic() - before
    draw, killed, finished, lost, after = random.Random(0), 0, 0, [], []
    while killed < kills:
        target = folder / f"killed-{finished}"
        state = target.with_name(f".{target.name}.unfinished")
        times = 0
        while True:
            had = on_disk(state)
            memory[:8] = struct.pack("q", had)
            pid = start(target)
            time.sleep(draw.uniform(0.05, 1.0) * whole)
            os.kill(pid, signal.SIGKILL)
            if os.waitpid(pid, 0)[1] == 0:  # it had ended before
                break
            killed, times = killed + 1, times + 1
            if (target / "random").exists():  # nothing but its state was left to be removed
                continue
            kept = on_disk(state)
            assert kept >= had, (kept, had)
            lost.append(struct.unpack("q", memory[:8])[0] - kept)
        finished += 1
        after.append(times)
    print(json.dumps({"kills": killed, "finished": finished, "after": after, "lost": lost}))


if __name__ == "__main__":
    main()
