"""A session on a GPU: decode steps are CUDA graphs over a static cache, prompts run op by op.

A step is one graph launch: token, position, keep sets and cache have fixed addresses, and nothing
in it waits for the host. So caches are memory that a session owns and lends to one batch after the
other, with the graphs that were captured over it.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shadowc import cuda
from shadowc.config import ModelShape
from shadowc.errors import LengthError
from shadowc.runtime.cache import KVCache
from shadowc.runtime.lazy import LAZY, LazyState
from shadowc.runtime.program import Program
from shadowc.runtime.session import KEEP_PREFIXES, Session, one_at_a_time

#: Programs that are made for one token.
STEPS = ("decode", "hold", "exact", "full", *LAZY.values())
_WARM_UPS = 2
_log = logging.getLogger(__name__)


class Memory:
    """What the graphs of one batch size read and write, and the graphs themselves.

    Attributes:
        tensors: Key and value caches of the layers, [rows, G, S, D] in the type of the weights.
        ids: int64 [rows, 1], the token of the next step.
        start: int64 [rows], first slot of each row that is not padding.
        position: int64 [1], slot of the next token.
        keep: Keep sets of the last step, by the names that programs give them.
        lazy: What lazy programs remember, if the artifact has any for one row and this is one.
        graphs: For each program the captured graph and its results.
    """

    def __init__(
        self, shape: ModelShape, rows: int, slots: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        size = (rows, shape.kv_heads, slots, shape.head_dim)
        self.rows, self.slots = rows, slots
        self.tensors = [
            torch.zeros(size, dtype=dtype, device=device) for _ in range(2 * shape.layers)
        ]
        self.ids = torch.zeros(rows, 1, dtype=torch.int64, device=device)
        self.start = torch.zeros(rows, dtype=torch.int64, device=device)
        self.position = torch.zeros(1, dtype=torch.int64, device=device)
        self.keep: dict[str, Tensor] = {}
        self.lazy: LazyState | None = None
        self.graphs: dict[str, tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]] = {}


class CudaCache(KVCache):
    """The cache of a batch, in memory that its session lends it."""

    def __init__(self, memory: Memory, batch: int, capacity: int) -> None:
        self.memory, self.batch, self.capacity = memory, batch, capacity
        self.tensors = [t[:batch] for t in memory.tensors]
        self.length, self.steps = 0, 0
        self.start = torch.zeros(batch, dtype=torch.int64, device=memory.start.device)
        self.keep: dict[str, Tensor] = {}
        self.lazy = memory.lazy
        if self.lazy is not None:
            self.lazy.waits = False  # what it remembers was another batch's

    @torch.inference_mode()
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i the past of row `beam_idx[i]`, in place: graphs know the addresses."""
        beam_idx = beam_idx.to(self.memory.start.device)
        for tensor in self.tensors:
            past = tensor[:, :, : self.length]
            past.copy_(past.index_select(0, beam_idx))
        self.start = self.start.to(beam_idx.device).index_select(0, beam_idx)
        for value in self.memory.keep.values():
            value[:, : self.batch] = value[:, : self.batch].index_select(1, beam_idx)


class CudaSession(Session):
    """Runs an artifact's programs on the current CUDA device."""

    runs_ahead = True
    batch_sizes: tuple[int, ...]
    _device: torch.device
    _profile: str
    _jit: bool
    _free: dict[int, list[Memory]]
    _stated = False

    @classmethod
    def of(
        cls, session: Session, batch_sizes: Sequence[int], profile: str, *, jit: bool = True
    ) -> CudaSession:
        """The session with its tensors on the GPU.

        Args:
            session: Programs and tensors.
            batch_sizes: Steps of these sizes are captured; smaller batches are padded.
            profile: Name of the GPU whose settings its kernels have.
            jit: Whether kernels that were not loaded may be compiled.
        """
        device = torch.device("cuda", torch.cuda.current_device())
        tensors = {name: value.to(device) for name, value in session.tensors.items()}
        keep = {name: value.to(device) for name, value in session.static_keep.items()}
        made = cls(
            session.shape, session.policy, session.programs, tensors, keep, session.max_seq_len,
            session.predictor_bytes,
        )  # fmt: skip
        made.batch_sizes, made._free, made._device = tuple(batch_sizes), {}, device
        made._profile, made._jit = profile, jit
        made.dense_from_batch = session.dense_from_batch
        made.dense_program = session.dense_program
        return made

    @property
    def device(self) -> torch.device:
        """The GPU."""
        return self._device

    def synchronize(self) -> None:
        """Wait for the GPU."""
        torch.cuda.synchronize(self._device)

    @torch.inference_mode()
    @one_at_a_time
    def new_cache(self, batch: int, capacity: int | None = None) -> CudaCache:
        """An empty cache for `batch` rows of up to `capacity` (default S) tokens.

        Raises:
            LengthError: If no captured batch size is large enough.
        """
        rows = self._rows(batch)
        if self._is_dense(rows) and not self._stated:
            self._stated = True
            _log.warning(
                "%s: every unit runs, by program %s; sparse below",
                self.policy_in_effect(batch),
                self.dense_program,
            )
        capacity = capacity or self.max_seq_len
        if capacity > self.max_seq_len:
            raise LengthError(
                "the cache is longer than the artifact's kernels were compiled for",
                expected=f"at most {self.max_seq_len} tokens",
                got=capacity,
                fix="compile with a larger --max-seq-len",
            )
        free = self._free.setdefault(rows, [])
        memory = free.pop() if free else self._new_memory(rows)
        memory.start.zero_()
        cache = CudaCache(memory, batch, capacity)
        weakref.finalize(cache, free.append, memory)
        return cache

    def _rows(self, batch: int) -> int:
        """Rows of the captured steps that run a batch."""
        rows = next((size for size in sorted(self.batch_sizes) if size >= batch), None)
        if rows is None:
            raise LengthError(
                "the batch is larger than the decode steps of this artifact",
                expected=f"at most {max(self.batch_sizes)} rows (beams count)",
                got=batch,
                fix="use smaller batches, or compile with larger --batch-sizes",
            )
        return rows

    def _is_dense(self, rows: int) -> bool:
        """Whether steps of that captured size run every unit though the policy skips some."""
        least = self.dense_from_batch
        return self.skips_units and least is not None and rows >= least

    def policy_in_effect(self, batch: int) -> str:
        """As `Session.policy_in_effect`; where rows share what they read, the batch decides."""
        rows = self._rows(batch)
        if self._is_dense(rows):
            return f"dense (batch {rows} >= {self.dense_from_batch})"
        return super().policy_in_effect(batch)

    def step_program(self, cache: KVCache) -> str:
        """As `Session.step_program`; from `dense_from_batch` rows on the dense one."""
        assert isinstance(cache, CudaCache)
        if self._is_dense(cache.memory.rows):
            return self.dense_program
        return super().step_program(cache)

    def _new_memory(self, rows: int) -> Memory:
        try:
            memory = Memory(self.shape, rows, self.max_seq_len, self.weight_dtype, self._device)
            memory.lazy = self._new_lazy(rows)
        except torch.OutOfMemoryError as error:
            raise LengthError(
                "not enough memory on the GPU for the cache",
                expected=f"{rows} rows of {self.max_seq_len} tokens",
                got=str(error).partition(". ")[0],
                fix="generate in smaller batches, or compile with a smaller --max-seq-len",
            ) from error
        for name, sets in self.static_keep.items():  # [L, 1, N] or [L, 1] -> a row each
            memory.keep[name] = sets.expand(-1, rows, *sets.shape[2:]).contiguous()
        return memory

    def with_program(self, name: str, program: Program) -> CudaSession:
        """The same artifact with one more program, and graphs of its own."""
        other = super().with_program(name, program)
        assert isinstance(other, CudaSession)
        other._free = {}
        return other

    @torch.inference_mode()
    @one_at_a_time  # before the profile, which is one of the process
    def step(self, ids: Tensor, cache: KVCache, *, program: str | None = None) -> dict[str, Any]:
        """As `Session.step`; a token runs as one graph launch.

        Keep sets and rows are views of what the next step writes over; the logits are a copy.
        """
        with cuda.using(self._profile, self._jit):
            return super().step(ids, cache, program=program)

    def _step(self, ids: Tensor, cache: KVCache, program: str | None) -> dict[str, Any]:
        assert isinstance(cache, CudaCache)
        memory, tokens = cache.memory, ids.shape[1]
        cache.check_room(tokens)
        prompt = tokens > 1 or cache.length == 0
        name = program or (self.prompt_program if prompt else self.step_program(cache))
        self._prepare(name, cache)
        if tokens == 1 and cache.length > 0:
            results = self._replay(name, ids, cache)
        else:
            results = self._prompt(name, ids.to(self._device), cache)
        cache.length += tokens
        cache.steps = 0 if prompt else cache.steps + 1
        held = {key: value[:, : cache.batch] for key, value in memory.keep.items()}
        if name == self.dense_program:
            held = {}  # it ran without any
        cache.keep = held | {k: v for k, v in results.items() if k.startswith(KEEP_PREFIXES)}
        return results

    def _prompt(self, name: str, ids: Tensor, cache: CudaCache) -> dict[str, Any]:
        """Run a program op by op, on the rows of the batch alone."""
        batch, tokens = ids.shape
        start = cache.start.to(self._device)
        slots = torch.arange(cache.length, cache.length + tokens, device=self._device)
        values = {
            "input_ids": ids,
            "position_ids": (slots - start[:, None]).clamp_(min=0),
            "start": start,
            "position": slots[:1],
        }
        results = self._run(name, values, cache.tensors)
        for key, value in results.items():
            if key.startswith(KEEP_PREFIXES):
                self._hold(cache.memory, key, value)
        return results

    def _hold(self, memory: Memory, key: str, value: Tensor) -> None:
        """Keep sets of a prompt, where the graphs of `hold` find them."""
        rows, batch = memory.rows, value.shape[1]
        if key not in memory.keep:
            memory.keep[key] = value.new_zeros(value.shape[0], rows, *value.shape[2:])
            if key.endswith("_index"):  # rows that pad the batch keep none of all units
                memory.keep[key] += torch.arange(value.shape[2], device=value.device)
        memory.keep[key][:, :batch] = value

    def _replay(self, name: str, ids: Tensor, cache: CudaCache) -> dict[str, Any]:
        """Launch the graph of a step, captured on its first use."""
        memory, batch = cache.memory, cache.batch
        memory.ids[:batch].copy_(ids, non_blocking=True)
        memory.start[:batch].copy_(cache.start, non_blocking=True)
        memory.position.fill_(cache.length)
        if name not in memory.graphs:
            memory.graphs[name] = self._capture(name, memory)
        graph, results = memory.graphs[name]
        graph.replay()
        counts = ("rows_", "computed_")
        found = {key: value[:batch] for key, value in results.items() if key.startswith(counts)}
        sets = {k: v[:, :batch] for k, v in results.items() if k.startswith(KEEP_PREFIXES)}
        return {"logits": results["logits"][:batch].clone(), **sets, **found}

    def _capture(self, name: str, memory: Memory) -> tuple[torch.cuda.CUDAGraph, dict[str, Tensor]]:
        def run() -> dict[str, Tensor]:
            values = {
                "input_ids": memory.ids,
                "position_ids": (memory.position - memory.start[:, None]).clamp_(min=0),
                "start": memory.start,
                "position": memory.position,
                **memory.keep,
                **(memory.lazy.tensors if memory.lazy else {}),
            }
            results = self._run(name, values, memory.tensors)
            if name != "hold" and "hold" in self.programs:
                for key, value in results.items():
                    if key.startswith(KEEP_PREFIXES):
                        self._hold(memory, key, value)
            return results

        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):  # modules are loaded, buffers that outlive a step are made
                run()
        torch.cuda.current_stream(self._device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run()
        return graph, results

    def _run(
        self, name: str, values: Mapping[str, Tensor], caches: Sequence[Tensor]
    ) -> dict[str, Any]:
        inputs = self.program(name).inputs
        named = [values[key] for key in inputs[: len(inputs) - len(caches)]]
        results = self.run(name, *named, *caches)
        results["logits"] = results["logits"].float()
        return results
