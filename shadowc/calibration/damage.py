"""What skipping a layer's least needed units costs: the table that budgets are dealt out by.

    D(x) = 1/2 E_t[ ( sum_{u skipped} sum_d g a )^2 ],  skipped: the share x predicted lowest

g is the gradient of the sum of the losses after token t. The sum over units is squared as a whole:
units that cancel or add up count as they do. It is the second-order term of the loss with the
empirical Fisher matrix for the Hessian; the first-order term has no sign that holds on other text.
Absolute values are far off where much is skipped (opt-books-15m, heads: 3.6 predicted for 0.17
measured, 0.02 for 0.01), their order is right.

Source: for one unit, Theis 2018 (arXiv 1801.05787) and Molchanov 2019 (arXiv 1906.10771).
"""

from __future__ import annotations

import torch
from torch import Tensor

LEVELS = 33  # shares 0, 1/32, ..., 1 of a layer's units


def damage(scores: Tensor, effects: Tensor) -> Tensor:
    """Sums over tokens of the squares, fp64 [LEVELS]; they add up.

    Args:
        scores: fp32 [N, U], predicted: the lowest are skipped first.
        effects: fp32 [N, U], sum_d g a.
    """
    units = scores.shape[1]
    ordered = effects.gather(1, scores.argsort(dim=1, stable=True)).double().cumsum(dim=1)
    skipped = (torch.arange(LEVELS, device=ordered.device) * units / (LEVELS - 1)).round().long()
    sums = ordered[:, (skipped - 1).clamp(min=0)]
    return sums.square().sum(dim=0) * (skipped > 0)


def damage_table(squares: Tensor, tokens: int) -> Tensor:
    """D at each level, fp32 [LEVELS]; more skipped units never count as less damage."""
    return (squares / max(tokens, 1) / 2).cummax(dim=0).values.float()
