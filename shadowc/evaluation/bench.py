"""Speed of an artifact beside its dense original, measured together.

Every variant decodes the same text after the same prompt, in turns of a few tokens, so that a
change of the machine's mood meets all of them. Figures are medians of the tokens' times, and ratios
are of medians of one run.

    artifact            predictor, selection, sparse ops
    dense               the same runtime and weights, nothing skipped; on a GPU the faster of cuBLAS
                        and our own kernels, both as CUDA graphs
    exact               every unit, rows of exactly zero activations not read (ReLU models)
    static, dejavu      other ways to choose as many units: see `baselines`
    hf                  the original model in transformers: `hugging_face`, eager, same type, same
                        threads; on a CPU also `hugging_face_fp32`, which is the faster one where
                        there is no half arithmetic
    hf-compiled         `hugging_face_compiled`: the same through `generate` with a static cache and
                        transformers' own torch.compile; on a CPU it only compiles when told to
"""

from __future__ import annotations

import functools
import platform
import resource
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from shadowc import native
from shadowc.artifact import Artifact
from shadowc.errors import LengthError, ModelError, OptionError, ShadowcError
from shadowc.evaluation.baselines import dejavu_counts, dejavu_session, static_session
from shadowc.evaluation.sources import held_out, original
from shadowc.runtime.loading import load
from shadowc.runtime.program import Program
from shadowc.runtime.session import Session
from shadowc.runtime.usage import Usage
from shadowc.targets import ANY_BATCH, ON_CPU
from shadowc.versions import versions

#: The ops that choose units.
_SELECTIONS = ("select", "select_above", "choose_above", "choose_into")

#: Tokens that a variant decodes before the next one has its turn.
TURN = 8
#: Tokens at the beginning that are not measured, and the least that are.
WARM_UP = 8
#: Tokens over which predictor and selection are timed.
SELECTIONS = 32
#: A variant that has taken this many seconds sits out the remaining turns.
PATIENCE = 15.0
#: Seconds after which transformers' compile is given up.
COMPILE_PATIENCE = 600.0

#: What an artifact can be measured against; by default against what is cheap to load.
AGAINST = ("dense", "exact", "static", "dejavu", "hf", "hf-compiled")
DEFAULT = ("dense", "exact", "hf")

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
    def spent(self) -> float:
        """Seconds that its turns took."""
        return sum(self.times)

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


@dataclass
class Generated:
    """A model that decodes inside `generate`: a turn is a short generation and a long one.

    Attributes:
        generate: Generates so many tokens after the prompt.
        lengths: The short and the long number of tokens.
        times: Seconds a token of each turn: what the longer generation took longer.
        spent: Seconds that its turns took, prompts included.
        compile_seconds: What the first generation took, which compiled.
    """

    generate: Callable[[int], object]
    lengths: tuple[int, int]
    times: list[float] = field(default_factory=list)
    spent: float = 0.0
    compile_seconds: float = 0.0
    usage: None = None

    @property
    def ms(self) -> float:
        """Median of the turns, in milliseconds a token."""
        return statistics.median(self.times) * 1e3

    def warm_up(self) -> None:
        """Compile, then have both lengths once.

        Raises:
            ModelError: If it takes longer than `COMPILE_PATIENCE`, or fails.
        """
        with _at_most(COMPILE_PATIENCE, "transformers' compile"):
            try:  # long first: the static cache keeps its size, and the compiled code its shapes
                self.compile_seconds = _seconds(lambda: self.generate(self.lengths[1]))
                self._turn()
            except RuntimeError as error:
                raise ModelError(
                    "transformers could not compile the model", got=str(error).partition("\n")[0]
                ) from error

    def decode(self, ids: Tensor, measured: bool) -> None:
        """Take a turn, whatever the text: the time of a token is the same for any."""
        if measured:
            short, long = self._turn()
            self.spent += short + long
            self.times.append((long - short) / (self.lengths[1] - self.lengths[0]))

    def _turn(self) -> list[float]:
        return [_seconds(functools.partial(self.generate, length)) for length in self.lengths]


@torch.inference_mode()
def bench(
    artifact: Artifact,
    *,
    against: Sequence[str] | None = None,
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
        against: Names out of `AGAINST`; None takes those of `DEFAULT` that apply. `dense` always
            runs: the speedup needs it.
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
        OptionError: If there is nothing to measure, or a name of `against` is unknown or does not
            apply to this artifact.
        LengthError: If prompt and new tokens do not fit in the compiled length.
        ModelError: If a model that was asked for cannot be run.
    """
    _check_names(against or (), hugging_face)
    _check(prompt_len, new_tokens, batch, artifact.manifest)
    before = peak_memory()
    model = load(artifact.path, allow_jit=allow_jit)
    session = model.session
    gpu = session.device.type == "cuda"
    tokens = prompt_len + new_tokens
    windows = held_out(model, data, tokens, batch * tokens)
    ids = torch.tensor([windows[row % len(windows)] for row in range(batch)])
    prompt, text = ids[:, :prompt_len], ids[:, prompt_len:]

    variants: dict[str, Variant | Generated] = {"artifact": _own(session, prompt, tokens, None)}
    variants["artifact"].decode(text[:, :WARM_UP], measured=False)
    memory = torch.cuda.max_memory_allocated() if gpu else peak_memory()
    before = 0 if gpu else before
    variants["dense"] = _own(session, prompt, tokens, "dense")
    if "full" in session.programs:
        variants["full"] = _own(session, prompt, tokens, "full")
    loaded = functools.cache(functools.partial(_original, artifact, session))

    def eager(dtype: str) -> Variant:
        if not hugging_face:
            raise OptionError("not asked for")
        return _eager(loaded(dtype), prompt, session)

    makers: dict[str, Callable[[], Variant | Generated]] = {
        "exact": lambda: _exact(session, prompt, tokens),
        "static": lambda: _own(static_session(session), prompt, tokens, "hold"),
        "dejavu": lambda: _dejavu(session, prompt, tokens, allow_jit),
        "hugging_face": lambda: eager(artifact.manifest["dtype"]),
        "hugging_face_fp32": lambda: eager("float32"),
        "hugging_face_compiled": lambda: _compiled(
            loaded(artifact.manifest["dtype"]), prompt, new_tokens
        ),
    }
    left_out = {}
    for name in _variants(artifact, DEFAULT if against is None else against):
        try:
            if not (session.runs_programs or name.startswith("hugging_face")):
                raise OptionError(f"{name!r} does not apply: the ONNX model holds one policy")
            variants[name] = makers[name]()
        except ShadowcError as error:
            if against is not None and name != "hugging_face_fp32":
                raise
            left_out[name] = str(error)
    for name, variant in variants.items():
        if name != "artifact":
            variant.decode(text[:, :WARM_UP], measured=False)
    _take_turns(list(variants.values()), text[:, WARM_UP:], progress)
    selection = None
    if session.policy_in_effect(batch) == "sparse" and session.runs_programs:
        selection = selection_ms(session, prompt, text[:, :SELECTIONS])
    return _figures(artifact, session, variants, selection) | {
        "peak_memory_bytes": memory,
        "peak_memory_above_start_bytes": max(memory - before, 0),
        "policy_in_effect": session.policy_in_effect(batch),
        "batch": batch,
        "ms_per_step": variants["artifact"].ms,
        "ms_per_generated_token": variants["artifact"].ms / batch,
        "prompt_len": prompt_len,
        "new_tokens": new_tokens,
        "left_out": left_out,
    }


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
        placeholders = self.graph.find_nodes(op="placeholder")
        scoring = {
            node
            for name, node in zip(self.weights, placeholders, strict=False)
            if name.startswith("predictor.")
        }
        # By name: an artifact registers no ops but those that it runs.
        selects = {
            node
            for node in self.graph.nodes
            if getattr(node.target, "namespace", "") == "shadowc"
            and node.target._opname in _SELECTIONS
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


def _exact(session: Session, prompt: Tensor, capacity: int) -> Variant:
    if "exact" not in session.programs:
        raise OptionError("'exact' needs ReLU: this model's activations are never exactly zero")
    if not session.skips_units:
        raise OptionError("'exact' does not apply: it is what the artifact itself runs")
    return _own(session, prompt, capacity, "exact")


def _dejavu(session: Session, prompt: Tensor, capacity: int, allow_jit: bool) -> Variant:
    """The artifact's budget with DejaVu's predictors, of random weights."""
    batch, gpu = prompt.shape[0], session.device.type == "cuda"
    other, new = dejavu_session(session)
    if gpu and not allow_jit:
        raise OptionError(
            "'dejavu' has predictors whose kernels no artifact holds",
            expected="permission to compile them here",
            fix="add --allow-jit (needs Triton), or leave 'dejavu' out",
        )
    _check_room("dejavu's predictors", sum(value.nbytes for value in new.values()), session)
    generator, weights = torch.Generator(session.device).manual_seed(0), {}
    for name, value in new.items():
        weight = torch.empty(value.shape, dtype=value.dtype, device=session.device)
        weights[name] = weight.normal_(0, value.shape[1] ** -0.5, generator=generator)
    other.tensors = {**other.tensors, **weights}
    variant, counts = _own(other, prompt, capacity, "decode"), dejavu_counts(session, batch)
    step = variant.step

    def counted(token: Tensor) -> Mapping[str, Tensor]:
        return {**(step(token) or {}), **counts}

    # Which neurons the rows of a batch have in common is not known.
    usage = None if gpu and batch > 1 else variant.usage
    return Variant(counted, usage, wait=variant.wait)


def _variants(artifact: Artifact, against: Sequence[str]) -> Iterator[str]:
    """The keys of what was asked for besides `dense`, in the order of `AGAINST`."""
    halves = artifact.manifest["dtype"] != "float32"
    for name in AGAINST[1:]:
        if name in against:
            yield {"hf": "hugging_face", "hf-compiled": "hugging_face_compiled"}.get(name, name)
            if name == "hf" and artifact.manifest["target"] in ON_CPU and halves:
                yield "hugging_face_fp32"


def _check_room(what: str, size: int, session: Session) -> None:
    if size > (free := free_memory(session)):
        raise ModelError(
            f"not enough memory for {what}", expected=f"{size:,} bytes", got=f"{free:,} free"
        )


def _original(artifact: Artifact, session: Session, dtype: str) -> Any:
    """The original model where the session is."""
    wanted, stored = getattr(torch, dtype), getattr(torch, artifact.manifest["dtype"])
    size = artifact.weight_bytes * wanted.itemsize // stored.itemsize
    _check_room("the original model", size, session)
    return original(artifact, wanted).model.to(session.device)


def _eager(model: Any, prompt: Tensor, session: Session) -> Variant:
    """The original model as transformers runs it, with its own cache."""
    device = session.device
    cache = model(input_ids=prompt.to(device), use_cache=True).past_key_values

    def step(token: Tensor) -> None:
        model(input_ids=token.to(device), past_key_values=cache, use_cache=True)

    return Variant(step, wait=_wait(session))


def _compiled(model: Any, prompt: Tensor, new_tokens: int) -> Generated:
    """The original model as transformers compiles it: `generate` with a static cache."""
    from transformers import CompileConfig, GenerationConfig

    ids, compiles = prompt.to(model.device), None
    if model.device.type == "cpu":  # there transformers compiles only when it is told to
        compiles = CompileConfig()
        compiles._compile_all_devices = True

    def generate(tokens: int) -> None:
        config = GenerationConfig(
            max_new_tokens=tokens, do_sample=False, cache_implementation="static",
            compile_config=compiles, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        mask = torch.ones_like(ids)
        model.generate(input_ids=ids, attention_mask=mask, generation_config=config).cpu()

    variant = Generated(generate, (WARM_UP, new_tokens))
    variant.warm_up()
    return variant


@contextmanager
def _at_most(seconds: float, what: str) -> Iterator[None]:
    """Give up after a while; only in the main thread, which alone can be interrupted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    class TooLong(BaseException):
        """Not an Exception: compilers catch those."""

    def give_up(*_: object) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except TooLong as error:
        raise ModelError(
            f"{what} takes too long", expected=f"at most {seconds:.0f} s", got="more"
        ) from error
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _take_turns(
    variants: Sequence[Variant | Generated], text: Tensor, progress: Callable[[float], None]
) -> None:
    for start in range(0, text.shape[1], TURN):
        turn = start // TURN % len(variants)
        for variant in (*variants[turn:], *variants[:turn]):  # nobody is always after the same one
            if variant.spent < PATIENCE:
                variant.decode(text[:, start : start + TURN], measured=True)
        progress(min(1.0, (start + TURN) / text.shape[1]))


def _figures(
    artifact: Artifact,
    session: Session,
    variants: Mapping[str, Variant | Generated],
    selection: float | None,
) -> dict[str, Any]:
    own, library = variants["artifact"], variants["dense"]
    dense = min(library, variants.get("full", library), key=lambda variant: variant.ms)
    usage = own.usage or Usage.of(session)
    bandwidth = read_bandwidth(device=session.device.type)
    head = session.shape.vocab * session.shape.hidden * usage.element_size
    read = usage.layer_bytes + usage.predictor_bytes + head
    weights = sum(t.nbytes for t in session.tensors.values())
    random = artifact.manifest["model"]["kind"] == "random"
    read_dense = usage.dense_bytes + head
    shown: dict[str, Variant | Generated] = {"artifact": own, "dense": dense}
    if "full" in variants:
        shown |= {"dense_by_kernels": variants["full"], "dense_by_library": library}
    shown |= {k: v for k, v in variants.items() if k not in ("artifact", "dense", "full")}
    is_exact = "exact" in session.programs and not session.skips_units
    exact = shown.get("exact") or (own if is_exact else None)
    eager, compiled = shown.get("hugging_face"), shown.get("hugging_face_compiled")

    def ms(name: str) -> float | None:
        return shown[name].ms if name in shown else None

    def reads(name: str, variant: Variant | Generated) -> int | None:
        if name.startswith("hugging_face"):
            return read_dense * 4 // usage.element_size if name.endswith("fp32") else read_dense
        if variant.usage is None:
            return None
        return round(variant.usage.layer_bytes + variant.usage.predictor_bytes + head)

    return {
        "ms_per_token": own.ms,
        "dense_ms_per_token": dense.ms,
        "dense_by_kernels_ms": ms("dense_by_kernels"),
        "dense_by_library_ms": ms("dense_by_library"),
        "exact_ms_per_token": exact.ms if exact else None,
        "static_ms_per_token": ms("static"),
        "dejavu_ms_per_token": ms("dejavu"),
        "hugging_face_ms_per_token": ms("hugging_face"),
        "hugging_face_fp32_ms_per_token": ms("hugging_face_fp32"),
        "hugging_face_compiled_ms_per_token": ms("hugging_face_compiled"),
        "hugging_face_compile_seconds": (
            round(compiled.compile_seconds, 1) if isinstance(compiled, Generated) else None
        ),
        "variants": {
            name: {
                "ms_per_step": variant.ms,
                "beside_artifact": variant.ms / own.ms,
                "bytes": reads(name, variant),
                "random_weights": random or name == "dejavu",
            }
            for name, variant in shown.items()
        },
        "rows_share_bytes": usage.rows_share,
        "speedup": dense.ms / own.ms,
        "speedup_over_hugging_face": eager.ms / own.ms if eager else None,
        "selection_ms": selection,
        "selection_share_of_dense": None if selection is None else selection / dense.ms,
        "bytes_per_token": round(read),
        "dense_bytes_per_token": read_dense,
        "bandwidth_share": read / (own.ms / 1e3) / bandwidth,
        "dense_bandwidth_share": read_dense / (dense.ms / 1e3) / bandwidth,
        "read_bandwidth": round(bandwidth),
        **{k: v for k, v in usage.to_json().items() if k != "tokens"},
        "weights_bytes": weights,
        "model": artifact.manifest["model"]["name"],
        "random_weights": random,
        "dtype": artifact.manifest["dtype"],
        **device(session.device.type),
        "versions": versions(),
    }


def _check(prompt_len: int, new_tokens: int, batch: int, manifest: Mapping[str, Any]) -> None:
    least, limit = WARM_UP + TURN, int(manifest["max_seq_len"])
    for name, value, low in (("prompt-len", prompt_len, 1), ("new-tokens", new_tokens, least),
                             ("batch", batch, 1)):  # fmt: skip
        if value < low:
            raise OptionError(f"--{name} is out of range", expected=f"at least {low}", got=value)
    most = batch if manifest["target"] in ANY_BATCH else max(manifest.get("batch_sizes", (1,)))
    if batch > most:
        raise OptionError(
            "--batch is larger than the decode steps that this artifact has kernels for",
            expected=f"at most {most}",
            got=batch,
            fix="measure a smaller batch, or compile with larger --batch-sizes",
        )
    if prompt_len + new_tokens > limit:
        raise LengthError(
            "the prompt and the new tokens do not fit in the compiled length",
            expected=f"at most {limit} tokens together",
            got=f"{prompt_len} + {new_tokens}",
            fix="measure fewer tokens, or compile with a larger --max-seq-len",
        )


def _check_names(against: Sequence[str], hugging_face: bool) -> None:
    for name in against:
        if name not in AGAINST:
            raise OptionError(
                f"nothing to measure against is called {name!r}", expected=", ".join(AGAINST)
            )
        if name.startswith("hf") and not hugging_face:
            raise OptionError(f"--no-hugging-face excludes --against {name}")


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
