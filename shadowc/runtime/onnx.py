"""A session that runs an artifact's ONNX models in ONNX Runtime.

A step is one run with bound inputs and outputs. The cache is memory for the whole sequence, bound
as past and as present at once: the custom nodes write the new token's slot in place, and nothing is
copied. The dense model is plain ONNX, which knows no such thing: its cache grows, and each step
copies it, as with any exported model. On a GPU the cache is memory of torch there, and stays there.
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
from shadowc.onnx.check import check_model
from shadowc.onnx.names import DENSE, INPUTS, KINDS, MODEL, PAST, PRESENT
from shadowc.runtime.cache import KVCache
from shadowc.runtime.session import Session

CUDA = "CUDAExecutionProvider"
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

    def __init__(self, shape: ModelShape, batch: int, capacity: int, device: torch.device) -> None:
        super().__init__(shape, batch, capacity)
        self.device = device
        self.tensors = [tensor.to(device) for tensor in self.tensors]

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """As `KVCache.reorder_cache`; the memory is another one after it."""
        self.settle()
        self.tensors = [t.index_select(0, beam_idx.to(t.device)) for t in self.tensors]
        self.start = self.start.index_select(0, beam_idx.to(self.start.device))
        self.keep = {
            name: t.index_select(1, beam_idx.to(t.device)) for name, t in self.keep.items()
        }
        self.bound = None

    def take_back(self, tokens: int) -> None:
        """As `KVCache.take_back`."""
        self.settle()
        super().take_back(tokens)

    def grow(self) -> list[Any]:
        """Keys and values of the filled slots alone."""
        if self.grown is None:
            filled = [t[:, :, : self.length].cpu().contiguous().numpy() for t in self.tensors]
            make = onnxruntime.OrtValue.ortvalue_from_numpy
            self.grown = [make(value, self.device.type, 0) for value in filled]
        return self.grown

    def settle(self) -> None:
        """Put keys and values back where they are in place."""
        for tensor, value in zip(self.tensors, self.grown or (), strict=False):
            tensor[:, :, : self.length] = torch.from_numpy(value.numpy())
        self.grown = None


class OnnxSession(Session):
    """Runs `model.onnx`, or where the dense baseline is asked for `dense.onnx`, opened then."""

    runs_programs = False
    _directory: Path
    _tuned: bool
    _opened: dict[str, Any]
    _has_step: bool
    _library: bool
    _device: torch.device

    @classmethod
    def of(
        cls,
        session: Session,
        directory: Path,
        *,
        tuned: bool = True,
        cuda: bool = False,
        library: bool = True,
    ) -> OnnxSession:
        """The session with its model loaded; the dense one is when it is asked for.

        Args:
            session: Programs and tensors.
            directory: The artifact.
            tuned: Whether the dense model gets what makes it fast, a second copy of its weights.
            cuda: Whether to run on the GPU.
            library: Whether to register our library.

        Raises:
            KernelError: If there is no GPU.
            ArtifactError: If ONNX Runtime cannot load the model.
        """
        if cuda:
            _require_cuda()
        made = cls(
            session.shape, session.policy, session.programs, session.tensors, session.static_keep,
            session.max_seq_len, session.predictor_bytes,
        )  # fmt: skip
        made._directory, made._tuned, made._opened = directory, tuned, {}
        made._library, made._device = library, torch.device("cuda", 0) if cuda else session.device
        made.dense_from_batch = session.dense_from_batch
        made.dense_program = session.dense_program
        made._has_step = (directory / DENSE).exists()
        made._model(MODEL)
        return made

    def _model(self, name: str) -> Any:
        if name not in self._opened:
            baseline = self._tuned and (name == DENSE or not self._has_step)
            with self.reopened(name):
                self._opened[name] = open_model(
                    self._directory / name, baseline=baseline, library=self._library,
                    cuda=self._device.type == "cuda",
                )  # fmt: skip
        return self._opened[name]

    @property
    def device(self) -> torch.device:
        """Where the models run and caches live."""
        return self._device

    def synchronize(self) -> None:
        """Wait for the GPU; ONNX Runtime has waited for its own work."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def run(self, name: str, *inputs: Tensor) -> dict[str, Any]:
        """As `Session.run`: programs of torch, for evaluation, where the models run."""
        if self.tensors and next(iter(self.tensors.values())).device != self._device:
            self.tensors = {key: t.to(self._device) for key, t in self.tensors.items()}
        return super().run(name, *inputs)

    def policy_in_effect(self, batch: int) -> str:
        """As `Session.policy_in_effect`; a GPU runs every unit of a batch."""
        if self.skips_units and self._is_dense(batch):
            return f"dense (batch {batch} >= {self.dense_from_batch})"
        return super().policy_in_effect(batch)

    def _is_dense(self, batch: int) -> bool:
        return self.dense_from_batch is not None and batch >= self.dense_from_batch

    def new_cache(self, batch: int, capacity: int | None = None) -> OnnxCache:
        """An empty cache for `batch` rows of up to `capacity` (default S) tokens."""
        return OnnxCache(self.shape, batch, capacity or self.max_seq_len, self._device)

    def _step(self, ids: Tensor, cache: KVCache, program: str | None) -> dict[str, Any]:
        """As a `Session`'s, but logits fp32 [B, T, V] are those of all tokens.

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
        by_policy = self._has_step and program != "dense" and not self._is_dense(len(ids))
        model = self._model(DENSE if self._has_step and not by_policy else MODEL)
        try:
            # Functions are plain ONNX, which knows no cache in place.
            run = self._run_in_place if by_policy and self._library else self.run_grown
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
        results = self._results(model, ids)
        for name, tensor in results.items():
            _bind(cache.bound.bind_output, name, tensor)
        self._run_bound(model, cache.bound, ids, cache)
        return results

    def _results(self, model: Any, ids: Tensor) -> dict[str, Tensor]:
        """Room for all that a model returns but its cache."""
        batch, tokens = ids.shape
        shape = self.shape

        def room(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.empty(size, dtype=dtype, device=self._device)

        results = {"logits": room(batch, tokens, shape.vocab)}
        for output in model.get_outputs():
            if output.name == "rows":
                results["rows"] = room(shape.layers, batch, dtype=torch.int32)
            elif output.name.endswith("_keep"):
                layers, _, units = output.shape
                results[output.name] = room(layers, batch, units, dtype=torch.bool)
        return results

    def _run_bound(self, model: Any, binding: Any, ids: Tensor, cache: OnnxCache) -> None:
        """Bind what is new in a step and run it."""
        given = self._inputs(ids, cache)
        self.synchronize()  # torch and ONNX Runtime have streams of their own
        for name, tensor in given.items():
            _bind(binding.bind_input, name, tensor)
        model.run_with_iobinding(binding)

    def run_grown(self, model: Any, ids: Tensor, cache: OnnxCache) -> dict[str, Tensor]:
        """Run a model of ONNX Runtime with a cache that grows: what any exported model can do."""
        binding = model.io_binding()
        for name, value in zip(_cache_names(self.shape, PAST), cache.grow(), strict=True):
            binding.bind_ortvalue_input(name, value)
        results = self._results(model, ids)
        for name, tensor in results.items():
            _bind(binding.bind_output, name, tensor)
        for name in _cache_names(self.shape, PRESENT):
            binding.bind_output(name, self._device.type, 0)
        self._run_bound(model, binding, ids, cache)
        cache.grown = binding.get_outputs()[len(results) :]
        return results

    def _inputs(self, ids: Tensor, cache: OnnxCache) -> dict[str, Tensor]:
        slots, start = torch.arange(cache.length + ids.shape[1]), cache.start.cpu()
        positions = (slots[cache.length :] - start[:, None]).clamp_(min=0)
        mask = (slots >= start[:, None]).to(torch.int64)
        return dict(zip(INPUTS, (ids.contiguous(), mask, positions), strict=True))


def _bind(bind: Any, name: str, tensor: Tensor) -> None:
    where = tensor.device.type
    bind(name, where, 0, _TYPES[tensor.dtype], [*tensor.shape], tensor.data_ptr())


def _cache_names(shape: ModelShape, pattern: str) -> list[str]:
    """Names of the caches in the order of `KVCache.tensors`."""
    return [pattern.format(layer, kind) for layer in range(shape.layers) for kind in KINDS]


def cuda_is_here() -> bool:
    """Whether ONNX Runtime and torch are both built for CUDA and there is a GPU."""
    return CUDA in onnxruntime.get_available_providers() and torch.cuda.is_available()


def _require_cuda() -> None:
    if not cuda_is_here():
        raise KernelError(
            "ONNX Runtime cannot use a GPU here",
            expected=f"a GPU, a torch that is built for CUDA, and onnxruntime-gpu with its {CUDA}",
            got=f"torch {torch.__version__} {'with' if torch.cuda.is_available() else 'without'} a "
            f"GPU, ONNX Runtime with {', '.join(onnxruntime.get_available_providers())}",
            fix="pip install 'shadowc[onnx-gpu]' where there is one, or use --target onnx-cpu",
        )
    onnxruntime.preload_dlls()  # CUDA's libraries are those of torch


def open_model(
    file: Path, *, library: bool = True, baseline: bool = False, cuda: bool = False
) -> Any:
    """A session of ONNX Runtime.

    Args:
        file: The model, beside the files of its weights.
        library: Whether to register our library; else custom nodes run as their functions.
        baseline: Everything as ONNX Runtime does it by itself. Otherwise it keeps no second copy of
            a weight in another layout or type.
        cuda: Whether to run on the GPU.

    Raises:
        KernelError: If the library cannot be registered, or the GPU not be used.
        ArtifactError: If it has data elsewhere, or ONNX Runtime cannot load it.
    """
    check_model(file)
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
    providers: list[Any] = ["CPUExecutionProvider"]
    if cuda:
        providers.insert(0, (CUDA, {"use_tf32": "0"}))
    try:
        model = onnxruntime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:
        raise ArtifactError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load {file}",
            got=str(error).strip(),
            fix="compile the artifact again with this version of shadowc",
        ) from error
    if cuda and CUDA not in model.get_providers():  # it goes on without, and only prints why
        raise KernelError(
            f"ONNX Runtime {onnxruntime.__version__} cannot load its {CUDA}",
            expected="the CUDA libraries that it was built for; it has printed what is missing",
            got=", ".join(model.get_providers()),
        )
    return model


def _register(options: Any, library: Path) -> None:
    try:
        options.register_custom_ops_library(str(library))
    except Exception as error:
        raise KernelError(
            f"{library.name} cannot be registered in ONNX Runtime {onnxruntime.__version__}",
            got=error,
        ) from error
