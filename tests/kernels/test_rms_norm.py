import pytest
import torch

from shadowc.errors import KernelError
from shadowc.kernels.rms_norm import rms_norm_reference


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 17), (127,), (5, 1, 576), (1, 4097)])
def test_rms_norm(each_isa, agree, shape):
    x, weight = torch.randn(shape), torch.randn(shape[-1])
    got = torch.ops.shadowc.rms_norm(x, weight, 1e-5)
    agree("rms_norm", got, rms_norm_reference(x, weight, 1e-5))


def test_refuses():
    with pytest.raises(KernelError, match="'x'"):
        torch.ops.shadowc.rms_norm(torch.randn(2, 7), torch.randn(8), 1e-5)
    with pytest.raises(KernelError, match="'weight'"):
        torch.ops.shadowc.rms_norm(torch.randn(2, 8), torch.randn(8).double(), 1e-5)
