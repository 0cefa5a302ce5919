"""How close each op comes to the memory's streaming rate: `python benchmarks/ops.py`.

One decode token at the shapes of OPT-1.3B and SmolLM2-135M, weights in bfloat16, half of the units
kept or all of them. Weights rotate through more memory than the caches hold, as the layers of a
model do; rounds interleave the ops, and the fastest call counts. Bytes are the weight (or cache)
bytes that the op must read. Prints a table and, with `--json FILE`, writes it.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shadowc.kernels import (  # noqa: F401
    compact,
    decode_attention,
    linear,
    rms_norm,
    select,
    sparse_gated_mlp,
    sparse_mlp,
    sparse_out_proj,
    sparse_qkv,
)
from shadowc.native import isa

OPS = torch.ops.shadowc
DISTINCT_BYTES = 256 << 20
SHAPES = {
    # layers, heads, kv heads, head dim, hidden, ffn, vocabulary, gated
    "opt-1.3b": (24, 32, 32, 64, 2048, 8192, 50272, False),
    "smollm2-135m": (30, 9, 3, 64, 576, 1536, 49152, True),
}


@dataclass(frozen=True)
class Case:
    """One op at one shape: a call per copy of the weights, and what a call must read."""

    shape: str
    op: str
    kept: str
    gigabytes: float
    calls: Sequence[Callable[[], Any]]

    def seconds(self) -> float:
        """Time of the fastest call in one round over the copies."""
        fastest = float("inf")
        for call in self.calls:
            start = time.perf_counter()
            call()
            fastest = min(fastest, time.perf_counter() - start)
        return fastest


def keep_half(units: int) -> tuple[Tensor, Tensor]:
    """A keep set of half of the units, scattered."""
    mask = torch.zeros(1, units, dtype=torch.bool)
    mask[0, torch.randperm(units)[: units // 2]] = True
    index, count = OPS.compact(mask)
    return index, count


def weights(rows: int, columns: int, dtype: torch.dtype, matrices: int) -> Iterator[list[Tensor]]:
    """Copies of `matrices` matrices that together outgrow the caches."""
    size = torch.tensor([], dtype=dtype).element_size() * rows * columns * matrices
    for _ in range(max(1, DISTINCT_BYTES // size)):
        yield [torch.randn(rows, columns).mul_(0.02).to(dtype) for _ in range(matrices)]


def caches(groups: int, slots: int, width: int) -> Iterator[list[Tensor]]:
    """Key and value caches that together outgrow the processor's."""
    for _ in range(max(1, DISTINCT_BYTES // (8 * groups * slots * width))):
        yield [torch.randn(1, groups, slots, width) for _ in range(2)]


def cases(name: str, dtype: torch.dtype, slots: int) -> Iterator[Case]:
    """Every op at one model's shapes."""
    layers, heads, groups, width, hidden, ffn, vocab, gated = SHAPES[name]
    item = torch.tensor([], dtype=dtype).element_size()
    x = torch.randn(1, 1, hidden)
    bias, wide = torch.randn(hidden), torch.randn(ffn)

    calls = [partial(OPS.linear, x, *w, None) for w in weights(vocab, hidden, dtype, 1)]
    yield Case(name, "linear (head)", "all", vocab * hidden * item / 1e9, calls)

    q, k = torch.randn(1, 1, heads * width), torch.randn(1, 1, groups * width)
    start, position = torch.tensor([0]), torch.tensor([slots - 1])
    norm = torch.randn(hidden)
    for kept, share in (("all", 1.0), ("half", 0.5)):
        h_keep = (None, None) if kept == "all" else keep_half(heads)
        n_keep = (None, None) if kept == "all" else keep_half(ffn)
        h_rows = int(heads * share) * width
        n_rows = int(ffn * share)

        calls = []
        for (w,) in weights((heads + 2 * groups) * width, hidden, dtype, 1):
            wq, wk, wv = w.split([heads * width, groups * width, groups * width])
            calls.append(partial(OPS.sparse_qkv, x, wq, None, wk, None, wv, None, width, *h_keep))
        size = (h_rows + 2 * groups * width) * hidden * item
        yield Case(name, "sparse_qkv", kept, size / 1e9, calls)

        calls = [
            partial(OPS.decode_attention, q, k, k, None, None, *c, start, position, 0.125, *h_keep)
            for c in caches(groups, slots, width)
        ]
        size = 8 * slots * width * (groups if groups < heads else int(heads * share))
        yield Case(name, f"decode_attention, {slots} slots", kept, size / 1e9, calls)

        calls = [
            partial(OPS.sparse_out_proj, q, *w, bias, x, width, *h_keep)
            for w in weights(heads * width, hidden, dtype, 1)
        ]
        yield Case(name, "sparse_out_proj", kept, h_rows * hidden * item / 1e9, calls)

        if gated:
            calls = [
                partial(OPS.sparse_gated_mlp, x, *w, x, "silu", False, *n_keep)
                for w in weights(ffn, hidden, dtype, 3)
            ]
            yield Case(name, "sparse_gated_mlp", kept, 3 * n_rows * hidden * item / 1e9, calls)
            continue
        # A bias that makes most activations zero, as they are in a trained ReLU model.
        pairs = list(weights(ffn, hidden, dtype, 2))
        for label, shift, skip in (("", 0.0, False), (", most zero", 2.0, True)):
            calls = [
                partial(OPS.sparse_mlp, x, w1, wide - shift, w2t, bias, x, "relu", skip, *n_keep)
                for w1, w2t in pairs
            ]
            rows = int(calls[0]()[1])
            size = (n_rows + rows) * hidden * item
            yield Case(name, "sparse_mlp" + label, kept, size / 1e9, calls)

    yield Case(name, "rms_norm", "-", 0.0, [partial(OPS.rms_norm, x, norm, 1e-5)] * 100)
    for label, units in (("heads", heads), ("neurons", ffn)):
        scores = torch.randn(1, layers, units)
        calls = [partial(OPS.select, scores, layers * units // 2, 1, False)] * 20
        yield Case(name, f"select ({label})", "half", 0.0, calls)


def streaming() -> Case:
    """Reading float32 numbers that no cache holds: what the ops are compared with."""
    parts = torch.ones(DISTINCT_BYTES // 4).chunk(8)
    return Case("", "sum", "", DISTINCT_BYTES / 8e9, [part.sum for part in parts])


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="bfloat16")
    parser.add_argument("--slots", type=int, default=512, help="length of the cache")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    table: list[dict[str, object]] = []
    rate = 0.0
    with torch.inference_mode():
        for shape in SHAPES:
            every = [streaming(), *cases(shape, getattr(torch, options.dtype), options.slots)]
            rounds = [[case.seconds() for case in every] for _ in range(options.rounds)]
            fastest = [min(times) for times in zip(*rounds, strict=True)]
            rates = [case.gigabytes / seconds for case, seconds in zip(every, fastest, strict=True)]
            rate = max(rate, rates[0])
            for case, seconds, reached in zip(every[1:], fastest[1:], rates[1:], strict=True):
                table.append(
                    {
                        "shape": case.shape,
                        "op": case.op,
                        "kept": case.kept,
                        "microseconds": round(seconds * 1e6, 1),
                        "gigabytes_per_second": round(reached, 1),
                    }
                )
    about = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "isa": isa(),
        "dtype": options.dtype,
        "batch": 1,
        "torch": torch.__version__,
        "streaming_gigabytes_per_second": round(rate, 1),
    }
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    print(f"{'shape':<14}{'op':<32}{'kept':<6}{'us':>9}{'GB/s':>8}{'share':>8}")
    for row in table:
        line = f"{row['shape']:<14}{row['op']:<32}{row['kept']:<6}{row['microseconds']:>9}"
        reached = float(str(row["gigabytes_per_second"]))
        print(line + (f"{reached:>8}{reached / rate:>8.0%}" if reached else ""))
    if options.json is not None:
        options.json.write_text(json.dumps({**about, "ops": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
