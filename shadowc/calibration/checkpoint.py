"""The state of an unfinished calibration, in one file beside what it will become.

A file is replaced whole or not at all, so what is there is always the state after some batch. It
names what it depends on, and only goes on with the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shadowc.directory import check_fingerprint
from shadowc.errors import CalibrationError

#: Batches between two states that are written.
EVERY = 16


class Checkpoint:
    """Writes and reads the state of a calibration.

    Args:
        path: The file.
        about: What the state depends on, as plain JSON values.
        fresh: Forget what is there.

    Raises:
        CalibrationError: If what is there depends on something else, or cannot be read.
    """

    def __init__(self, path: Path, about: Mapping[str, Any], *, fresh: bool = False) -> None:
        """Read what is there."""
        self.path = path
        self.about = json.loads(json.dumps(about))
        #: Batches that are done, and the tensors after them.
        self.done, self.tensors = 0, dict[str, Tensor]()
        if fresh:
            path.unlink(missing_ok=True)
        if path.exists():
            self._read()

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

    def due(self, done: int) -> bool:
        """Whether to save after so many batches."""
        return done % EVERY == 0

    def save(self, done: int, tensors: Mapping[str, Tensor]) -> None:
        """Write the state after `done` batches.

        Raises:
            CalibrationError: If it cannot be written.
        """
        header = json.dumps({"about": self.about, "done": done})
        new = self.path.with_name(f"{self.path.name}.tmp")
        whole = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            safetensors.torch.save_file(whole, new, {"calibration": header})
            with new.open("rb") as file:
                os.fsync(file.fileno())
            new.replace(self.path)
        except (OSError, SafetensorError) as error:
            new.unlink(missing_ok=True)
            raise CalibrationError(
                f"cannot write {self.path}",
                expected="a writable place with enough free space",
                got=error,
                fix="free some space or choose another place with --output",
            ) from error
