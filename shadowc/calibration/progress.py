"""How far a calibration is: a bar on a terminal, lines elsewhere, JSON lines for tools."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

#: Seconds between two lines.
EVERY = {"lines": 10.0, "json": 1.0}


class Progress:
    """Shows nothing; what calibrate calls.

    Attributes:
        recall: Recall so far of the neurons that matter most, once held-out examples are measured.
    """

    def __init__(self) -> None:
        """Start the clock."""
        self.total = self.done = self.skipped = 0
        self.loss = self.recall = float("nan")
        self._losses = [0.0, 0]
        self._start = time.monotonic()

    def begin(self, total: int) -> None:
        """So many examples."""
        self.total, self.done, self.skipped = total, 0, 0
        self._start = time.monotonic()

    def skip(self, examples: int) -> None:
        """Some were done before."""
        self.done += examples
        self.skipped += examples
        self.show()

    def advance(self, examples: int, loss: float | None = None) -> None:
        """More examples are done; the last batch's loss."""
        self.done = min(self.total, self.done + examples)
        if loss is not None:
            self._losses[0] += loss
            self._losses[1] += 1
            self.loss = self._losses[0] / self._losses[1]
        self.show()

    @property
    def rate(self) -> float:
        """Examples a second."""
        return (self.done - self.skipped) / max(1e-9, time.monotonic() - self._start)

    @property
    def eta(self) -> float:
        """Seconds to go."""
        return (self.total - self.done) / max(1e-9, self.rate)

    def show(self) -> None:
        """Show it."""


class Lines(Progress):
    """Plain lines, or JSON objects, on stderr, every few seconds and at the end."""

    def __init__(self, style: str) -> None:
        """Take `lines` or `json`."""
        super().__init__()
        self._style, self._last = style, 0.0

    def show(self) -> None:
        """Print a line if it is time."""
        now = time.monotonic()
        if self.done < self.total and now - self._last < EVERY[self._style]:
            return
        self._last = now
        if self._style == "json":
            facts = {
                "event": "progress",
                "examples": self.done,
                "total": self.total,
                "examples_per_second": round(self.rate, 3),
                "eta_seconds": round(self.eta, 1) if self.rate else None,
                "peak_memory_bytes": peak_memory(),
                "loss": _known(self.loss),
                "recall": _known(self.recall),
            }
            print(json.dumps(facts), file=sys.stderr, flush=True)
        else:
            print(f"calibrating: {self.done} of {self.total} examples, {_text(self)}",
                  file=sys.stderr, flush=True)  # fmt: skip


class OnTerminal(Progress):
    """A bar."""

    def __init__(self, bar: Bar) -> None:
        """Take the bar to draw on."""
        super().__init__()
        self._bar, self._task = bar, bar.add_task("calibrating", total=1, facts="")

    def show(self) -> None:
        """Move the bar."""
        self._bar.update(self._task, total=self.total, completed=self.done, facts=_text(self))


@contextmanager
def showing(style: str) -> Iterator[Progress]:
    """Progress on stderr: `bar` (lines where that is no terminal), `json` or `none`."""
    console = Console(stderr=True)
    if style == "bar" and not console.is_terminal:
        style = "lines"
    if style == "none":
        yield Progress()
    elif style != "bar":
        yield Lines(style)
    else:
        columns = (
            TextColumn("calibrating"), BarColumn(),
            TextColumn("{task.completed}/{task.total} examples, {task.fields[facts]}"),
            TimeRemainingColumn(),
        )  # fmt: skip
        with Bar(*columns, console=console) as bar:
            yield OnTerminal(bar)


def peak_memory() -> int:
    """Bytes taken at most so far: of the GPUs, where torch uses some, or of the process."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _text(progress: Progress) -> str:
    facts = [f"{progress.rate:.1f}/s", f"{peak_memory() / 1e9:.1f} GB"]
    if (loss := _known(progress.loss)) is not None:
        facts.append(f"loss {loss:.3f}")
    if (recall := _known(progress.recall)) is not None:
        facts.append(f"recall {recall:.3f}")
    return ", ".join(facts)


def _known(value: float) -> float | None:
    return None if value != value else round(value, 4)
