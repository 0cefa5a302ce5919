"""The processes that share a calibration, one a GPU, as `torchrun` starts them.

Batches are dealt out in turn, so that each is the same whoever takes it; only the order in which
sums are added depends on how many there are.
"""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from shadowc.calibration.ridge import Tables
from shadowc.errors import ShadowcError

_T = TypeVar("_T")


class Ranks:
    """The processes; by default there is one.

    Attributes:
        rank: This process.
        size: Processes in all.
    """

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        """Name them."""
        self.rank, self.size = rank, size

    def said(self, value: _T) -> _T:
        """What the first says."""
        if self.size == 1:
            return value
        said = [value]
        dist.broadcast_object_list(said)
        return said[0]

    def share(self, part: Tables) -> None:
        """Give every process what the first one's sums are made with."""
        if self.size == 1:
            return
        own = part.made() if not self.rank else {}
        about = [(k, v.shape, v.dtype, v.device.type) for k, v in own.items()]
        made = {}
        for key, shape, dtype, kind in self.said(about):
            value = own[key] if not self.rank else torch.empty(shape, dtype=dtype, device=kind)
            dist.broadcast(value, 0)
            made[key] = value
        part.load_state(part.sums() | made)

    def add_up(self, parts: Sequence[Tables], *, to_first: bool = False) -> None:
        """Give every process the sums of all.

        Args:
            parts: The same of every process; a table that one lacks is nothing.
            to_first: Leave the others with nothing.
        """
        if self.size == 1:
            return
        for part in parts:
            own = part.sums()
            about: list[Any] = [None] * self.size
            mine = {k: (tuple(v.shape), v.dtype, v.device.type) for k, v in own.items()}
            dist.all_gather_object(about, mine)
            known = {key: one for each in about for key, one in each.items()}
            state = part.state()
            for key, (shape, dtype, kind) in sorted(known.items()):
                value = own.get(key)
                if value is None:
                    value = torch.zeros(shape, dtype=dtype, device=kind)
                state[key] = value = value.contiguous()
                dist.all_reduce(value)
                if to_first and self.rank:
                    value.zero_()
            part.load_state(state)


def launched() -> tuple[int, int, int]:
    """Rank, size and local rank as `torchrun` or `accelerate launch` says; 0, 1, 0 without them."""
    names = ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")
    rank, size, local = (int(os.environ.get(*name)) for name in names)
    return rank, size, local


@contextmanager
def joined() -> Iterator[Ranks]:
    """Join the processes that this one was launched with, if any.

    One that fails says so and ends at once, since the others may wait for it; the launcher ends
    them.
    """
    rank, size, local = launched()
    if size == 1:
        yield Ranks()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield Ranks(rank, size)
    except BaseException as error:
        who = f" of process {rank}" if rank else ""
        if isinstance(error, ShadowcError):
            print(f"error{who}: {error}", file=sys.stderr)
        elif isinstance(error, dist.DistError) or "gloo" in str(error):
            print(f"process {rank} ends: another one does not answer", file=sys.stderr)
        else:
            print(f"error{who}: {traceback.format_exc()}", file=sys.stderr)
        sys.stderr.flush()
        os._exit(getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1))
    dist.destroy_process_group()


def launch(processes: int, arguments: Sequence[str]) -> int:
    """Run `shadowc` with these arguments as so many processes, as `torchrun` does.

    Returns:
        The exit code: 0, or that of a process that failed by itself.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Its own reports of a failure repeat what the process said.
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=str(os.getpid()),
        max_restarts=0,
        monitor_interval=0.1,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "shadowc", *arguments)
    except ChildFailedError as error:
        # Those that end because another did have 1, or the negative number of a signal.
        return max(1, *(failure.exitcode for failure in error.failures.values()))
    return 0
