"""Root mean square normalisation.

    y[c] = x[c] / sqrt(mean_c x[c]^2 + eps) * weight[c]

x [..., C] float32, weight [C] float32 -> y [..., C] float32.

Source: Zhang and Sennrich 2019, "Root Mean Square Layer Normalization".
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowc.native import check, function, register

_native = function("rms_norm", "3P 2q f")


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The op in plain torch."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    if x.dtype in (torch.float16, torch.bfloat16):
        return _rms_norm_half(x, weight, eps)
    width = weight.shape[-1]
    check("x", x, torch.float32, *x.shape[:-1], width)
    check("weight", weight, torch.float32, width)
    out = torch.empty_like(x)
    _native(x.data_ptr(), weight.data_ptr(), out.data_ptr(), x.shape[:-1].numel(), width, eps)
    return out


def _rms_norm_half(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """For prompts in half precision: the mean of squares needs more than that."""
    return rms_norm_reference(x.float(), weight.float(), eps).to(x.dtype)


def _rms_norm_fake(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return torch.empty_like(x)


register(
    "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
    _rms_norm,
    _rms_norm_fake,
    cuda=_rms_norm_half,
)
