"""Decode speed on the GPU that is here: `python benchmarks/cuda.py [MODEL ...] --json FILE`.

Models are shapes with random weights, made on the GPU; masks come from a real predictor (random
weights, the stated rank) and are refreshed at every token. Everything runs in one process: each
round plays all variants, one after the other, over the same 128 positions after a prompt of 128,
and figures are medians of rounds.

    dense      every unit: the faster of cuBLAS + SDPA and our own kernels, both as CUDA graphs
    exact      every unit, rows of exactly zero activations not read (ReLU)
    30%, ...   that share of heads and of neurons skipped, as executed, zero rows not read
    95% zeros  the biases of the first MLP projection shifted so that 95% of activations are zero

Bytes are those that must be read: weights of what runs, the predictor's and the output head's, and
the cache of kept heads. The limit is a sum over 4 GB, measured in the same process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shadowc import cuda
from shadowc.calibration.predictor import ShadowPredictor
from shadowc.calibration.store import Calibration
from shadowc.compiler import build_programs
from shadowc.config import ModelShape, Policy
from shadowc.models import FAMILIES, LoadedModel, ModelSource, known_config, model_shape
from shadowc.passes.manager import copy_module
from shadowc.runtime.cuda import CudaSession
from shadowc.runtime.session import Session
from shadowc.runtime.usage import Usage
from shadowc.targets import load_target
from shadowc.trace import trace
from shadowc.versions import versions

MODELS = ("opt-1.3b", "opt-6.7b", "opt-13b", "opt-30b", "llama-2-7b", "llama-2-13b")
PROMPT, NEW = 128, 128
ROUNDS = 5
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


def random_calibration(shape: ModelShape, rank: int) -> Calibration:
    """A predictor of the stated rank with random weights."""
    generator = torch.Generator().manual_seed(0)
    network = ShadowPredictor(shape, rank, 512)
    for name, buffer in network.named_buffers():
        if name == "feature_scale":
            buffer.fill_(1.0)
        elif buffer.dim() > 1:
            buffer.normal_(0, buffer.shape[1] ** -0.5, generator=generator)
    zeros = torch.zeros(shape.layers, shape.ffn)
    return Calibration(
        model={}, shape=shape, criterion="random", predictor="shadow", feature="residual",
        rank=rank, random_features=512, data="none", examples=0, tokens=0, seq_len=0, seed=0,
        metrics={}, versions={}, mean_head_scores=torch.zeros(shape.layers, shape.heads),
        mean_neuron_scores=zeros, zero_rate=zeros, weights=dict(network.state_dict()),
    )  # fmt: skip


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
    """One model: programs of several policies over one set of weights."""

    def __init__(self, name: str, dtype: torch.dtype, rank: int, slots: int) -> None:
        self.name, self.dtype, self.slots = name, dtype, slots
        self.loaded = meta_model(name, dtype)
        self.shape = self.loaded.shape
        self.traced = trace(self.loaded.model).module(check_guards=False)
        self.calibration = random_calibration(self.shape, rank)
        self.tensors: dict[str, Tensor] = {}

    def session(self, policy: Policy, batch_sizes: tuple[int, ...] = (1,)) -> CudaSession:
        """The programs of a policy on the shared weights."""
        sparse = policy.head_sparsity > 0 or policy.neuron_sparsity > 0
        built = build_programs(
            copy_module(self.traced), self.loaded, self.calibration if sparse else None, policy,
            load_target("h100"), self.dtype,
        )  # fmt: skip
        missing = {k: v for k, v in built.packed.items() if k not in self.tensors}
        self.tensors |= random_weights(missing, self.shape.hidden)
        session = Session(
            self.shape, policy, built.programs, self.tensors, {}, self.slots, built.predictor_bytes
        )
        return CudaSession.of(session, batch_sizes)


def player(
    session: CudaSession, program: str, batch: int = 1, prompt: int = PROMPT
) -> tuple[Callable[[], None], Usage, Any]:
    """What plays a variant's steps over NEW positions; and what it ran."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, session.shape.vocab, (batch, 1), generator=generator)
    cache = session.new_cache(batch)
    for layer in cache.tensors:
        layer.normal_(0, 0.5)
    cache.length = prompt
    usage = Usage.of(session)
    for _ in range(3):  # captures on the first
        usage.add(session.step(ids, cache, program=program))
    graph = cache.memory.graphs[program][0]
    position = cache.memory.position

    def play() -> None:
        for slot in range(prompt, prompt + NEW):
            position.fill_(slot)
            graph.replay()

    return play, usage, cache


def timed(plays: Mapping[str, Callable[[], None]], rounds: int = ROUNDS) -> dict[str, float]:
    """Milliseconds a step of each variant, medians of interleaved rounds."""
    times: dict[str, list[float]] = {name: [] for name in plays}
    for play in plays.values():
        play()
    for _ in range(rounds):
        for name, play in plays.items():
            torch.cuda.synchronize()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            play()
            end.record()
            torch.cuda.synchronize()
            times[name].append(begin.elapsed_time(end) / NEW)
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
    predictor = session.predictor_bytes if program == "decode" else 0.0
    kept = float(usage.heads.sum()) / max(usage.tokens, 1)
    cache = 2 * kept * slots * shape.head_dim * item * shape.kv_heads / shape.heads
    return usage.layer_bytes + predictor + head + cache


def measure(name: str, options: argparse.Namespace, limit: float) -> dict[str, Any]:
    """All variants of one model."""
    began = time.perf_counter()
    bench = Bench(name, getattr(torch, options.dtype), options.rank, PROMPT + NEW)
    sessions = {share: bench.session(Policy(share, share)) for share in options.sparsities}
    plain = bench.session(Policy(0.0, 0.0))
    made: dict[str, tuple[CudaSession, str]] = {
        "dense, cuBLAS": (plain, "dense"),
        "dense, our kernels": (plain, "full"),
    }
    if "exact" in plain.programs:
        made["exact"] = (plain, "exact")
    made |= {f"{share:.0%}": (session, "decode") for share, session in sessions.items()}
    rows = play_all(made)
    relu = bench.shape.activation == "relu"
    if relu and options.zeros:
        shift_biases(bench.tensors, -QUANTILE_95)
        keep = ("exact", "50%")
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
        print(f"{row.name:28} {row.ms:7.3f} {dense / row.ms:7.2f}x {row.gigabytes:6.2f} "
              f"{share:6.2f} {row.heads:6.1%} {row.neurons:8.1%} {row.rows:6.1%}", flush=True)
    return {
        "model": name,
        "seconds": round(time.perf_counter() - began, 1),
        "rows": [vars(row) | {"limit_share": row.gigabytes * 1e9 / limit / (row.ms / 1e3),
                              "speedup": dense / row.ms} for row in rows],
    }  # fmt: skip


def play_all(made: Mapping[str, tuple[CudaSession, str]]) -> list[Row]:
    """Time variants together."""
    plays, about = {}, {}
    for name, (session, program) in made.items():
        play, usage, cache = player(session, program)
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(MODELS))
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    parser.add_argument("--rank", type=int, default=128)
    parser.add_argument("--sparsities", type=float, nargs="*", default=[0.3, 0.5, 0.7])
    parser.add_argument("--no-zeros", dest="zeros", action="store_false")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a GPU")
    about = {
        "device": torch.cuda.get_device_name(),
        "profile": cuda.profile().name,
        "versions": versions(),
        "date": time.strftime("%Y-%m-%d"),
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


if __name__ == "__main__":
    main()
