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

import torch
from torch import Tensor

from shadowc.kernels.scale import scale_reference
from shadowc.native import check_keep, check_one_token, keep_mask, register


def scaled_out_proj_reference(
    ctx: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch."""
    ctx = ctx.float()
    mask = keep_mask(index, count, weight.shape[1] // head_dim)
    if mask is not None:
        ctx = ctx.where(mask.repeat_interleave(head_dim, 1)[:, None], 0.0)
    y = torch.nn.functional.linear(ctx, weight.float(), None if bias is None else bias.float())
    y = y + residual
    return y, *scale_reference(y, gamma)


def _scaled_out_proj(
    ctx: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_token("ctx", ctx, weight.shape[1])
    check_keep(index, count, ctx.shape[0], weight.shape[1] // head_dim)
    return scaled_out_proj_reference(ctx, weight, bias, residual, gamma, head_dim, index, count)


def _scaled_out_proj_cuda(
    ctx: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from shadowc.kernels.cuda.batch import out_proj_rows
    from shadowc.kernels.cuda.out_proj import out_proj

    check_one_token("ctx", ctx, weight.shape[1])
    check_keep(index, count, ctx.shape[0], weight.shape[1] // head_dim)
    if ctx.shape[0] == 1:
        y, scaled, stats = out_proj(
            ctx[0, 0], weight, bias, residual[0, 0], gamma, head_dim, index, count
        )
        return y[None, None], scaled[None, None], stats[None]
    y, scaled, stats = out_proj_rows(ctx[:, 0], weight, bias, residual[:, 0], gamma)
    return y[:, None], scaled[:, None], stats


def _scaled_out_proj_fake(
    ctx: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    gamma: Tensor,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    size = (*ctx.shape[:-1], weight.shape[0])
    y, stats = (ctx.new_empty(s, dtype=torch.float32) for s in (size, (ctx.shape[0], 1, 2)))
    return y, gamma.new_empty(size), stats


register(
    "scaled_out_proj(Tensor ctx, Tensor weight, Tensor? bias, Tensor residual, Tensor gamma, "
    "int head_dim, Tensor? index, Tensor? count) -> (Tensor y, Tensor scaled, Tensor stats)",
    _scaled_out_proj,
    _scaled_out_proj_fake,
    cuda=_scaled_out_proj_cuda,
)
