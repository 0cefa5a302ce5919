import pytest
import torch

from shadowc.errors import KernelError
from shadowc.kernels.sparse_out_proj import sparse_out_proj_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARES = ["None", "zero", "one", "half", "all"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "batch, tokens, hidden, heads, width",
    [(1, 1, 1, 1, 8), (1, 1, 127, 10, 24), (4, 1, 576, 9, 64), (2, 5, 4097, 2, 16)],
)
def test_sparse_out_proj(
    each_isa, agree, keep_set, unkept, dtype, share, batch, tokens, hidden, heads, width
):
    ctx = torch.randn(batch, tokens, heads * width)
    weight = torch.randn(heads * width, hidden).to(dtype)
    keep = keep_set(share, batch, heads)
    for bias, residual in (
        (torch.randn(hidden), torch.randn(batch, tokens, hidden)),
        (None, None),
    ):
        want = sparse_out_proj_reference(ctx, weight, bias, residual, width, *keep)
        poisoned = weight.clone()
        poisoned[unkept(keep, heads).repeat_interleave(width)] = torch.nan
        got = torch.ops.shadowc.sparse_out_proj(ctx, poisoned, bias, residual, width, *keep)
        agree("sparse_out_proj", got, want)


@pytest.mark.parametrize(
    "name, change",
    [
        ("ctx", {"ctx": torch.randn(1, 2, 16).transpose(0, 1)[..., ::2]}),
        ("weight_t", {"weight_t": torch.randn(17, 8)}),
        ("weight_t", {"weight_t": torch.randn(16, 8).to(torch.int8)}),
        ("bias", {"bias": torch.randn(9)}),
        ("residual", {"residual": torch.randn(1, 2, 8)}),
        ("head_dim", {"head_dim": 3}),
        ("index", {"index": torch.zeros(2, 3, dtype=torch.int32)}),
    ],
)
def test_refuses(name, change):
    arguments = {
        "ctx": torch.randn(2, 1, 16),
        "weight_t": torch.randn(16, 8),
        "bias": None,
        "residual": None,
        "head_dim": 8,
        "index": torch.zeros(2, 2, dtype=torch.int32),
        "count": torch.zeros(2, dtype=torch.int32),
    }
    torch.ops.shadowc.sparse_out_proj(**arguments)
    with pytest.raises(KernelError, match=f"'{name}'"):
        torch.ops.shadowc.sparse_out_proj(**(arguments | change))
