import pytest
import torch

from shadowc.errors import KernelError


@pytest.mark.parametrize("units", [1, 17, 127, 4097])
@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_compact(units, share):
    mask = torch.rand(3, units) < share
    index, count = torch.ops.shadowc.compact(mask)
    assert index.dtype == count.dtype == torch.int32
    for row, kept, size in zip(mask, index, count, strict=True):
        assert torch.equal(kept[:size].long(), row.nonzero()[:, 0])


def test_refuses():
    with pytest.raises(KernelError, match="'mask'"):
        torch.ops.shadowc.compact(torch.ones(2, 3))
