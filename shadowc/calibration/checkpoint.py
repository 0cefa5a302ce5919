"""The state of an unfinished pass of a calibration, in one file beside what it will become.

A file is replaced whole or not at all, so what is there is always the state after some batch. It
names what it depends on, and only goes on with the same.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shadowc.directory import check_fingerprint
from shadowc.errors import CalibrationError
from shadowc.stored import Stored, save_file

#: Batches between two states that are written, at least; more where writing takes long: it may take
#: this share of the time.
EVERY = 16
SHARE = 0.05
_BYTES_A_SECOND = 1e9  # as long as it was not measured


def temporary(path: Path) -> Path:
    """The file that is written before it takes the place of a state."""
    return path.with_name(f"{path.name}.tmp")


class Checkpoint:
    """Writes and reads the state of a calibration.

    Args:
        path: The file.
        about: What the state depends on, as plain JSON values.

    Attributes:
        done: Examples whose state is on disk.

    Raises:
        CalibrationError: If what is there depends on something else, or cannot be read.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        """Read what is there."""
        self.path = path
        self.about = json.loads(json.dumps(about))
        self.done, self.tensors = 0, dict[str, Tensor]()
        self._batches, self._saved, self._rate = 0, time.monotonic(), _BYTES_A_SECOND
        self._writer: Thread | None = None
        self._failed: Exception | None = None
        if path.exists():
            self._read()

    def state(self, name: str, device: Callable[[int], torch.device]) -> dict[str, Tensor]:
        """What was saved of a part, each layer's on its device."""
        start = f"{name}/"
        return {
            key.removeprefix(start): value.to(device(int(key.rpartition(".")[2])))
            for key, value in self.tensors.items()
            if key.startswith(start)
        }

    def _read(self) -> None:
        try:
            with safe_open(self.path, "pt") as file:
                header = json.loads(file.metadata()["calibration"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}
            found, done = header["about"], int(header["done"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise CalibrationError(
                f"{self.path} is damaged", got=error, fix="--fresh to start over"
            ) from error
        check_fingerprint(found, self.about, self.path, error=CalibrationError)
        self.done, self.tensors = done, tensors

    def due(self, size: int, *, last: bool) -> bool:
        """Whether to save after one more batch a state of so many bytes."""
        self._batches += 1
        waited = time.monotonic() - self._saved >= size / self._rate / SHARE
        return waited and (last or self._batches >= EVERY)

    def save(self, done: int, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Write the state of each part after `done` examples, while the pass goes on.

        Raises:
            CalibrationError: If the one before could not be written.
        """
        self.written()
        self._batches, self._saved = 0, time.monotonic()
        whole = {
            f"{part}/{name}": Stored.of(value.detach().to("cpu", copy=True).contiguous())
            for part, state in states.items()
            for name, value in state.items()
        }
        self._writer = Thread(target=self._write, args=(done, whole))
        self._writer.start()

    def written(self) -> None:
        """Wait for what is being written.

        Raises:
            CalibrationError: If it cannot be.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failed is not None:
            raise CalibrationError(
                f"cannot write {self.path}",
                expected="a writable place with enough free space",
                got=self._failed,
                fix="free some space or choose another place with --output",
            ) from self._failed

    def _write(self, done: int, whole: dict[str, Stored]) -> None:
        header = json.dumps({"about": self.about, "done": done})
        new = temporary(self.path)
        start = time.monotonic()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(new, whole, {"calibration": header})
            with new.open("rb") as file:
                os.fsync(file.fileno())
            new.replace(self.path)
        except OSError as error:
            new.unlink(missing_ok=True)
            self._failed = error
            return
        self.done = done
        size = sum(value.nbytes for value in whole.values())
        self._rate = size / max(1e-6, time.monotonic() - start)
