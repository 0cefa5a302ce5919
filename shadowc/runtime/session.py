"""One loaded artifact as a step function: which program runs, with which keep sets."""

from __future__ import annotations

import contextlib
import copy
import functools
import threading
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import Tensor

from shadowc.config import ModelShape, Policy
from shadowc.errors import (
    ArtifactError,
    LengthError,
    NumericsError,
    OptionError,
    ShadowcError,
    out_of_memory,
)
from shadowc.runtime.cache import KVCache
from shadowc.runtime.lazy import CATCH_UP, LAZY, LazyState
from shadowc.runtime.program import Program
from shadowc.runtime.watch import Counters

#: Names of an artifact's programs, and what each is for.
PROGRAMS = {
    "dense": "any number of tokens, every unit: prefill, and the dense baseline",
    "full": "one token, every unit, with the kernels of the sparse programs (CUDA)",
    "exact": "one token, every unit, rows of exactly zero activations not read",
    "prefill": "as dense, and the keep sets that the last token's feature gives",
    "decode": "one token: predictor, selection, sparse ops",
    "hold": "one token, sparse ops with keep sets that are given",
    "lazy": "as decode, one row; keys and values of skipped heads wait (CUDA)",
    "lazy_hold": "as hold, in the same way",
    "catch_up": "no token: keys and values that wait",
    "masked": "whole sequences with 0/1 masks in plain aten: the semantics, for evaluation",
}

#: How the names of keep sets begin among a program's results.
KEEP_PREFIXES = ("head_", "neuron_")

_Method = TypeVar("_Method", bound=Callable[..., Any])


def one_at_a_time(method: _Method) -> _Method:
    """Let threads that call a session's method wait for each other."""

    @functools.wraps(method)
    def alone(self: Session, *arguments: Any, **options: Any) -> Any:
        with self.lock:
            return method(self, *arguments, **options)

    return alone  # type: ignore[return-value]


class Session:
    """Runs the programs of an artifact; threads may share it, their steps run one after another.

    Args:
        shape: The model's shape.
        policy: The policy that the programs were compiled for.
        programs: Programs by the names of `PROGRAMS`.
        tensors: Packed weights and predictor, by name.
        keep: Keep sets that never change (`static`), by the names that programs give them.
        max_seq_len: S, the compiled length.
        predictor_bytes: Bytes of predictor weights that a decoded token reads, on average.

    Attributes:
        check_finite: Whether a step whose logits are not finite raises, and names the layer.
        lock: Held by the thread that runs a step.
    """

    def __init__(
        self,
        shape: ModelShape,
        policy: Policy,
        programs: Mapping[str, Program],
        tensors: Mapping[str, Tensor],
        keep: Mapping[str, Tensor],
        max_seq_len: int,
        predictor_bytes: float = 0.0,
    ) -> None:
        self.predictor_bytes = predictor_bytes
        self.shape, self.policy, self.max_seq_len = shape, policy, max_seq_len
        self.programs, self.tensors, self.static_keep = programs, tensors, dict(keep)
        self._bound: dict[str, Callable[..., tuple[Any, ...]]] = {}
        self.counters = Counters(shape)
        self.check_finite = False
        self.lock = threading.RLock()  # shared by what `with_program` makes
        self._examined: str | None = None  # "" while a step is searched, then what was found

    #: Held while a file of the artifact is opened after it was loaded, by the file's name.
    reopened: Callable[[str], AbstractContextManager[object]] = contextlib.nullcontext

    #: Whether a step only starts work, so that it pays to launch the next one early.
    runs_ahead = False
    #: Whether programs run here operator by operator; else they are models of another runtime.
    runs_programs = True
    #: Steps of at least so many rows run every unit (on a GPU, where rows share what they read),
    #: by that program; None means that none does.
    dense_from_batch: int | None = None
    dense_program = "full"

    @property
    def device(self) -> torch.device:
        """Where programs run and caches live."""
        return torch.device("cpu")

    def synchronize(self) -> None:
        """Wait until everything that was started is done."""

    @one_at_a_time
    def run(self, name: str, *inputs: Tensor) -> dict[str, Any]:
        """Run one program by name and return its results by name.

        Inputs may be on any device; results are on the session's.

        Raises:
            ArtifactError: If the artifact has no such program, or it fails: what it is made of does
                not fit its inputs.
        """
        program = self.program(name)
        here = [value.to(self.device) for value in inputs]
        try:
            if self._examined == "":
                self._examined = program.first_not_finite(self.tensors, here) or ""
            bound = self._bound.get(name)
            if bound is None:
                bound = self._bound[name] = program.bind(self.tensors)
            results = bound(*here)
        except Exception as error:  # operators fail in many ways when something does not fit
            if isinstance(error, ShadowcError) or out_of_memory(error):
                raise
            raise ArtifactError(
                f"{program.source} fails on these tensors and inputs",
                got=f"{type(error).__name__}: {error}"[:400],
                fix="compile the artifact again",
            ) from error
        return dict(zip(program.outputs, results, strict=True))

    def program(self, name: str) -> Program:
        """A program by name.

        Raises:
            ArtifactError: If the artifact has no such program.
        """
        if name not in self.programs:
            raise ArtifactError(
                f"the artifact has no program {name!r}", expected=", ".join(self.programs)
            )
        return self.programs[name]

    def with_program(self, name: str, program: Program) -> Session:
        """The same artifact with one more program."""
        other = copy.copy(self)
        other.programs = {**self.programs, name: program}
        other._bound = {}
        return other

    def new_cache(self, batch: int, capacity: int | None = None) -> KVCache:
        """An empty cache for `batch` rows of up to `capacity` (default S) tokens."""
        cache = KVCache(self.shape, batch, capacity or self.max_seq_len)
        cache.lazy = self._new_lazy(batch)
        for name, sets in self.static_keep.items():  # [L, 1, N] or [L, 1] -> a row each
            cache.keep[name] = sets.expand(-1, batch, *sets.shape[2:]).contiguous()
        return cache

    @property
    def weight_dtype(self) -> torch.dtype:
        """Type of the matrices."""
        return next(t.dtype for name, t in self.tensors.items() if name.endswith("_t"))

    def _new_lazy(self, rows: int) -> LazyState | None:
        """What lazy programs remember, if there are any for that many rows."""
        if rows != 1 or CATCH_UP not in self.programs:
            return None
        return LazyState(self.programs[CATCH_UP], self.shape, self.weight_dtype, self.device)

    def _prepare(self, name: str, cache: KVCache) -> Mapping[str, Tensor]:
        """Make a cache what a program expects; returns the state that a lazy one reads.

        Raises:
            OptionError: If the program is a lazy one and the cache is not for one row.
        """
        lazy, waits = cache.lazy, name in LAZY.values()
        if lazy is None:
            if waits:
                raise OptionError(f"program {name!r} is for one row", got=cache.batch)
            return {}
        if waits and not lazy.waits:
            lazy.begin(cache.length)
        elif lazy.waits and not waits:
            last = torch.tensor([cache.length - 1])
            self.run(CATCH_UP, last, *lazy.tensors.values(), *cache.tensors)
        lazy.waits = waits
        return lazy.tensors

    @torch.inference_mode()
    @one_at_a_time
    def step(self, ids: Tensor, cache: KVCache, *, program: str | None = None) -> dict[str, Any]:
        """Feed tokens and return what the program returns.

        A prompt (an empty cache, or several tokens) runs dense; one token runs sparse.

        Args:
            ids: int64 [B, T].
            cache: The batch's cache; advanced by T.
            program: Run this program instead of the one that the policy asks for (`dense` is the
                baseline of every comparison).

        Returns:
            `logits` fp32 [B, 1, V] of the last token, and what else the program returns (keep sets,
            `rows_l`: rows of the second projection read in layer l).

        Raises:
            LengthError: If there is no token, or the tokens do not fit in the cache.
            NumericsError: If `check_finite` and the logits are not finite.
        """
        if not ids.numel():
            raise no_tokens()
        prompt = ids.shape[1] > 1 or cache.length == 0
        before = cache.length, cache.steps, dict(cache.keep)
        results = self._step(ids, cache, program)
        if self.check_finite and not bool(results["logits"].isfinite().all()):
            where = self._where(ids, cache, program, before)
            raise NumericsError(
                f"the logits of token {cache.length} are not finite: {where}",
                expected="finite numbers",
                got="NaN" if bool(results["logits"].isnan().any()) else "infinity",
                fix="compile with --dtype bf16 or fp32",
            )
        if prompt:
            self.counters.prompt_tokens += ids.numel()
        else:
            self.counters.decoded(len(ids), results if program else cache.keep)
        return results

    def _where(
        self,
        ids: Tensor,
        cache: KVCache,
        program: str | None,
        before: tuple[int, int, dict[str, Tensor]],
    ) -> str:
        """Where numbers stop being finite: the step once more, operator by operator.

        Args:
            ids: int64 [B, T], as of the step.
            cache: As the step left it; what it wrote is written again.
            program: As of the step.
            before: Length, steps and keep sets that the cache had.
        """
        after = cache.length, cache.steps, cache.keep
        self._examined = ""
        try:
            cache.settle()
            cache.length, cache.steps, cache.keep = before
            Session._step(self, ids, cache, program)
            return self._examined or "in the output"
        except ArtifactError:  # a model of another runtime: what it left in the cache
            for index, tensor in enumerate(cache.tensors):
                if not bool(tensor[:, :, : after[0]].isfinite().all()):
                    return f"at or before the keys and values of layer {index // 2}"
            return f"in layer {self.shape.layers - 1} or in the output"
        finally:
            self._examined = None
            cache.length, cache.steps, cache.keep = after

    def _step(self, ids: Tensor, cache: KVCache, program: str | None) -> dict[str, Any]:
        """What `step` does but check and count."""
        batch, tokens = ids.shape
        cache.check_room(tokens)
        prompt = tokens > 1 or cache.length == 0
        name = program or (self.prompt_program if prompt else self.step_program(cache))
        slots = torch.arange(cache.length, cache.length + tokens)
        positions = (slots - cache.start[:, None]).clamp_(min=0)
        arguments = {
            "input_ids": ids,
            "position_ids": positions,
            "start": cache.start,
            "position": slots[:1],
            **cache.keep,
            **self._prepare(name, cache),
        }
        inputs = self.program(name).inputs
        try:
            named = [arguments[key] for key in inputs[: len(inputs) - len(cache.tensors)]]
        except KeyError as error:
            raise ArtifactError(
                f"program {name!r} needs {error}, which no program has given",
                fix="compile the artifact again",
            ) from error
        results = self.run(name, *named, *cache.tensors)
        cache.length += tokens
        cache.steps = 0 if prompt else cache.steps + 1
        cache.keep |= {
            key: value for key, value in results.items() if key.startswith(KEEP_PREFIXES)
        }
        return results

    @property
    def skips_units(self) -> bool:
        """Whether the policy skips any unit."""
        return self.policy.head_sparsity > 0 or self.policy.neuron_sparsity > 0

    def policy_in_effect(self, batch: int) -> str:
        """What decodes a batch of so many rows: `sparse`, `exact`, or `dense` and why."""
        if self.skips_units:
            return "sparse"
        return "exact" if "exact" in self.programs else "dense"

    @property
    def prompt_program(self) -> str:
        """Name of the program that a prompt runs."""
        predicted = self.policy.refresh != 1 and not self.static_keep
        return "prefill" if predicted and self.skips_units else "dense"

    def step_program(self, cache: KVCache) -> str:
        """Name of the program that the next token of a cache runs."""
        policy = self.policy
        if not self.skips_units:
            # SwiGLU has no exact zeros.
            return next(name for name in ("exact", "full", "dense") if name in self.programs)
        if self.static_keep:
            name = "hold"
        else:
            fresh = policy.refresh and cache.steps % policy.refresh == 0
            name = "decode" if fresh else "hold"
        return name if cache.lazy is None else LAZY[name]


def no_tokens() -> LengthError:
    """The error for an empty prompt."""
    return LengthError(
        "the prompt has no tokens",
        expected="at least one",
        fix="begin with the tokenizer's bos_token, or with some text",
    )
