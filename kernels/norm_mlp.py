"""Norm and MLP over the kept neurons in one go, and what the next norm needs of the result.

    h_u = act( norm(x) . w1[u] + b1[u] ) [* norm(x) . w_up[u]]               for kept neurons u
    y[b, t, c] = residual[b, t, c] + b2[c] + sum over kept u of h_u * w2t[u, c]

scaled, stats, norm, eps, and w1 [F, C] with gain and shift as in `norm_linear`; w_up [F, C] or None
(a gated MLP: `rms`, no biases); w2t [F, C]; b2 [C] or None; residual [B, 1, C]; gamma [C], of the
norm that follows; activation relu | silu | gelu. With `skip_zeros` rows of w2t whose h_u is exactly
0 are not read. index int32 [B, F] ascending, of which the first count[b] (int32 [B]) count; both
None = all neurons. -> y float32 [B, 1, C]; scaled and stats of y, as `scale` gives them; rows int32
[B]: rows of w2t that each batch row needed.

Source: as `sparse_mlp` and `sparse_gated_mlp`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shadowc.kernels import sparse_out_proj as _register  # noqa: F401
from shadowc.kernels.norm_linear import norm_linear_reference
from shadowc.kernels.scale import scale_reference
from shadowc.native import (
    activate,
    activation_code,
    check_keep,
    check_layout,
    check_one_token,
    keep_mask,
    register,
)


@dataclass(frozen=True)
class NormMlp:
    """The op's arguments, in order."""

    scaled: Tensor
    stats: Tensor
    norm: str
    eps: float
    w1: Tensor
    gain: Tensor | None
    shift: Tensor | None
    w_up: Tensor | None
    w2t: Tensor
    b2: Tensor | None
    residual: Tensor
    gamma: Tensor
    activation: str
    skip_zeros: bool
    index: Tensor | None
    count: Tensor | None

    def check(self) -> None:
        """Raise KernelError unless they fit together."""
        check_one_token("scaled", self.scaled, self.w1.shape[1])
        rows, neurons = self.scaled.shape[0], self.w1.shape[0]
        check_keep(self.index, self.count, rows, neurons, check_layout)
        activation_code(self.activation)


def norm_mlp_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op in plain torch."""
    a = NormMlp(*arguments)
    h = norm_linear_reference(a.scaled, a.stats, a.norm, a.eps, a.w1, a.gain, a.shift)
    h = activate(h, a.activation)
    if a.w_up is not None:
        h = h * norm_linear_reference(a.scaled, a.stats, a.norm, a.eps, a.w_up, None, None)
    mask = keep_mask(a.index, a.count, a.w1.shape[0])
    kept = torch.ones_like(h, dtype=torch.bool)
    if mask is not None:
        kept = kept & mask[:, None]
        h = h.where(kept, 0.0)
    if a.w2t.device.type == "cpu":  # without a float32 copy of the weight
        y = torch.ops.shadowc.sparse_out_proj(h, a.w2t, None, None, 1, None, None)
    else:
        y = h @ a.w2t.float()
    rows = (kept & (h != 0) if a.skip_zeros else kept).sum((1, 2), dtype=torch.int32)
    y = y + a.residual if a.b2 is None else y + a.residual + a.b2
    return y, *scale_reference(y, a.gamma), rows


def _norm_mlp(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    NormMlp(*arguments).check()
    return norm_mlp_reference(*arguments)


def _norm_mlp_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from shadowc.kernels.cuda.batch import mlp_rows
    from shadowc.kernels.cuda.mlp import mlp

    a = NormMlp(*arguments)
    a.check()
    y, scaled, stats, rows = (mlp if len(a.scaled) == 1 else mlp_rows)(a)
    return y[:, None], scaled[:, None], stats, rows


def _norm_mlp_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    a = NormMlp(*arguments)
    batch = a.scaled.shape[0]
    y, stats = (a.stats.new_empty(s) for s in (a.scaled.shape, (batch, 1, 2)))
    rows = a.stats.new_empty(batch, dtype=torch.int32)
    return y, a.gamma.new_empty(a.scaled.shape), stats, rows


register(
    "norm_mlp(Tensor scaled, Tensor stats, str norm, float eps, Tensor w1, Tensor? gain, "
    "Tensor? shift, Tensor? w_up, Tensor w2t, Tensor? b2, Tensor residual, Tensor gamma, "
    "str activation, bool skip_zeros, Tensor? index, Tensor? count) "
    "-> (Tensor y, Tensor scaled_y, Tensor stats_y, Tensor rows)",
    _norm_mlp,
    _norm_mlp_fake,
    cuda=_norm_mlp_cuda,
)
