"""What the next norm needs of x, so that it costs no pass of its own: see `norm_linear`.

    scaled[b, t, c] = x[b, t, c] * gamma[c]            in gamma's type
    stats[b, :, 0] = sums of x over parts of c,   stats[b, :, 1] = sums of x^2

x [B, 1, C] of any float type, gamma [C] -> scaled [B, 1, C] in gamma's type, stats float32
[B, parts, 2]; only the sum over the parts means something.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowc.native import check_one_token, register


def scale_reference(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    """The op in plain torch, with one part."""
    wide = x.float()
    stats = torch.stack((wide.sum(-1), wide.square().sum(-1)), -1)
    return (wide * gamma.float()).to(gamma.dtype), stats


def norm_reference(
    y: Tensor,
    stats: Tensor,
    norm: str,
    eps: float,
    width: int,
    gain: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """From y = w . gamma x to w . norm(x) + bias, float32.

    Args:
        y: float32 [B, 1, O].
        stats: float32 [B, parts, 2], of x.
        norm: `layer` or `rms`.
        eps: What is added to the variance.
        width: C.
        gain: float32 [O], w . gamma; None for `rms`.
        shift: [O], w . beta + bias, or None.
    """
    mean, square = (stats.sum(1) / width).unbind(-1)
    if norm == "rms":
        mean = torch.zeros_like(mean)
    scale = torch.rsqrt(square - mean * mean + eps)[:, None, None]
    if gain is not None:
        y = y - mean[:, None, None] * gain
    y = y * scale
    return y if shift is None else y + shift.float()


def _scale(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    check_one_token("x", x, gamma.shape[0])
    return scale_reference(x, gamma)


def _scale_cuda(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    from shadowc.kernels.cuda.scale import scale

    check_one_token("x", x, gamma.shape[0])
    scaled, stats = scale(x[:, 0], gamma)
    return scaled[:, None], stats


def _scale_fake(x: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor]:
    return gamma.new_empty(x.shape), x.new_empty((x.shape[0], 1, 2), dtype=torch.float32)


register(
    "scale(Tensor x, Tensor gamma) -> (Tensor scaled, Tensor stats)",
    _scale,
    _scale_fake,
    cuda=_scale_cuda,
)
