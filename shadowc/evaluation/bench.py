"""Speed of an artifact beside its dense original, measured together.

Every variant decodes the same text after the same prompt, in turns of a few tokens, so that a
change of the machine's mood meets all of them. Figures are medians of the tokens' times, and ratios
are of medians of one run.

    artifact            predictor, selection, sparse ops
    exact               every unit, rows of exactly zero activations not read (ReLU models)
    dense               the same runtime and weights, nothing skipped; on a GPU the faster of cuBLAS
                        and our own kernels, both as CUDA graphs
    hugging_face        the original model in transformers, eager, same type, same threads
    hugging_face_fp32   the same in fp32, which is the faster one on CPUs without half arithmetic
"""

from __future__ import annotations

import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from shadowc import native
from shadowc.artifact import WEIGHTS, Artifact
from shadowc.errors import LengthError, ModelError, OptionError, ShadowcError
from shadowc.evaluation.sources import held_out, original
from shadowc.runtime.loading import load
from shadowc.runtime.program import Program
from shadowc.runtime.session import Session
from shadowc.runtime.usage import Usage
from shadowc.versions import versions

#: Tokens that a variant decodes before the next one has its turn.
TURN = 8
#: Tokens at the beginning that are not measured, and the least that are.
WARM_UP = 8
#: Tokens over which predictor and selection are timed.
SELECTIONS = 32
#: A variant that has taken this many seconds sits out the remaining turns.
PATIENCE = 15.0

#: Decodes one token: ids [B, 1] -> results, if it has any.
Step = Callable[[Tensor], Mapping[str, Tensor] | None]


@dataclass
class Variant:
    """One way to run the model.

    Attributes:
        step: Decodes one token.
        usage: Counts what ran, for programs that say it.
        times: Seconds of each measured token.
        wait: Waits for the device, where a step only starts work; then a turn is timed as a whole.
    """

    step: Step
    usage: Usage | None = None
    times: list[float] = field(default_factory=list)
    wait: Callable[[], None] | None = None

    @property
    def ms(self) -> float:
        """Median of the steps, in milliseconds."""
        return statistics.median(self.times) * 1e3

    def decode(self, ids: Tensor, measured: bool) -> None:
        """Take a turn: decode ids int64 [B, T] one by one."""
        if self.wait is not None:
            self._decode_together(ids, measured, self.wait)
            return
        for token in range(ids.shape[1]):
            began = time.perf_counter()
            results = self.step(ids[:, token : token + 1])
            seconds = time.perf_counter() - began
            if not measured:
                if seconds > 1.0:
                    return
            else:
                self.times.append(seconds)
                if self.usage is not None and results is not None:
                    self.usage.add(results)

    def _decode_together(self, ids: Tensor, measured: bool, wait: Callable[[], None]) -> None:
        results = None
        wait()
        began = time.perf_counter()
        for token in range(ids.shape[1]):
            results = self.step(ids[:, token : token + 1])
        wait()
        if measured:
            self.times += [(time.perf_counter() - began) / ids.shape[1]] * ids.shape[1]
            if self.usage is not None and results is not None:
                self.usage.add(results)  # of the last token: to look at others takes time


@torch.inference_mode()
def bench(
    artifact: Artifact,
    *,
    prompt_len: int = 128,
    new_tokens: int = 128,
    batch: int = 1,
    data: str = "pydoc",
    hugging_face: bool = True,
    allow_jit: bool = False,
    progress: Callable[[float], None] = lambda share: None,
) -> dict[str, Any]:
    """Measure decoding.

    Args:
        artifact: The artifact.
        prompt_len: Tokens of the prompt.
        new_tokens: Tokens that are decoded after it; the first `WARM_UP` are not measured.
        batch: B, sequences at once. A step gives each of them one token.
        data: Text to decode.
        hugging_face: Also load the original model and run it in transformers.
        allow_jit: As for `load`.
        progress: Called with the share of the work that is done.

    Returns:
        The keys of the command line's `bench --json`; times are medians of steps in milliseconds.

    Raises:
        OptionError: If there is nothing to measure.
        LengthError: If prompt and new tokens do not fit in the compiled length.
    """
    _check(prompt_len, new_tokens, batch, int(artifact.manifest["max_seq_len"]))
    before = peak_memory()
    model = load(artifact.path, allow_jit=allow_jit)
    session = model.session
    gpu = session.device.type == "cuda"
    tokens = prompt_len + new_tokens
    windows = held_out(model, data, tokens, batch * tokens)
    ids = torch.tensor([windows[row % len(windows)] for row in range(batch)])
    prompt, text = ids[:, :prompt_len], ids[:, prompt_len:]

    variants = {"artifact": _own(session, prompt, tokens, None)}
    variants["artifact"].decode(text[:, :WARM_UP], measured=False)
    memory = torch.cuda.max_memory_allocated() if gpu else peak_memory()
    before = 0 if gpu else before
    if "exact" in session.programs and skips_units(session):
        variants["exact"] = _own(session, prompt, tokens, "exact")
    variants["dense"] = _own(session, prompt, tokens, "dense")
    if "full" in session.programs:
        variants["full"] = _own(session, prompt, tokens, "full")
    left_out = {}
    for name, dtype in _eager_types(artifact).items():
        try:
            if not hugging_face:
                raise OptionError("not asked for")
            variants[name] = _eager(artifact, prompt, dtype, session)
        except ShadowcError as error:
            left_out[name] = str(error)
    for name, variant in variants.items():
        if name != "artifact":
            variant.decode(text[:, :WARM_UP], measured=False)
    _take_turns(list(variants.values()), text[:, WARM_UP:], progress)
    selection = selection_ms(session, prompt, text[:, :SELECTIONS])
    return _figures(artifact, session, variants, selection) | {
        "peak_memory_bytes": memory,
        "peak_memory_above_start_bytes": max(memory - before, 0),
        "batch": batch,
        "prompt_len": prompt_len,
        "new_tokens": new_tokens,
        "left_out": left_out,
    }


def skips_units(session: Session) -> bool:
    """Whether any unit is ever skipped."""
    return session.policy.head_sparsity > 0 or session.policy.neuron_sparsity > 0


def read_bandwidth(size: int = 1 << 29, repeats: int = 5, device: str = "cpu") -> float:
    """Bytes a second at which a device streams through its memory: the best of some sums."""
    if device == "cuda":
        buffer = torch.ones(size, device=device)  # 4 bytes each: far more than its cache
        torch.cuda.synchronize()
        times = [_gpu_seconds(buffer.sum) for _ in range(repeats + 1)]
    else:
        buffer = torch.ones(size // 8, dtype=torch.int64)
        times = [_seconds(buffer.sum) for _ in range(repeats + 1)]
    return buffer.nbytes / min(times)


def peak_memory() -> int:
    """The most bytes of memory that this process has held so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def free_memory(session: Session) -> int:
    """Bytes of memory that could be used without swapping, as far as the system says."""
    if session.device.type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable")]
    return found[0] * 1024 if found else sys.maxsize


def device(kind: str = "cpu") -> dict[str, Any]:
    """What the figures were measured on: this machine's `cpu`, or its current `cuda` device."""
    threads = torch.get_num_threads()
    if kind == "cuda":
        major, minor = torch.cuda.get_device_capability()
        gpu = torch.cuda.get_device_name()
        return {"device": gpu, "isa": f"sm_{major}{minor}", "threads": threads}
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        name = names[0] if names else name
    return {"device": name, "isa": native.isa(), "threads": threads}


@torch.inference_mode()
def selection_ms(session: Session, prompt: Tensor, text: Tensor) -> float | None:
    """Time of predictor and selection inside a decode step, median in milliseconds.

    The program runs operator by operator, so that caches are in the state that they really have.

    Args:
        session: The artifact.
        prompt: int64 [B, T].
        text: int64 [B, T], tokens to decode.

    Returns:
        None if the artifact selects nothing while it decodes.
    """
    if "decode" not in session.programs:
        return None
    program = session.programs["decode"]
    timed = _SelectionTimer(program.inputs, program.outputs, program.weights, program.graph)
    session = session.with_program("decode", timed)
    cache = session.new_cache(prompt.shape[0], prompt.shape[1] + text.shape[1])
    session.step(prompt, cache)
    for token in range(text.shape[1]):
        session.step(text[:, token : token + 1], cache, program="decode")
    if session.device.type == "cuda":
        return timed.on_gpu() * 1e3
    return statistics.median(timed.seconds) * 1e3


@dataclass(frozen=True)
class _SelectionTimer(Program):
    """A program that runs node by node and adds up the time of those that choose units.

    Those are the operators between a weight of a predictor and the selection, and what merely takes
    their results apart or joins them.
    """

    seconds: list[float] = field(default_factory=list)
    last: dict[fx.Node, Any] = field(default_factory=dict)

    def on_gpu(self) -> float:
        """Seconds of those operators alone, as a CUDA graph over what the last step gave them."""
        chosen = self._choosing()
        nodes = [node for node in self.graph.nodes if node in chosen]
        known = dict(self.last)

        def choose() -> None:
            for node in nodes:
                args, kwargs = fx.map_arg((node.args, node.kwargs), known.__getitem__)
                known[node] = node.target(*args, **kwargs)

        choose()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            choose()
        graph.replay()
        torch.cuda.synchronize()
        return statistics.median(_gpu_seconds(graph.replay) for _ in range(SELECTIONS))

    def bind(self, tensors: Mapping[str, Tensor]) -> Callable[..., tuple[Any, ...]]:
        weights = [tensors[name] for name in self.weights]
        nodes = list(self.graph.nodes)
        chosen = self._choosing()
        counter = time.perf_counter

        def run(*inputs: Any) -> tuple[Any, ...]:
            values = iter((*weights, *inputs))
            known: dict[fx.Node, Any] = {}
            spent = 0.0
            for node in nodes:
                if node.op == "placeholder":
                    known[node] = next(values)
                elif node.op == "output":
                    self.seconds.append(spent)
                    self.last.update(known)
                    return tuple(fx.map_arg(node.args[0], known.__getitem__))
                else:
                    args = fx.map_arg(node.args, known.__getitem__)
                    kwargs = fx.map_arg(node.kwargs, known.__getitem__)
                    began = counter()
                    known[node] = node.target(*args, **kwargs)
                    if node in chosen:
                        spent += counter() - began
            raise AssertionError("a program ends with its output")

        return run

    def _choosing(self) -> set[fx.Node]:
        ops = torch.ops.shadowc
        placeholders = self.graph.find_nodes(op="placeholder")
        scoring = {
            node
            for name, node in zip(self.weights, placeholders, strict=False)
            if name.startswith("predictor.")
        }
        selects = {
            node
            for op in (ops.select.default, ops.select_above.default)
            for node in self.graph.find_nodes(op="call_function", target=op)
        }
        needed = set(selects)
        for node in reversed(list(self.graph.nodes)):
            if node in needed:
                needed.update(node.all_input_nodes)
        chosen: set[fx.Node] = set()
        for node in self.graph.nodes:
            if node.op != "call_function":
                continue
            inputs = node.all_input_nodes
            predicts = node in needed and any(i in scoring for i in inputs)
            unpacks = bool(inputs) and all(i in chosen for i in inputs)
            if predicts or (unpacks and getattr(node.target, "namespace", "") != "shadowc"):
                chosen.add(node)
            if predicts and node not in selects:  # what runs by a selection predicts nothing
                scoring.add(node)
        return chosen


def _own(session: Session, prompt: Tensor, capacity: int, program: str | None) -> Variant:
    cache = session.new_cache(prompt.shape[0], capacity)
    session.step(prompt, cache)

    def step(token: Tensor) -> Mapping[str, Tensor]:
        return session.step(token, cache, program=program)

    return Variant(step, Usage.of(session), wait=_wait(session))


def _wait(session: Session) -> Callable[[], None] | None:
    return session.synchronize if session.device.type == "cuda" else None


def _eager_types(artifact: Artifact) -> dict[str, torch.dtype]:
    own = getattr(torch, artifact.manifest["dtype"])
    if artifact.manifest["target"] != "cpu":
        return {"hugging_face": own}
    types = {"hugging_face": own}
    return types if own == torch.float32 else types | {"hugging_face_fp32": torch.float32}


def _eager(artifact: Artifact, prompt: Tensor, dtype: torch.dtype, session: Session) -> Variant:
    """The original model as transformers runs it, with its own cache."""
    stored = getattr(torch, artifact.manifest["dtype"])
    size = artifact.manifest["files"][WEIGHTS]["bytes"] * dtype.itemsize // stored.itemsize
    if size > (free := free_memory(session)):
        raise ModelError("not enough memory", expected=f"{size} bytes", got=f"{free} free")
    device = session.device
    model = original(artifact, dtype).model.to(device)
    cache = model(input_ids=prompt.to(device), use_cache=True).past_key_values

    def step(token: Tensor) -> None:
        model(input_ids=token.to(device), past_key_values=cache, use_cache=True)

    return Variant(step, wait=_wait(session))


def _take_turns(
    variants: Sequence[Variant], text: Tensor, progress: Callable[[float], None]
) -> None:
    for start in range(0, text.shape[1], TURN):
        turn = start // TURN % len(variants)
        for variant in (*variants[turn:], *variants[:turn]):  # nobody is always after the same one
            if sum(variant.times) < PATIENCE:
                variant.decode(text[:, start : start + TURN], measured=True)
        progress(min(1.0, (start + TURN) / text.shape[1]))


def _figures(
    artifact: Artifact,
    session: Session,
    variants: Mapping[str, Variant],
    selection: float | None,
) -> dict[str, Any]:
    own, library = variants["artifact"], variants["dense"]
    dense = min(library, variants.get("full", library), key=lambda variant: variant.ms)
    usage = own.usage or Usage.of(session)
    bandwidth = read_bandwidth(device=session.device.type)
    head = session.shape.vocab * session.shape.hidden * usage.element_size
    read = usage.layer_bytes + usage.predictor_bytes + head
    weights = sum(t.nbytes for t in session.tensors.values())
    exact = variants.get("exact") or (own if "exact" in session.programs else None)
    eager, eager_fp32 = (variants.get(f"hugging_face{suffix}") for suffix in ("", "_fp32"))
    return {
        "ms_per_token": own.ms,
        "dense_ms_per_token": dense.ms,
        "dense_by_kernels_ms": variants["full"].ms if "full" in variants else None,
        "dense_by_library_ms": library.ms if "full" in variants else None,
        "exact_ms_per_token": exact.ms if exact else None,
        "hugging_face_ms_per_token": eager.ms if eager else None,
        "hugging_face_fp32_ms_per_token": eager_fp32.ms if eager_fp32 else None,
        "speedup": dense.ms / own.ms,
        "speedup_over_hugging_face": eager.ms / own.ms if eager else None,
        "selection_ms": selection,
        "selection_share_of_dense": None if selection is None else selection / dense.ms,
        "bytes_per_token": round(read),
        "dense_bytes_per_token": usage.dense_bytes + head,
        "bandwidth_share": read / (own.ms / 1e3) / bandwidth,
        "dense_bandwidth_share": (usage.dense_bytes + head) / (dense.ms / 1e3) / bandwidth,
        "read_bandwidth": round(bandwidth),
        **{k: v for k, v in usage.to_json().items() if k != "tokens"},
        "weights_bytes": weights,
        "model": artifact.manifest["model"]["name"],
        "random_weights": artifact.manifest["model"]["kind"] == "random",
        "dtype": artifact.manifest["dtype"],
        **device(session.device.type),
        "versions": versions(),
    }


def _check(prompt_len: int, new_tokens: int, batch: int, limit: int) -> None:
    least = WARM_UP + TURN
    for name, value, low in (("prompt-len", prompt_len, 1), ("new-tokens", new_tokens, least),
                             ("batch", batch, 1)):  # fmt: skip
        if value < low:
            raise OptionError(f"--{name} is out of range", expected=f"at least {low}", got=value)
    if prompt_len + new_tokens > limit:
        raise LengthError(
            "the prompt and the new tokens do not fit in the compiled length",
            expected=f"at most {limit} tokens together",
            got=f"{prompt_len} + {new_tokens}",
            fix="measure fewer tokens, or compile with a larger --max-seq-len",
        )


def _gpu_seconds(work: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
