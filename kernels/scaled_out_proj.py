"""Output projection of attention over the kept heads, and what the next norm needs of its result.

    y[b, t, c] = residual[b, t, c] + bias[c]
                 + sum over kept heads h, d of ctx[b, t, h*D + d] * weight[c, h*D + d]

The weight is stored as it is, not transposed: a head is D values side by side in every row, long
enough to skip, and no sum has to be split over programs. ctx [B, 1, H*D] of the weight's type, 0
for heads that row b skips; weight [C, H*D]; bias [C] or None; residual [B, 1, C]; gamma [C], of the
norm that follows; index int32 [B, H] ascending, of which the first count[b] (int32 [B]) count; both
None = all heads. -> y float32 [B, 1, C]; scaled and stats of y, as `scale` gives them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shadowc.kernels.norm_linear import product
from shadowc.kernels.scale import scale_reference
from shadowc.native import check_keep, check_layout, check_one_token, keep_mask, register


@dataclass(frozen=True)
class ScaledOutProj:
    """The op's arguments, in order."""

    ctx: Tensor
    weight: Tensor
    bias: Tensor | None
    residual: Tensor
    gamma: Tensor
    head_dim: int
    index: Tensor | None
    count: Tensor | None

    def check(self) -> None:
        """Raise KernelError unless they fit together."""
        check_one_token("ctx", self.ctx, self.weight.shape[1])
        heads = self.weight.shape[1] // self.head_dim
        check_keep(self.index, self.count, self.ctx.shape[0], heads, check_layout)


def scaled_out_proj_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch."""
    a = ScaledOutProj(*arguments)
    ctx = a.ctx
    mask = keep_mask(a.index, a.count, a.weight.shape[1] // a.head_dim)
    if mask is not None:
        ctx = ctx.where(mask.repeat_interleave(a.head_dim, 1)[:, None], 0.0)
    y = product(ctx, a.weight) + a.residual
    if a.bias is not None:
        y = y + a.bias
    return y, *scale_reference(y, a.gamma)


def _scaled_out_proj(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    ScaledOutProj(*arguments).check()
    return scaled_out_proj_reference(*arguments)


def _scaled_out_proj_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from shadowc.kernels.cuda.batch import out_proj_rows
    from shadowc.kernels.cuda.out_proj import out_proj

    a = ScaledOutProj(*arguments)
    a.check()
    y, scaled, stats = (out_proj if len(a.ctx) == 1 else out_proj_rows)(a)
    return y[:, None], scaled[:, None], stats


def _scaled_out_proj_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = ScaledOutProj(*arguments)
    size = (*a.ctx.shape[:-1], a.weight.shape[0])
    sizes = size, (a.ctx.shape[0], 1, 2)
    y, stats = (a.ctx.new_empty(s, dtype=torch.float32) for s in sizes)
    return y, a.gamma.new_empty(size), stats


register(
    "scaled_out_proj(Tensor ctx, Tensor weight, Tensor? bias, Tensor residual, Tensor gamma, "
    "int head_dim, Tensor? index, Tensor? count) -> (Tensor y, Tensor scaled, Tensor stats)",
    _scaled_out_proj,
    _scaled_out_proj_fake,
    cuda=_scaled_out_proj_cuda,
)
