"""The shadow predictor: one small network after layer 0's attention that scores every unit.

    z      = (feature - mean) * scale                              [B, T, C]
    phi    = [z, relu(features_weight z + features_bias)]          [B, T, C + M]
    code   = encoder_weight phi + encoder_bias                     [B, T, R]
    scores = [heads_weight code + heads_bias, neurons_weight code + neurons_bias]

What a token reads is dominated by the output matrices (R x units), so R is small and the M random
features, which make the map non-linear, are cheap. Codes are centred, so the output biases hold the
mean scores.

Source: one early predictor for the whole model: ShadowLLM (arXiv 2406.16635); random ReLU features:
Rahimi and Recht, "Weighted sums of random kitchen sinks" (2008).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shadowc.config import ModelShape


class ShadowPredictor(nn.Module):
    """Scores of all units of all layers from the feature of the current token.

    The weights are buffers: they come from a closed-form fit (`fit.py`), never from SGD.

    Args:
        shape: Shape of the model whose units are scored.
        rank: R, width of the code; what a token reads is about R x units.
        random_features: M, random ReLU features beside the linear ones.
        width: Of the feature: C for `residual` (the default), H*D for `context`.
    """

    feature_mean: Tensor
    feature_scale: Tensor
    features_weight: Tensor
    features_bias: Tensor
    encoder_weight: Tensor
    encoder_bias: Tensor
    heads_weight: Tensor
    heads_bias: Tensor
    neurons_weight: Tensor
    neurons_bias: Tensor

    def __init__(
        self, shape: ModelShape, rank: int, random_features: int, width: int | None = None
    ) -> None:
        """Make it with zero weights, to be filled by a fit or by `load_state_dict`."""
        super().__init__()
        c, f = width or shape.hidden, shape.ffn
        heads, neurons = (shape.layers - 1) * shape.heads, shape.layers * f
        sizes = {
            "feature_mean": (c,),
            "feature_scale": (c,),
            "features_weight": (random_features, c),
            "features_bias": (random_features,),
            "encoder_weight": (rank, c + random_features),
            "encoder_bias": (rank,),
            "heads_weight": (heads, rank),
            "heads_bias": (heads,),
            "neurons_weight": (neurons, rank),
            "neurons_bias": (neurons,),
        }
        for name, size in sizes.items():
            self.register_buffer(name, torch.zeros(size))
        self.layers, self.heads, self.ffn = shape.layers, shape.heads, f

    def expand(self, feature: Tensor) -> Tensor:
        """Phi, what the ridge regression sees.

        Args:
            feature: fp32 [B, T, C], or any leading dimensions.

        Returns:
            fp32 [B, T, C + M].
        """
        z = (feature - self.feature_mean) * self.feature_scale
        random = torch.relu(nn.functional.linear(z, self.features_weight, self.features_bias))
        return torch.cat((z, random), dim=-1)

    def forward(self, feature: Tensor) -> tuple[Tensor, Tensor]:
        """Predict in the units in which units are ranked: the larger, the more needed.

        Args:
            feature: fp32 [B, T, C], of the kind that the calibration names.

        Returns:
            Head scores of layers 1 to L-1 (layer 0's heads always run), fp32 [B, T, L-1, H], and
            neuron scores of all layers, fp32 [B, T, L, F].
        """
        b, t, _ = feature.shape
        code = nn.functional.linear(self.expand(feature), self.encoder_weight, self.encoder_bias)
        heads = nn.functional.linear(code, self.heads_weight, self.heads_bias)
        neurons = nn.functional.linear(code, self.neurons_weight, self.neurons_bias)
        return (
            heads.reshape(b, t, self.layers - 1, self.heads),
            neurons.reshape(b, t, self.layers, self.ffn),
        )
