"""linear(x, frozen weight) and its gradient on CPUs in fp32, by oneDNN.

By itself torch takes MKL there, which on AMD's CPUs uses half of the vector's width: 215 GFLOP/s
beside oneDNN's 450 on two cores of an EPYC with AVX-512. On Intel's the two are equals.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class OneDnn(TorchFunctionMode):
    """While it is entered, linear layers of frozen fp32 weights on a CPU are oneDNN's."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Take the call over if it is such a layer."""
        if func is nn.functional.linear and not kwargs and _taken(*args):
            return _Linear.apply(*args)  # type: ignore[no-untyped-call]
        return func(*args, **(kwargs or {}))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        ctx.save_for_backward(weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (weight,) = ctx.saved_tensors
        return _product(gradients[0], weight.t(), None), None, None


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _taken(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> bool:
    frozen = not (weight.requires_grad or (bias is not None and bias.requires_grad))
    ours = x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32
    return frozen and ours and torch.backends.mkldnn.is_available()
