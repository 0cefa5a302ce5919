"""Norm and linear layer in one read of the weight, for one token of each row.

    y[b, t, o] = sum_c norm(x)[b, t, c] * weight[o, c] + bias[o]
               = (sum_c scaled[b, t, c] * weight[o, c] - mean * gain[o]) / std + shift[o]

A norm is linear but for mean and std, which come from `stats`: gain[o] = sum_c weight[o, c]
gamma[c] and shift[o] = sum_c weight[o, c] beta[c] + bias[o] are constants (no gain for `rms`).

scaled [B, 1, C] and stats [B, parts, 2] as `scale` gives them; norm `layer` or `rms`; weight [O, C]
of one type with scaled; gain float32 [O] or None; shift [O] or None -> y float32 [B, 1, O].

Source: Ba et al. 2016, "Layer Normalization"; Zhang and Sennrich 2019 (RMS).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowc.kernels import linear as _register  # noqa: F401
from shadowc.kernels.scale import norm_reference
from shadowc.native import check_one_token, register


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T in float32; on a CPU without a float32 copy of the weight."""
    if weight.device.type == "cpu":
        found: Tensor = torch.ops.shadowc.linear(x.float().contiguous(), weight, None)
        return found
    return torch.nn.functional.linear(x.float(), weight.float())


def norm_linear_reference(
    scaled: Tensor,
    stats: Tensor,
    norm: str,
    eps: float,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    """The op in plain torch."""
    y = product(scaled, weight)
    return norm_reference(y, stats, norm, eps, weight.shape[1], gain, shift)


def _norm_linear(
    scaled: Tensor,
    stats: Tensor,
    norm: str,
    eps: float,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    check_one_token("scaled", scaled, weight.shape[1])
    return norm_linear_reference(scaled, stats, norm, eps, weight, gain, shift)


def _norm_linear_cuda(
    scaled: Tensor,
    stats: Tensor,
    norm: str,
    eps: float,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    from shadowc.kernels.cuda.batch import project_rows
    from shadowc.kernels.cuda.project import project

    check_one_token("scaled", scaled, weight.shape[1])
    batch = scaled.shape[0]
    out = stats.new_empty(batch, 1, weight.shape[0])
    if batch == 1:
        project(scaled[0, 0], stats, norm, eps, weight, gain, shift, out)
    else:
        project_rows(scaled[:, 0], stats, norm, eps, weight, gain, shift, out[:, 0])
    return out


def _norm_linear_fake(
    scaled: Tensor,
    stats: Tensor,
    norm: str,
    eps: float,
    weight: Tensor,
    gain: Tensor | None,
    shift: Tensor | None,
) -> Tensor:
    return stats.new_empty((*scaled.shape[:-1], weight.shape[0]))


register(
    "norm_linear(Tensor scaled, Tensor stats, str norm, float eps, Tensor weight, Tensor? gain, "
    "Tensor? shift) -> Tensor",
    _norm_linear,
    _norm_linear_fake,
    cuda=_norm_linear_cuda,
)
