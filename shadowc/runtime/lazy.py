"""Lazy keys and values: what a row remembers of its last tokens, and who fills the cache.

A lazy program leaves keys and values of skipped heads to later (see the op `lazy_qkv`); every
other program expects a complete cache. So when a cache changes from one kind to the other, the
state is told how far the cache is complete, or the cache is completed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowc.config import ModelShape
from shadowc.kernels.lazy_qkv import WINDOW
from shadowc.runtime.program import Program

#: Programs whose keys and values wait, by those that they stand in for where a batch is one row.
LAZY = {"decode": "lazy", "hold": "lazy_hold"}

#: The program that computes whatever waits.
CATCH_UP = "catch_up"


class LazyState:
    """What the lazy programs of one row remember.

    Attributes:
        tensors: By the names of the programs' inputs.
        waits: Whether the cache may lack keys and values, so that `tensors` matter.
    """

    def __init__(
        self, program: Program, shape: ModelShape, dtype: torch.dtype, device: torch.device | str
    ) -> None:
        sizes = {
            "window": ((WINDOW, shape.hidden), dtype),
            "moments": ((WINDOW, 2), torch.float32),
            "filled": ((2, shape.kv_heads), torch.int32),
            "turns": ((2, WINDOW, shape.head_dim), torch.float32),
        }
        self.tensors: dict[str, Tensor] = {}
        for name in program.inputs:
            kind = name.partition("_")[0]
            if kind in sizes:
                size, of = sizes[kind]
                self.tensors[name] = torch.zeros(size, dtype=of, device=device)
        self.waits = False

    def begin(self, length: int) -> None:
        """Note that the cache is complete up to `length` tokens."""
        for name, tensor in self.tensors.items():
            if name.startswith("filled"):
                tensor.fill_(length)
