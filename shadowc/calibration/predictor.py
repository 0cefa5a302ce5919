"""The predictor at one tap: a small network on the residual stream that scores units.

`ShadowPredictor` is what the closed form fits (`ridge.py`):

    hidden = first_weight x + first_bias                           [B, T, M + R]
    code   = hidden[M:] + mixer_weight relu(hidden[:M])            [B, T, R]
    scores = [heads_weight code + heads_bias, neurons_weight code + neurons_bias]

M random features make the map non-linear; R is the rank of what is linear in them and in x. What a
token reads is dominated by the output matrices (R x units) and, with a tap at every layer, by the
first (M + R) x C. The normalisation of x is folded into the first matrix, and codes are centred, so
the output biases hold the mean scores.

`TwoLayerPredictor` is what the paper's recipe trains (`trained.py`), for each kind of unit:

    scores = weight relu(first x + first_bias) + bias

Source: one early predictor for the whole model: ShadowLLM (arXiv 2406.16635); one a layer: DejaVu
(arXiv 2310.17157); random ReLU features: Rahimi and Recht, "Weighted sums of random kitchen sinks"
(2008).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from shadowc.config import ModelShape, Tap, taps_of


class ShadowPredictor(nn.Module):
    """Scores of the units of a tap's layers from the feature of the current token.

    The weights are buffers: they come from a closed-form fit, never from SGD.

    Args:
        shape: Shape of the model whose units are scored.
        rank: R, width of the code; what a token reads is about R x units.
        random_features: M, random ReLU features beside the linear ones.
        width: Of the feature: C for `residual` (the default) and `normed`, H*D for `context`.
        tap: The layers that are scored; by default all of them.
    """

    first_weight: Tensor
    first_bias: Tensor
    mixer_weight: Tensor
    heads_weight: Tensor
    heads_bias: Tensor
    neurons_weight: Tensor
    neurons_bias: Tensor

    def __init__(
        self,
        shape: ModelShape,
        rank: int,
        random_features: int,
        width: int | None = None,
        tap: Tap | None = None,
    ) -> None:
        """Make it with zero weights, to be filled by a fit or by `load_state_dict`."""
        super().__init__()
        (whole,) = taps_of(shape.layers, (0,))
        self.tap = tap or whole
        self.units = shape.heads, shape.ffn
        heads, neurons = len(self.tap.heads) * shape.heads, len(self.tap.neurons) * shape.ffn
        sizes = {
            "first_weight": (random_features + rank, width or shape.hidden),
            "first_bias": (random_features + rank,),
            "mixer_weight": (rank, random_features),
            "heads_weight": (heads, rank),
            "heads_bias": (heads,),
            "neurons_weight": (neurons, rank),
            "neurons_bias": (neurons,),
        }
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size))

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Predict in the units in which units are ranked: the larger, the more needed.

        Args:
            feature: fp32 [B, T, C], of the kind that the calibration names.

        Returns:
            Scores of the tap's heads, fp32 [B, T, L', H], and neurons, fp32 [B, T, L'', F].
        """
        rank, random = self.mixer_weight.shape
        linear = nn.functional.linear
        code = linear(feature, self.first_weight, self.first_bias)
        if random:
            features, direct = code.split((random, rank), dim=-1)
            code = direct + linear(features.relu(), self.mixer_weight)
        neurons = linear(code, self.neurons_weight, self.neurons_bias)
        layers = (len(self.tap.heads), self.units[0]), (len(self.tap.neurons), self.units[1])
        if self.tap.heads:
            heads = linear(code, self.heads_weight, self.heads_bias)
        else:
            heads = neurons[..., :0]
        return heads.unflatten(-1, layers[0]), neurons.unflatten(-1, layers[1])

    def encode(self, feature: Tensor) -> Tensor:
        """What all scores of a token are made of: fp32 [N, C] -> [N, R]."""
        rank, random = self.mixer_weight.shape
        hidden = nn.functional.linear(feature, self.first_weight, self.first_bias)
        features, direct = hidden.split((random, rank), dim=-1)
        code: Tensor = direct + nn.functional.linear(features.relu(), self.mixer_weight)
        return code

    def score(self, code: Any, kind: str, layer: int) -> Tensor:
        """Scores of one layer's units, fp32 [N, U], of what `encode` gave."""
        return _layer_scores(self, code, kind, layer)


class TwoLayerPredictor(nn.Module):
    """A two-layer network for the heads and another for the neurons, as the paper trains them.

    Args:
        shape: Shape of the model whose units are scored, all of them at one tap.
        hidden: Hidden units of the heads' network and of the neurons'.
        width: Of the feature; C by default.
    """

    def __init__(
        self, shape: ModelShape, hidden: tuple[int, int], width: int | None = None
    ) -> None:
        """Make it with zero weights, to be filled by training or by `load_state_dict`."""
        super().__init__()
        (self.tap,) = taps_of(shape.layers, (0,))
        self.units = shape.heads, shape.ffn
        counts = len(self.tap.heads) * shape.heads, len(self.tap.neurons) * shape.ffn
        for kind, size, units in zip(("heads", "neurons"), hidden, counts, strict=True):
            self.register_buffer(f"{kind}_first", torch.zeros(size, width or shape.hidden))
            self.register_buffer(f"{kind}_first_bias", torch.zeros(size))
            self.register_buffer(f"{kind}_weight", torch.zeros(units, size))
            self.register_buffer(f"{kind}_bias", torch.zeros(units))

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """As `ShadowPredictor.forward`; the units are those of the paper's targets."""
        linear, found = nn.functional.linear, []
        own = dict(self.named_buffers())
        layers = len(self.tap.heads), len(self.tap.neurons)
        for kind, shape in zip(("heads", "neurons"), zip(layers, self.units, strict=True),
                               strict=True):  # fmt: skip
            hidden = linear(feature, own[f"{kind}_first"], own[f"{kind}_first_bias"]).relu()
            scores = linear(hidden, own[f"{kind}_weight"], own[f"{kind}_bias"])
            found.append(scores.unflatten(-1, shape))
        return found[0], found[1]

    def encode(self, feature: Tensor) -> dict[str, Tensor]:
        """What all scores of a token are made of, by kind: fp32 [N, C] -> [N, hidden]."""
        own = dict(self.named_buffers())
        return {
            kind: nn.functional.linear(
                feature, own[f"{kind}_first"], own[f"{kind}_first_bias"]
            ).relu()
            for kind in ("heads", "neurons")
        }

    def score(self, code: Any, kind: str, layer: int) -> Tensor:
        """Scores of one layer's units, fp32 [N, U], of what `encode` gave."""
        return _layer_scores(self, code[kind], kind, layer)


def _layer_scores(
    predictor: ShadowPredictor | TwoLayerPredictor, code: Tensor, kind: str, layer: int
) -> Tensor:
    heads = kind == "heads"
    units = predictor.units[0 if heads else 1]
    first = (layer - (predictor.tap.heads if heads else predictor.tap.neurons).start) * units
    weight, bias = (
        predictor.get_buffer(f"{kind}_{name}")[first : first + units] for name in ("weight", "bias")
    )
    return nn.functional.linear(code, weight, bias)


Predictor = ShadowPredictor | TwoLayerPredictor
