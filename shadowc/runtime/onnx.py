"""A session that runs an artifact's ONNX models in ONNX Runtime.

A step is one run with bound inputs and outputs. The cache is memory for the whole sequence, bound
as past and as present at once: the custom nodes write the new token's slot in place, and nothing is
copied. The dense model is plain ONNX, which knows no such thing: its cache grows, and each step
copies it, as with any exported model.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor

from shadowc.config import ModelShape
from shadowc.errors import ArtifactError, KernelError
from shadowc.onnx import library_path
from shadowc.onnx.names import DENSE, INPUTS, KINDS, MODEL, PAST, PRESENT
from shadowc.runtime.cache import KVCache
from shadowc.runtime.session import Session

_TYPES = {torch.float32: np.float32, torch.int64: np.int64, torch.int32: np.int32,
          torch.bool: np.bool_}  # fmt: skip


class OnnxCache(KVCache):
    """The cache of a batch.

    Attributes:
        bound: The model's inputs and outputs, bound to this cache's memory.
        grown: The cache as the dense model has it, when that one ran last.
    """

    bound: Any = None
    grown: list[Any] | None = None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As `KVCache.reorder_cache`; the memory is another one after it."""
        self.settle()
        super().reorder_cache(beam_idx)
        self.bound = None

    def take_back(self, tokens: int) -> None:
        """As `KVCache.take_back`."""
        self.settle()
        super().take_back(tokens)

    def grow(self) -> list[Any]:
        """Keys and values of the filled slots alone."""
        if self.grown is None:
            filled = [t[:, :, : self.length].contiguous().numpy() for t in self.tensors]
            self.grown = [onnxruntime.OrtValue.ortvalue_from_numpy(value) for value in filled]
        return self.grown

    def settle(self) -> None:
        """Put keys and values back where they are in place."""
        for tensor, value in zip(self.tensors, self.grown or (), strict=False):
            tensor[:, :, : self.length] = torch.from_numpy(value.numpy())
        self.grown = None


class OnnxSession(Session):
    """Runs `model.onnx`, or where the dense baseline is asked for `dense.onnx`."""

    runs_programs = False
    _directory: Path
    _tuned: bool
    _opened: dict[str, Any]
    _has_step: bool

    @classmethod
    def of(cls, session: Session, directory: Path, *, tuned: bool = True) -> OnnxSession:
        """The session with its model loaded; the dense one is when it is asked for.

        Args:
            session: Programs and tensors.
            directory: The artifact.
            tuned: Whether the dense model gets what makes it fast, a second copy of its weights.

        Raises:
            ArtifactError: If ONNX Runtime cannot load the model.
        """
        made = cls(
            session.shape, session.policy, session.programs, session.tensors, session.static_keep,
            session.max_seq_len, session.predictor_bytes,
        )  # fmt: skip
        made._directory, made._tuned, made._opened = directory, tuned, {}
        made._has_step = (directory / DENSE).exists()
        made._model(MODEL)
        return made

    def _model(self, name: str) -> Any:
        if name not in self._opened:
            baseline = self._tuned and (name == DENSE or not self._has_step)
            self._opened[name] = open_model(self._directory / name, baseline=baseline)
        return self._opened[name]

    def new_cache(self, batch: int, capacity: int | None = None) -> OnnxCache:
        """An empty cache for `batch` rows of up to `capacity` (default S) tokens."""
        return OnnxCache(self.shape, batch, capacity or self.max_seq_len)

    @torch.inference_mode()
    def step(self, ids: Tensor, cache: KVCache, *, program: str | None = None) -> dict[str, Any]:
        """As `Session.step`, but logits fp32 [B, T, V] are those of all tokens.

        Of a step, `head_keep` and `neuron_keep` bool [L', B, N] are its keep sets.

        Raises:
            LengthError: If the tokens do not fit in the cache.
            ArtifactError: If the model holds no such program.
            KernelError: If ONNX Runtime refuses the step.
        """
        assert isinstance(cache, OnnxCache)
        cache.check_room(ids.shape[1])
        prompt = ids.shape[1] > 1 or cache.length == 0
        step = self.step_program(cache)
        if program not in (None, "dense") and (prompt or program != step):
            raise ArtifactError(
                f"program {program!r} is not in the ONNX model", expected=f"dense, or {step}"
            )
        by_policy = self._has_step and program != "dense"
        model = self._model(DENSE if self._has_step and not by_policy else MODEL)
        try:
            run = self._run_in_place if by_policy else self.run_grown
            results = run(model, ids, cache)
        except Exception as error:
            raise KernelError("ONNX Runtime refused the step", got=error) from error
        cache.length += ids.shape[1]
        cache.steps = 0 if prompt else cache.steps + 1
        if prompt or not by_policy:
            return {"logits": results["logits"]}
        for kind in ("head", "neuron"):
            if (kept := results.get(f"{kind}_keep")) is not None:
                cache.keep[f"{kind}_keep"] = kept
        if (rows := results.pop("rows", None)) is not None:
            results |= {f"rows_{layer}": read for layer, read in enumerate(rows)}
        return results

    def _run_in_place(self, model: Any, ids: Tensor, cache: OnnxCache) -> dict[str, Tensor]:
        """Run the model with the cache where it is."""
        cache.settle()
        if cache.bound is None:
            cache.bound = model.io_binding()
            for name, tensor in zip(_cache_names(self.shape, PAST), cache.tensors, strict=True):
                _bind(cache.bound.bind_input, name, tensor)
            for name, tensor in zip(_cache_names(self.shape, PRESENT), cache.tensors, strict=True):
                _bind(cache.bound.bind_output, name, tensor)
        given = self._inputs(ids, cache)
        for name, tensor in given.items():
            _bind(cache.bound.bind_input, name, tensor)
        batch, tokens = ids.shape
        shape = self.shape
        results = {"logits": torch.empty(batch, tokens, shape.vocab)}
        for output in model.get_outputs():
            if output.name == "rows":
                results["rows"] = torch.empty(shape.layers, batch, dtype=torch.int32)
            elif output.name.endswith("_keep"):
                layers, _, units = output.shape
                results[output.name] = torch.empty(layers, batch, units, dtype=torch.bool)
        for name, tensor in results.items():
            _bind(cache.bound.bind_output, name, tensor)
        model.run_with_iobinding(cache.bound)
        return results

    def run_grown(self, model: Any, ids: Tensor, cache: OnnxCache) -> dict[str, Tensor]:
        """Run a model of ONNX Runtime with a cache that grows: what any exported model can do."""
        binding = model.io_binding()
        for name, value in zip(_cache_names(self.shape, PAST), cache.grow(), strict=True):
            binding.bind_ortvalue_input(name, value)
        given = self._inputs(ids, cache)
        for name, tensor in given.items():
            _bind(binding.bind_input, name, tensor)
        logits = torch.empty(*ids.shape, self.shape.vocab)
        _bind(binding.bind_output, "logits", logits)
        for name in _cache_names(self.shape, PRESENT):
            binding.bind_output(name)
        model.run_with_iobinding(binding)
        cache.grown = binding.get_outputs()[1:]
        return {"logits": logits}

    def _inputs(self, ids: Tensor, cache: OnnxCache) -> dict[str, Tensor]:
        slots = torch.arange(cache.length + ids.shape[1])
        positions = (slots[cache.length :] - cache.start[:, None]).clamp_(min=0)
        mask = (slots >= cache.start[:, None]).to(torch.int64)
        return dict(zip(INPUTS, (ids.contiguous(), mask, positions), strict=True))


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    bind(name, "cpu", 0, _TYPES[tensor.dtype], [*tensor.shape], tensor.data_ptr())


def _cache_names(shape: ModelShape, pattern: str) -> list[str]:
    """Names of the caches in the order of `KVCache.tensors`."""
    return [pattern.format(layer, kind) for layer in range(shape.layers) for kind in KINDS]


def open_model(file: Path, *, library: bool = True, baseline: bool = False) -> Any:
    """A session of ONNX Runtime.

    Args:
        file: The model, beside the files of its weights.
        library: Whether to register our library; else custom nodes run as their functions.
        baseline: Everything as ONNX Runtime does it by itself. Otherwise it keeps no second copy of
            a weight in another layout or type.

    Raises:
        KernelError: If the library cannot be registered.
        ArtifactError: If ONNX Runtime cannot load the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised as well
    options.intra_op_num_threads = torch.get_num_threads()
    # Threads that wait for the next run of one session slow another one down.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    if not baseline:
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.add_session_config_entry(
            "optimization.constant_folding_max_output_size_in_bytes", "65536"
        )
    if library:
        _register(options, library_path())
    try:
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ArtifactError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {file}",
            got=str(error).strip(),
            fix="compile the artifact again with this version of shadowc",
        ) from error


def _register(options: Any, library: Path) -> None:
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise KernelError(
            f"{library.name} cannot be registered in ONNX Runtime {onnxruntime.__version__}",
            got=error,
        ) from error
