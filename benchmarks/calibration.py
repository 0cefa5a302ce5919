"""What calibration costs: seconds, device memory, disk, and the share of the GPU's peak.

    python benchmarks/calibration.py opt-13b:3400 opt-13b:3400:2     # MODEL:EXAMPLES[:GPUS]

Each row is `shadowc calibrate random:MODEL --criterion plainact --examples N` (256 tokens each, of
Python's standard library, one byte a token) in a process of its own. Seconds are those that it
reports, without loading the model; the whole command's stand beside them. A forward and a backward
through frozen weights are 4 x parameters x tokens FLOPs: the share is of those, though the seconds
hold all else too (the criterion's scores and sums, the fit, held-out measures, writing).
Rows go to benchmarks/results/calibration.json and make benchmarks/calibration.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from shadowc.models import FAMILIES, known_config
from shadowc.versions import versions

ROOT = Path(__file__).parent
TOKENS = 256
#: Dense bf16 FLOPs a second, by the vendor's data sheets.
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}


def main() -> None:
    """Measure rows and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("rows", nargs="*", metavar="MODEL:EXAMPLES[:GPUS]")
    parser.add_argument("--results", type=Path, default=ROOT / "results" / "calibration.json")
    options = parser.parse_args()
    for row in options.rows:
        model, examples, *gpus = row.split(":")
        found = measure(model, int(examples), int(gpus[0]) if gpus else 1)
        rows = _rows(options.results)
        rows[row] = found
        options.results.write_text(json.dumps(rows, indent=2) + "\n")
        print(line(found), flush=True)
    page = ROOT / "calibration.md"
    if options.results.parent == ROOT / "results":
        page.write_text(text(_rows(options.results)))


def measure(model: str, examples: int, gpus: int) -> dict[str, Any]:
    """Run one calibration in a process of its own."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        words = "".join(source.read_text(errors="ignore") for source in sources)
        (folder / "text.txt").write_text(words[: examples * TOKENS * 2])
        command = [
            sys.executable, "-m", "shadowc", "calibrate", f"random:{model}",
            "--criterion", "plainact", "--data", str(folder / "text.txt"),
            "--examples", str(examples), "--seq-len", str(TOKENS), "--nproc", str(gpus),
            "--output", str(folder / "found"), "--json",
        ]  # fmt: skip
        disk = Disk(folder)
        start = time.monotonic()
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        wall = time.monotonic() - start
        result = json.loads(done.stdout)
        return {
            "model": model,
            "examples": examples,
            "gpus": gpus,
            "seconds": result["seconds"],
            "wall_seconds": round(wall, 1),
            "peak_memory_bytes": result["peak_memory_bytes"],
            "disk_bytes": disk.stop(),
            "flops": 4 * parameters(model) * examples * TOKENS,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
            "versions": versions(),
        }


class Disk:
    """The most that a folder's files take, watched in a thread."""

    def __init__(self, folder: Path) -> None:
        """Begin to watch."""
        self._folder, self._most, self._ended = folder, 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def stop(self) -> int:
        """The bytes."""
        self._ended.set()
        self._thread.join()
        return self._most

    def _watch(self) -> None:
        while not self._ended.wait(0.2):
            total = 0
            for path in self._folder.rglob("*"):
                try:
                    total += path.stat().st_size if path.is_file() else 0
                except FileNotFoundError:  # renamed meanwhile
                    continue
            self._most = max(self._most, total)


def parameters(model: str) -> int:
    """Of an alias, those that are read twice counted once."""
    config = known_config(model)
    with torch.device("meta"):
        return int(sum(one.numel() for one in FAMILIES[config.model_type][1](config).parameters()))


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    peak = next((value for name, value in PEAKS.items() if name in row["device"]), None)
    share = f"{row['flops'] / row['seconds'] / row['gpus'] / peak:.0%}" if peak else ""
    cells = [
        row["model"], f"{row['examples']:,}", str(row["gpus"]), f"{row['seconds']:.0f}",
        f"{row['wall_seconds']:.0f}", f"{row['peak_memory_bytes'] / 1e9:.1f}",
        f"{row['disk_bytes'] / 1e9:.2f}", share,
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def text(rows: dict[str, dict[str, Any]]) -> str:
    """The page."""
    columns = (
        "shapes of", "examples", "GPUs", "seconds", "with loading", "GB a GPU", "GB on disk",
        "of bf16 peak",
    )  # fmt: skip
    first = next(iter(rows.values()))
    lines = [
        "# What calibration costs",
        "",
        f"`python benchmarks/calibration.py {' '.join(rows)}` on {first['device']} "
        f"(torch {first['versions']['torch']}): random weights in bf16, criterion plainact, "
        "predictor layerwise, examples of 256 tokens. What is measured: "
        "`benchmarks/calibration.py`.",
        "",
        "| " + " | ".join(columns) + " |",
        "| --- |" + " ---: |" * (len(columns) - 1),
        *(line(row) for row in rows.values()),
    ]
    ratios = [
        f"{row['model']}, {row['examples']:,} examples: {row['gpus']} GPUs are "
        f"{one['seconds'] / row['seconds']:.2f} times as fast as one."
        for row in rows.values()
        if row["gpus"] > 1 and (one := rows.get(f"{row['model']}:{row['examples']}"))
    ]
    return "\n".join([*lines, "", *ratios]).rstrip() + "\n"


def _rows(path: Path) -> dict[str, dict[str, Any]]:
    return json.loads(path.read_text()) if path.exists() else {}


if __name__ == "__main__":
    main()
