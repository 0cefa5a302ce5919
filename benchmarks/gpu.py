"""Decode speed on the GPU that is here: `python benchmarks/gpu.py [MODEL ...] --json FILE`.

Models are shapes with random weights, made on the GPU; masks come from a real predictor (random
weights, the stated rank) and are refreshed at every token. Everything runs in one process: each
round plays all variants, one after the other, over the same 128 positions after a prompt of 128,
and figures are medians of rounds.

    dense      every unit: the faster of cuBLAS (with our attention) and our own kernels, both as
               CUDA graphs
    exact      every unit, rows of exactly zero activations not read (ReLU)
    30%, ...   that share of heads and of neurons skipped, as executed, zero rows not read
    lazy K/V   keys and values of skipped heads wait; every position, with a new token at each, as
               what waits depends on the masks of the tokens before
    DejaVu     two-layer predictors of the published ranks before every attention and MLP, top-k in
               every layer, 50% of the units, the same kernels otherwise
    batch B    B rows a step; neurons that any row keeps are read once, heads skip in attention
    N slots    a cache of that many tokens
    95% zeros  the biases of the first MLP projection shifted so that 95% of activations are zero

Bytes are those that must be read: weights of what runs, the predictor's and the output head's, and
the cache of kept heads. The limit is a sum over 4 GB, measured in the same process.
"""

from __future__ import annotations

import argparse
import copy
import json
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from shadowc import cuda
from shadowc.calibration.damage import LEVELS
from shadowc.calibration.predictor import ShadowPredictor
from shadowc.calibration.quantiles import QUANTILES
from shadowc.calibration.store import Calibration
from shadowc.compiler import build_programs
from shadowc.config import ModelShape, Policy, taps_of
from shadowc.evaluation.baselines import dejavu_counts, dejavu_session
from shadowc.models import FAMILIES, LoadedModel, ModelSource, known_config, model_shape
from shadowc.passes.manager import copy_module
from shadowc.runtime.cuda import CudaSession
from shadowc.runtime.lazy import CATCH_UP, LAZY
from shadowc.runtime.model import ShadowcForCausalLM
from shadowc.runtime.session import Session
from shadowc.runtime.usage import Usage
from shadowc.targets import load_target
from shadowc.trace import trace
from shadowc.versions import versions

MODELS = ("opt-1.3b", "opt-6.7b", "opt-13b", "opt-30b", "llama-2-7b", "llama-2-13b")
PROMPT, NEW = 128, 128
STRIDE = 4
ROUNDS = 3
PREDICTORS = ("masks held", "threshold", "4 taps", "layerwise")
QUANTILE_95 = 1.645


@dataclass
class Row:
    """One variant of one model."""

    name: str
    ms: float
    gigabytes: float
    heads: float
    neurons: float
    rows: float


def meta_model(name: str, dtype: torch.dtype) -> LoadedModel:
    """An architecture without weights."""
    config = known_config(name)
    with torch.device("meta"):
        model = FAMILIES[config.model_type][1](config).to(dtype).eval()
    model.requires_grad_(False)
    source = ModelSource(f"random:{name}", "random", None, None, "none")
    return LoadedModel(model, None, model_shape(config), source)


def random_calibration(
    shape: ModelShape,
    rank: int,
    random_features: int = 512,
    taps: tuple[int, ...] = (0,),
    feature: str = "residual",
) -> Calibration:
    """Predictors of the stated rank with random weights: scores around 0, so half are above it."""
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for tap in taps_of(shape.layers, taps):
        network = ShadowPredictor(shape, rank, random_features, tap=tap)
        for name, buffer in network.state_dict().items():
            if buffer.dim() > 1 and buffer.numel():
                buffer.normal_(0, buffer.shape[1] ** -0.5, generator=generator)
            weights[f"{tap.layer}.{name}"] = buffer
    zeros = torch.zeros(shape.layers, shape.ffn)
    none = torch.zeros(shape.layers, LEVELS)
    even = 1e-3 * torch.linspace(-1, 1, QUANTILES).expand(shape.layers, -1).contiguous()
    return Calibration(
        model={}, shape=shape, criterion="random", predictor="shadow", feature=feature,
        taps=taps, rank=rank, random_features=random_features, data="none", examples=0, tokens=0,
        seq_len=0, seed=0, metrics={}, versions={},
        mean_head_scores=torch.zeros(shape.layers, shape.heads), mean_neuron_scores=zeros,
        zero_rate=zeros, head_quantiles=even, neuron_quantiles=even,
        head_damage=none, neuron_damage=none, weights=weights,
    )  # fmt: skip


def random_keep(shape: ModelShape, policy: Policy) -> dict[str, Tensor]:
    """Keep sets of the policy, of units as they come."""
    generator, keep = torch.Generator().manual_seed(2), {}
    for kind, layers, units, kept in (
        ("head", shape.layers - 1, shape.heads, policy.heads_kept(shape)),
        ("neuron", shape.layers, shape.ffn, policy.neurons_kept(shape)),
    ):
        skipped = torch.ones(layers * units, dtype=torch.bool)
        skipped[torch.randperm(layers * units, generator=generator)[:kept]] = False
        skipped = skipped.view(layers, 1, units)
        keep[f"{kind}_index"] = skipped.int().argsort(dim=-1, stable=True).int()
        keep[f"{kind}_count"] = (~skipped).sum(dim=-1).int()
    return keep


def random_weights(packed: Mapping[str, Tensor], hidden: int) -> dict[str, Tensor]:
    """Weights on the GPU for tensors that have none."""
    made: dict[str, Tensor] = {}
    generator = torch.Generator("cuda").manual_seed(0)
    for name, value in packed.items():
        if value.device.type != "meta":
            made[name] = value.to("cuda")
            continue
        new = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        if "norm" in name and name.endswith("weight"):
            made[name] = new.fill_(1.0)
        elif name.endswith("inv_freq"):
            size = value.shape[0]
            made[name] = 10000.0 ** (-torch.arange(size, device="cuda") / size)
        else:
            made[name] = new.normal_(0, hidden**-0.5, generator=generator)
    return made


def shift_biases(tensors: Mapping[str, Tensor], by: float) -> None:
    """Shift what is added before the activation of every MLP."""
    for name, value in tensors.items():
        if name.endswith("fc1_weight_shift"):
            value.add_(by)


class Bench:
    """One model: programs of several budgets over one set of weights."""

    def __init__(
        self, name: str, dtype: torch.dtype, rank: int, slots: int, batches: tuple[int, ...] = (1,)
    ) -> None:
        self.dtype, self.batches, self.slots = dtype, batches, slots
        self.jit = True
        self.loaded = meta_model(name, dtype)
        self.shape, self.config = self.loaded.shape, self.loaded.model.config
        self.policy = Policy(0.5, 0.5)
        self.traced = trace(self.loaded.model).module(check_guards=False)
        for key, value in [*self.traced.named_parameters()]:  # real ones may follow a norm's
            owner, _, leaf = key.rpartition(".")
            if "norm" in owner:
                real = torch.full(value.shape, float(leaf == "weight"), dtype=dtype)
                made = torch.nn.Parameter(real, requires_grad=False)
                setattr(self.traced.get_submodule(owner), leaf, made)
        self.session = self._build(random_calibration(self.shape, rank), self.policy, lazy_kv=True)
        self.rank = rank

    def _build(self, calibration: Calibration, policy: Policy, *, lazy_kv: bool) -> Session:
        """A session of weights that are not made yet."""
        built = build_programs(
            copy_module(self.traced), self.loaded, calibration, policy, load_target("h100"),
            self.dtype, lazy_kv=lazy_kv,
        )  # fmt: skip
        return Session(
            self.shape, policy, built.programs, built.packed, {}, self.slots, built.predictor_bytes
        )

    def to_gpu(self) -> None:
        """Make the weights."""
        self.session.tensors = random_weights(self.session.tensors, self.shape.hidden)

    def with_predictor(self, name: str) -> Session:
        """The decode program of another choice of masks, over the same weights.

        Args:
            name: `masks held` (no predictor runs), `threshold` (instead of top-k), `N taps`, or
                `layerwise`; the latter two choose by threshold.
        """
        policy = replace(self.policy, selection="threshold")
        if name == "layerwise":
            how: tuple[Any, ...] = (64, 0, tuple(range(self.shape.layers)), "entry")
        elif name.endswith("taps"):
            step = self.shape.layers // int(name.split()[0])
            how = (self.rank, 512, tuple(range(0, self.shape.layers, step)))
        else:
            how = (self.rank,)
        if name == "masks held":
            policy = replace(self.policy, refresh=2)
        session = self._build(random_calibration(self.shape, *how), policy, lazy_kv=False)
        step = "hold" if name == "masks held" else "decode"
        session.programs = {step: session.programs[step]}
        if step == "hold":
            session.static_keep = random_keep(self.shape, policy)
        own = {k: v for k, v in session.tensors.items() if k not in self.session.tensors
               or k.startswith("predictor.")}  # fmt: skip
        session.tensors = {
            k: self.session.tensors[k] for k in session.tensors if k not in own
        } | own
        return session

    def with_budget(self, share: float, *, lazy: bool = False) -> CudaSession:
        """The decode programs with another number of units kept, the lazy one among them or not."""
        policy = Policy(share, share)
        before = self.policy.heads_kept(self.shape), self.policy.neurons_kept(self.shape)
        after = policy.heads_kept(self.shape), policy.neurons_kept(self.shape)
        session = copy.copy(self.session)
        session.programs, session._bound, session.policy = {}, {}, policy
        for name, program in self.session.programs.items():
            if not lazy and name in (*LAZY.values(), CATCH_UP):
                continue
            graph = copy.deepcopy(program.graph)
            selects = graph.find_nodes(
                op="call_function", target=torch.ops.shadowc.select.default, sort=True
            )
            for node in selects:
                node.args = (node.args[0], after[before.index(node.args[1])], *node.args[2:])
            session.programs[name] = replace(program, graph=graph)
        return CudaSession.of(session, self.batches, cuda.profile().name, jit=self.jit)

    def with_dejavu(self, share: float) -> Session:
        """The decode program with a predictor before every attention and MLP."""
        session = copy.copy(self.session)
        session.policy = Policy(share, share)
        return dejavu_session(session)[0]


def player(
    session: CudaSession,
    program: str,
    batch: int = 1,
    prompt: int = PROMPT,
    counts: Mapping[str, Tensor] | None = None,
) -> tuple[Callable[[], int], Usage, Any]:
    """What plays a variant's steps and says how many; and what ran (counts: if it cannot say)."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, session.shape.vocab, (NEW, batch, 1), generator=generator)
    ids, lazy = ids.to(session.device), program in LAZY.values()
    cache = session.new_cache(batch)
    for layer in cache.tensors:
        layer.normal_(0, 0.5)
    cache.length = prompt
    usage = Usage.of(session)
    for token in ids[: NEW if lazy else 3]:  # captures on the first
        usage.add({**session.step(token, cache, program=program), **(counts or {})})
    graph = cache.memory.graphs[program][0]
    memory = cache.memory

    def play() -> int:
        places = range(0, NEW, 1 if lazy else STRIDE)
        for place in places:
            memory.position.fill_(prompt + place)
            if lazy:
                memory.ids.copy_(ids[place])
            graph.replay()
        return len(places)

    return play, usage, cache


def tables(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Batches and long caches: dense beside 50%, in milliseconds a step."""
    found: dict[str, Any] = {"batches": {}, "slots": {}}
    for batch in options.batches:
        session = CudaSession.of(bench.session, (batch,), cuda.profile().name, jit=bench.jit)
        found["batches"][batch] = pairs(session, batch, PROMPT)
    for slots in options.slots:
        longer = copy.copy(bench.session)
        longer.max_seq_len, longer._bound = slots, {}
        session = CudaSession.of(longer, (1,), cuda.profile().name, jit=bench.jit)
        found["slots"][slots] = pairs(session, 1, slots - NEW)
    for title, rows in found.items():
        for size, row in rows.items():
            dense = min(row["dense, cuBLAS"], row["dense, our kernels"])
            print(f"{title} {size:6}: " + ", ".join(f"{k} {v:.3f}" for k, v in row.items())
                  + f" ({dense / row['50%']:.2f}x)", flush=True)  # fmt: skip
    return found


def pairs(session: CudaSession, batch: int, prompt: int) -> dict[str, float]:
    """Both dense runs and 50%, timed together."""
    programs = {"dense, cuBLAS": "dense", "dense, our kernels": "full", "50%": "decode"}
    made = {name: player(session, program, batch, prompt) for name, program in programs.items()}
    return timed({name: play for name, (play, _, _) in made.items()})


def timed(plays: Mapping[str, Callable[[], int]], rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds a step of each variant, medians of interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in plays}
    for play in plays.values():
        play()
    for _ in range(rounds):
        for name, play in plays.items():
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            steps = play()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) / steps)
    return {name: statistics.median(values) for name, values in times.items()}


def read_bandwidth() -> float:
    """Bytes a second of a sum over 4 GB."""
    buffer = torch.empty(1 << 30, device="cuda").normal_()
    seconds = []
    for _ in range(12):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        buffer.sum()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return buffer.nbytes / statistics.median(seconds)


def must_read(session: CudaSession, usage: Usage, program: str, slots: float) -> float:
    """Bytes that a token of a batch of one must read."""
    shape, item = session.shape, usage.element_size
    head = shape.vocab * shape.hidden * item
    predictor = session.predictor_bytes if program in ("decode", "lazy") else 0.0
    kept = float(usage.heads.sum()) / max(usage.tokens, 1)
    cache = 2 * kept * slots * shape.head_dim * item * shape.kv_heads / shape.heads
    return usage.layer_bytes + predictor + head + cache


def measure(name: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """All variants of one model."""
    began = time.perf_counter()
    bench = Bench(name, getattr(torch, options.dtype), options.rank, PROMPT + NEW)
    if options.images:  # then nothing is compiled here: what is missing is an error
        bench.jit = False
        cuda.clear_images()
        for part in sorted(options.images.glob(f"{name}-[0-9]*")):
            cuda.load_images(part, cuda.profile().arch)
    bench.to_gpu()
    plain = bench.with_budget(0.5)
    made: dict[str, tuple[CudaSession, str]] = {
        "dense, cuBLAS": (plain, "dense"),
        "dense, our kernels": (plain, "full"),
    }
    if "exact" in plain.programs:
        made["exact"] = (plain, "exact")
    made |= {f"{share:.0%}": (bench.with_budget(share), "decode") for share in options.sparsities}
    made["50%, lazy K/V"] = (bench.with_budget(0.5, lazy=True), "lazy")
    for kind in options.predictors:
        session = bench.with_predictor(kind)
        session.tensors = random_weights(session.tensors, bench.shape.hidden)
        cuda_session = CudaSession.of(session, (1,), cuda.profile().name, jit=bench.jit)
        made[f"50%, {kind}"] = (cuda_session, next(iter(session.programs)))
    if options.dejavu:
        session = bench.with_dejavu(0.5)
        session.tensors = random_weights(session.tensors, bench.shape.hidden)
        made["DejaVu, 50%"] = (
            CudaSession.of(session, (1,), cuda.profile().name, jit=bench.jit),
            "decode",
        )
    rows = play_all(made)
    at = next(share for share in made if share.endswith("%"))
    generate = generate_ms(bench, made["50%" if "50%" in made else at][0])
    eager = eager_ms(name, getattr(torch, options.dtype)) if name in options.eager else None
    relu = bench.shape.activation == "relu"
    if relu and options.zeros:
        shift_biases(plain.tensors, -QUANTILE_95)
        keep = ("exact", "50%", "50%, lazy K/V")
        zeros = {k: v for k, v in made.items() if k in keep or k.startswith("dense, our")}
        rows += [
            Row(f"{row.name}, 95% zeros", row.ms, row.gigabytes, row.heads, row.neurons, row.rows)
            for row in play_all(zeros)
        ]
    dense = min(row.ms for row in rows if row.name in ("dense, cuBLAS", "dense, our kernels"))
    print(f"\n{name}: {options.dtype}, batch 1, prompt {PROMPT} + {NEW}, rank {options.rank}")
    print(f"{'variant':28} {'ms':>7} {'speedup':>8} {'GB':>6} {'limit':>6} {'heads':>6} "
          f"{'neurons':>8} {'rows':>6}")  # fmt: skip
    for row in rows:
        share = row.gigabytes * 1e9 / limit / (row.ms / 1e3)
        print(
            f"{row.name:28} {row.ms:7.3f} {dense / row.ms:7.2f}x {row.gigabytes:6.2f} "
            f"{share:6.2f} {row.heads:6.1%} {row.neurons:8.1%} {row.rows:6.1%}",
            flush=True,
        )
    print(f"{'50%, through generate':28} {generate:7.3f}")
    more = tables(bench, options) if name in options.tables else {}
    if eager:
        print(f"{'transformers, eager':28} {eager:7.3f}")
    return {
        "model": name,
        "generate_ms": generate,
        "eager_ms": eager,
        **more,
        "seconds": round(time.perf_counter() - began, 1),
        "rows": [vars(row) | {"limit_share": row.gigabytes * 1e9 / limit / (row.ms / 1e3),
                              "speedup": dense / row.ms} for row in rows],
    }  # fmt: skip


def generate_ms(bench: Bench, session: CudaSession) -> float:
    """Milliseconds a token of `generate`, greedy, the prompt's time taken off."""
    ending = GenerationConfig(pad_token_id=1, eos_token_id=None)
    model = ShadowcForCausalLM(bench.config, ending, session, {}, None)
    return per_token(model.generate, session.shape.vocab)


def eager_ms(name: str, dtype: torch.dtype) -> float:
    """The same for transformers' own model with random weights, as a user gets it."""
    model = meta_model(name, dtype).model.to_empty(device="cuda")
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)
    for buffer in model.buffers():
        buffer.fill_(0.01)
    model.generation_config = GenerationConfig(pad_token_id=1, eos_token_id=None)
    return per_token(model.generate, model.config.vocab_size)


def per_token(generate: Callable[..., Tensor], vocab: int) -> float:
    """Milliseconds a token between the 8th new one and the 40th, the median of three."""
    ids = torch.randint(5, vocab, (1, PROMPT), device="cuda")
    found = []
    for _ in range(4):
        marks = []
        for new in (8, 40):
            torch.cuda.synchronize()
            began = time.perf_counter()
            generate(input_ids=ids, max_new_tokens=new, do_sample=False)
            torch.cuda.synchronize()
            marks.append(time.perf_counter() - began)
        found.append((marks[1] - marks[0]) / 32 * 1e3)
    return statistics.median(found[1:])


def play_all(made: Mapping[str, tuple[CudaSession, str]]) -> list[Row]:
    """Time variants together."""
    plays, about = {}, {}
    for name, (session, program) in made.items():
        counts = dejavu_counts(session, 1) if name.startswith("DejaVu") else None
        play, usage, cache = player(session, program, counts=counts)
        plays[name] = play
        about[name] = session, usage, program, cache
    times = timed(plays)
    rows = []
    for name, ms in times.items():
        session, usage, program, _ = about[name]
        counts = usage.to_json()
        read = float(usage.rows.sum()) / (usage.tokens * session.shape.ffn * session.shape.layers)
        size = must_read(session, usage, program, PROMPT + NEW / 2) / 1e9
        rows.append(
            Row(name, ms, size, 1 - counts["head_sparsity"], 1 - counts["neuron_sparsity"], read)
        )
    return rows


def page(found: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    lines = [
        f"# Decode speed on one {found['profile'].upper()}",
        "",
        f"{found['device']}, {found['date']}; {versions}; {found['dtype']}, batch 1, prompt "
        f"{PROMPT} + {NEW} new tokens, predictor of rank {found['rank']}, masks refreshed at every "
        "token, random weights (speed only). Medians of interleaved rounds in one process. A sum "
        f"over 4 GB reads {found['read_bandwidth'] / 1e9:.0f} GB/s: the limit of that column.",
        "",
        "Speedups are over the faster dense run. `rows`: rows of the second MLP projection that "
        "were read (random weights: half of the activations after a ReLU are zero; SwiGLU has no "
        "zeros). `95% zeros`: biases of the first projection shifted so that 95% of the "
        "activations are exactly zero, as in large trained OPTs.",
    ]
    head = (
        "variant",
        "ms a token",
        "speedup",
        "GB read",
        "of the limit",
        "heads",
        "neurons",
        "rows",
    )
    for result in found["results"]:
        lines += ["", f"## {result['model']}", "", f"| {' | '.join(head)} |"]
        lines += ["| --- |" + " ---: |" * (len(head) - 1)]
        lines += [
            f"| {row['name']} | {row['ms']:.3f} | {row['speedup']:.2f}x | {row['gigabytes']:.2f} | "
            f"{row['limit_share']:.2f} | {row['heads']:.0%} | {row['neurons']:.0%} | "
            f"{row['rows']:.1%} |"
            for row in result["rows"]
        ]
        for name, key in (("50%, `generate`", "generate_ms"), ("transformers eager", "eager_ms")):
            if result[key]:
                lines += [f"| {name} | {result[key]:.3f} |" + " |" * (len(head) - 2)]
        for kind in ("batches", "slots"):
            for size, times in result.get(kind, {}).items():
                shown = ", ".join(f"{name} {ms:.3f}" for name, ms in times.items())
                lines += ["", f"{kind} {size}: {shown} ms a step."]
    command = shlex.join(["python", "-P", "benchmarks/gpu.py", *found["arguments"]])
    return "\n".join([*lines, "", f"    {command}", ""])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.3, 0.5, 0.7])
    parser.add_argument("--no-dejavu", dest="dejavu", action="store_false")
    parser.add_argument("--no-zeros", dest="zeros", action="store_false")
    parser.add_argument("--predictors", nargs="*", default=list(PREDICTORS))
    parser.add_argument("--tables", nargs="*", default=["llama-2-7b"], help="batches and caches")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 8, 16])
    parser.add_argument("--slots", type=int, nargs="*", default=[2048, 8192, 32768])
    parser.add_argument("--eager", nargs="*", default=["opt-13b"], help="also in transformers")
    parser.add_argument("--json", type=Path, help="and a page of the same name")
    parser.add_argument("--images", type=Path, help="kernels that --compile wrote")
    parser.add_argument("--compile", type=Path, help="write an H100's kernels there; needs no GPU")
    options = parser.parse_args()
    if options.compile:
        for name in options.models:
            bench = Bench(name, getattr(torch, options.dtype), options.rank, PROMPT + NEW)
            sessions = [bench.session, *([bench.with_dejavu(0.5)] if options.dejavu else [])]
            sessions += [bench.with_predictor(kind) for kind in options.predictors]
            batches = options.batches if name in options.tables else [1]
            if name in options.tables:
                for slots in options.slots:
                    longer = copy.copy(bench.session)
                    longer.max_seq_len = slots
                    sessions.append(longer)
            for part, session in enumerate(sessions):
                load_target("h100").save(session, batches, options.compile / f"{name}-{part}")
            print(f"compiled the kernels of {name}", flush=True)
        return
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    about = {
        "device": torch.cuda.get_device_name(),
        "profile": cuda.profile().name,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
        "dtype": options.dtype,
        "rank": options.rank,
        "arguments": sys.argv[1:],
    }
    with torch.inference_mode():
        limit = read_bandwidth()
        print(f"{about}; a sum reads {limit / 1e9:.0f} GB/s", flush=True)
        torch.cuda.empty_cache()
        results = []
        for name in options.models:
            results.append(measure(name, options, limit))
            torch.cuda.empty_cache()
            if options.json:
                found = {**about, "read_bandwidth": limit, "results": results}
                options.json.write_text(json.dumps(found, indent=1) + "\n")
                options.json.with_suffix(".md").write_text(page(found))


if __name__ == "__main__":
    main()
