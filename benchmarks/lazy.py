"""Lazy keys and values on the GPU that is here: `python benchmarks/lazy.py`.

One projection of queries, keys and values at the shapes of a model (OPT-13B, random weights, batch
1) at each of 32 tokens, in several layers so that no weight stays in the cache; all in one CUDA
graph, replayed. `norm_qkv` computes keys and values of every head at every token, `lazy_qkv` those
of the heads that need them. Masks differ from layer to layer:

    all        every head is kept
    i.i.d.     half of the heads, drawn anew at every token
    sticky     half of the heads, each changing its mind with a probability of 0.1 a token
    fixed      half of the heads, the same at every token: the others are flushed every 16

Bytes are those of the weights that were read, counted on the device. Medians of rounds.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from shadowc.kernels.compact import compact_reference
from shadowc.kernels.lazy_qkv import WINDOW, _lazy_qkv_cuda
from shadowc.kernels.norm_qkv import _norm_qkv_cuda

STEPS = 2 * WINDOW  # a replay goes back by whole windows
FIRST = 4 * WINDOW


@dataclass(frozen=True)
class Shape:
    """What is projected: C, H, G, D, layers, slots of the cache."""

    hidden: int = 5120
    heads: int = 40
    groups: int = 40
    head_dim: int = 128
    layers: int = 4
    slots: int = 256


def masks(kind: str, shape: Shape, generator: torch.Generator) -> Tensor:
    """Masks bool [STEPS, layers, H]; one period of something that could go on for ever."""
    size = (STEPS, shape.layers, shape.heads)
    drawn = torch.rand(size, generator=generator)
    if kind == "all":
        return torch.ones(size, dtype=torch.bool)
    if kind == "i.i.d.":
        return drawn < 0.5
    if kind == "fixed":
        return (drawn[:1] < 0.5).expand(size)
    flips = (drawn < 0.1).int().cumsum(0)
    begin = torch.randint(0, 2, size[1:], generator=generator)
    return (flips + begin) % 2 == 1


class Layers:
    """Weights, inputs and state of some layers after a prompt."""

    def __init__(self, shape: Shape, device: str, dtype: torch.dtype) -> None:
        self.shape, self.device = shape, device

        def random(*size: int, type: torch.dtype = dtype) -> Tensor:
            return torch.randn(size, device=device, dtype=torch.float32).mul_(0.02).to(type)

        rows = [n * shape.head_dim for n in (shape.heads, shape.groups, shape.groups)]
        wide = torch.float32
        self.matrices = [
            [part for n in rows
             for part in (random(n, shape.hidden), random(n, type=wide), random(n, type=wide))]
            for _ in range(shape.layers)
        ]  # fmt: skip
        self.scaled = random(STEPS, 1, 1, shape.hidden)
        self.stats = torch.rand(1, 64, 2, device=device)
        self.positions = torch.arange(FIRST, FIRST + STEPS, device=device)[:, None]
        size = (shape.layers, 1, shape.groups, shape.slots, shape.head_dim)
        self.filled = torch.zeros(shape.layers, 2, shape.groups, dtype=torch.int32, device=device)
        self.state = [
            (random(WINDOW, shape.hidden), torch.rand(WINDOW, 2, device=device), filled, None,
             *caches)
            for filled, *caches in zip(self.filled, random(*size), random(*size), strict=True)
        ]  # fmt: skip

    def play(self, masks: Tensor, lazy: bool) -> Callable[[], Tensor]:
        """What runs all steps of all layers and returns the heads whose keys were computed."""
        index, count = compact_reference(masks.flatten(0, 1))
        size = (STEPS, self.shape.layers, 1)
        index = index.view(*size, self.shape.heads).to(self.device)
        count = count.view(size).to(self.device)
        self.filled.fill_(FIRST)

        def run() -> Tensor:
            found = []
            self.filled.sub_(STEPS if lazy and self.played else 0)  # as if it went on for ever
            for step in range(STEPS):
                for layer, matrices in enumerate(self.matrices):
                    arguments = (
                        self.scaled[step], self.stats, "layer", 1e-5, *matrices,
                        self.shape.head_dim, index[step, layer], count[step, layer],
                    )  # fmt: skip
                    if lazy:
                        rest = (self.positions[step], None, None, *self.state[layer])
                        found.append(_lazy_qkv_cuda(*arguments, *rest)[1])
                    else:
                        _norm_qkv_cuda(*arguments)
            self.played = True
            return torch.stack(found) if lazy else self.filled.new_ones(len(masks), 1)

        self.played = False
        return run


def graph_of(run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
    """The same as a CUDA graph, and what it returns."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return graph.replay, found


def milliseconds(play: Callable[[], None]) -> float:
    """Of one replay."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    play()
    end.record()
    torch.cuda.synchronize()
    return float(begin.elapsed_time(end))


def gigabytes(shape: Shape, masks: Tensor, computed: Tensor | None, item: int) -> float:
    """Weights read by one launch, on average."""
    keys = shape.groups if computed is None else float((computed > 0).sum(-1).double().mean())
    heads = float(masks.sum(-1).double().mean()) + 2 * keys
    return heads * shape.head_dim * shape.hidden * item / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--dtype", choices=("float16", "bfloat16"), default="float16")
    options = parser.parse_args()
    shape, dtype = Shape(), getattr(torch, options.dtype)
    torch.manual_seed(0)
    print(f"{torch.cuda.get_device_name()}, {options.dtype}, {shape}")
    print(f"{'masks':8} {'norm_qkv us':>12} {'GB/s':>6} {'lazy_qkv us':>12} {'GB/s':>6} "
          f"{'saved':>6} {'heads read':>11} {'tokens a head':>14}")  # fmt: skip
    with torch.inference_mode():
        for kind in ("all", "i.i.d.", "sticky", "fixed"):
            layers = Layers(shape, "cuda", dtype)
            chosen = masks(kind, shape, torch.Generator().manual_seed(1))
            plain, _ = graph_of(layers.play(chosen, lazy=False))
            lazy, computed = graph_of(layers.play(chosen, lazy=True))
            times = [(milliseconds(plain), milliseconds(lazy)) for _ in range(options.rounds)]
            launches = STEPS * shape.layers
            ms = [statistics.median(each) / launches for each in zip(*times, strict=True)]
            sizes = [gigabytes(shape, chosen, c, dtype.itemsize) for c in (None, computed)]
            read = float((computed > 0).sum())
            print(
                f"{kind:8} {1e3 * ms[0]:12.2f} {sizes[0] / ms[0] * 1e3:6.0f} {1e3 * ms[1]:12.2f} "
                f"{sizes[1] / ms[1] * 1e3:6.0f} {1 - ms[1] / ms[0]:6.1%} "
                f"{read / computed.numel():11.1%} {float(computed.sum()) / read:14.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
