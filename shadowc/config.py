"""The settings and shapes that travel through the pipeline, as frozen dataclasses.

Shape letters used everywhere: B batch, T tokens, L layers, H heads, G key/value heads, D head dim,
C hidden, F ffn, K kept, R predictor rank, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from shadowc.errors import OptionError

SCOPES = ("global", "local")
FEATURES = ("residual", "normed", "entry", "context")
PREDICTORS = ("shadow", "layerwise", "fullseq", "static")
#: The best at equal time: benchmarks/results/predictors-*.md.
DEFAULT_PREDICTOR = "layerwise"
FITS = ("ridge", "paper")
SELECTIONS = ("topk", "threshold")
BUDGETS = ("units", "bytes")


@dataclass(frozen=True)
class ModelShape:
    """What shadowc must know of an OPT or Llama checkpoint.

    Attributes:
        architecture: `opt` or `llama`.
        layers: L, decoder layers.
        heads: H, query heads a layer.
        kv_heads: G, key/value heads a layer.
        head_dim: D.
        hidden: C, width of the residual stream.
        ffn: F, neurons of an MLP.
        vocab: V.
        max_positions: The longest sequence that the checkpoint was made for, in tokens.
        activation: Activation of the MLP, as transformers names it (`relu`, `silu`, ...).
        gated: Whether the MLP is `down(act(gate(x)) * up(x))` instead of `fc2(act(fc1(x)))`.
    """

    architecture: str
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    ffn: int
    vocab: int
    max_positions: int
    activation: str
    gated: bool

    @property
    def head_elements(self) -> int:
        """Weights that a skipped head saves: its rows of Q and its columns of the output."""
        return 2 * self.head_dim * self.hidden

    @property
    def neuron_elements(self) -> int:
        """Weights of one neuron: one row of each first projection, one column of the second."""
        return (3 if self.gated else 2) * self.hidden

    @property
    def layer_elements(self) -> int:
        """Matrix weights of one decoder layer (biases and norms not counted)."""
        attention = 2 * (self.heads + self.kv_heads) * self.head_dim * self.hidden
        return attention + self.ffn * self.neuron_elements

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, read back by `ModelShape(**value)`."""
        return asdict(self)


@dataclass(frozen=True)
class Tap:
    """One place where a predictor reads, and the layers whose units it scores.

    It reads the residual stream after the attention of `layer`. Heads are those of the layers that
    follow: half a layer ahead, so that their selection is ready when their layer begins.

    Attributes:
        layer: t.
        heads: Layers t+1 to the next tap's, whose heads it scores; none at the last layer.
        neurons: Layers t to the one before the next tap's, whose neurons it scores.
    """

    layer: int
    heads: range
    neurons: range


def taps_of(layers: int, taps: Sequence[int]) -> tuple[Tap, ...]:
    """Every layer's neurons and every head but layer 0's, dealt out to taps.

    Args:
        layers: L.
        taps: Ascending layers that begin with 0.

    Raises:
        OptionError: If they are not.
    """
    if [*taps] != sorted({0, *taps}) or taps[-1] >= layers:
        raise OptionError(
            "taps are out of order",
            expected=f"ascending layers from 0 to {layers - 1}, the first being 0",
            got=list(taps),
        )
    ends = (*taps[1:], layers)
    return tuple(
        Tap(t, range(t + 1, min(end + 1, layers)), range(t, end))
        for t, end in zip(taps, ends, strict=True)
    )


def predictor_name(predictor: str, every: int | None, fit: str, refresh: int) -> list[str]:
    """What tells a kind of predictor from the usual one, as parts of a name.

    Args:
        predictor: One of `PREDICTORS`.
        every: Layers from tap to tap, for several taps of `shadow`.
        fit: One of `FITS`.
        refresh: Tokens that a mask serves.
    """
    found = [] if predictor == DEFAULT_PREDICTOR else [f"taps{every}" if every else predictor]
    found += [fit] * (fit != "ridge")
    return found + ([f"refresh{refresh}" if refresh else "prompt"] if refresh != 1 else [])


@dataclass(frozen=True)
class Policy:
    """How many units run, and how they are ranked.

    Attributes:
        head_sparsity: Fraction of all H*L heads that do not run, in [0, 1). Layer 0's heads always
            run (the predictor reads what they compute) and count as kept.
        neuron_sparsity: Fraction of all F*L neurons that do not run, in [0, 1).
        scope: `global`: one ranking over the model; `local`: the same budget in every layer.
        refresh: A new mask every `refresh` decoded tokens; 0 means once, at the prompt's last
            token.
        min_heads: Heads that every layer keeps at least, its own best ones.
        min_neurons: Neurons that every layer keeps at least, its own best ones.
        selection: `topk`: exactly the budget at every token; `threshold`: the units whose score is
            above their layer's threshold, which meets the budget and the floors on average, over
            the text of calibration: a token may keep more, fewer, or none of a layer.
        head_shares: Share of each layer's heads that runs, on average; set by a budget of bytes,
            in place of `scope`. Needs `threshold`. Empty: as `scope` says.
        neuron_shares: The same of each layer's neurons.
    """

    head_sparsity: float
    neuron_sparsity: float
    scope: str = "global"
    refresh: int = 1
    min_heads: int = 1
    min_neurons: int = 16
    selection: str = "topk"
    head_shares: tuple[float, ...] = ()
    neuron_shares: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        """Refuse settings that no model can run."""
        for name in ("head_shares", "neuron_shares"):  # lists in JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("head_sparsity", "neuron_sparsity"):
            value = getattr(self, name)
            if not (0.0 <= value < 1.0) or math.isnan(value):
                raise OptionError(
                    f"{name} is out of range",
                    expected="a number in [0, 1)",
                    got=value,
                    fix="0.5 skips half of the units; 0 skips none",
                )
        if self.scope not in SCOPES:
            raise OptionError(f"unknown scope {self.scope!r}", expected=", ".join(SCOPES))
        if self.selection not in SELECTIONS:
            raise OptionError(
                f"unknown selection {self.selection!r}", expected=", ".join(SELECTIONS)
            )
        if self.refresh < 0:
            raise OptionError(
                "refresh is out of range", expected="token, prompt or n >= 1", got=self.refresh
            )

    def heads_kept(self, shape: ModelShape) -> int:
        """K of the heads of layers 1 to L-1 (layer 0's H heads are kept besides)."""
        ranked = shape.heads * (shape.layers - 1)
        kept = round((1.0 - self.head_sparsity) * shape.heads * shape.layers) - shape.heads
        floor = self.min_heads * (shape.layers - 1)
        if kept < floor:
            most = 1.0 - (shape.heads + floor) / (shape.heads * shape.layers)
            raise OptionError(
                "head_sparsity is more than this model can give",
                expected=f"at most {most:.3f}: layer 0's heads always run, and each other layer "
                f"keeps at least {self.min_heads}",
                got=self.head_sparsity,
            )
        return min(kept, ranked)

    def neurons_kept(self, shape: ModelShape) -> int:
        """K of all F*L neurons."""
        total = shape.ffn * shape.layers
        kept = round((1.0 - self.neuron_sparsity) * total)
        floor = self.min_neurons * shape.layers
        if kept < floor:
            raise OptionError(
                "neuron_sparsity is more than this model can give",
                expected=f"at most {1.0 - floor / total:.3f}: each layer keeps at least "
                f"{self.min_neurons} neurons",
                got=self.neuron_sparsity,
            )
        return kept

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, read back by `Policy(**value)`."""
        return asdict(self)
