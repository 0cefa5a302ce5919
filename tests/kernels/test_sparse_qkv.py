import pytest
import torch

from shadowc.errors import KernelError
from shadowc.kernels.sparse_qkv import sparse_qkv_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARES = ["None", "zero", "one", "half", "all"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize(
    "batch, tokens, hidden, heads, groups, width",
    [(1, 1, 17, 1, 1, 8), (1, 1, 127, 10, 5, 24), (3, 1, 576, 9, 3, 64), (5, 3, 33, 4, 4, 16)],
)
def test_sparse_qkv(
    each_isa, agree, keep_set, unkept, dtype, share, batch, tokens, hidden, heads, groups, width
):
    x = torch.randn(batch, tokens, hidden)
    wq, wk, wv = (torch.randn(n * width, hidden).to(dtype) for n in (heads, groups, groups))
    bq, bk, bv = (torch.randn(n * width) for n in (heads, groups, groups))
    keep = keep_set(share, batch, heads)
    want = sparse_qkv_reference(x, wq, bq, wk, bk, wv, bv, width, *keep)
    wq[unkept(keep, heads).repeat_interleave(width)] = torch.nan
    got = torch.ops.shadowc.sparse_qkv(x, wq, bq, wk, bk, wv, bv, width, *keep)
    for one, other in zip(got, want, strict=True):
        agree("sparse_qkv", one, other)


@pytest.mark.parametrize(
    "name, change",
    [
        ("x", {"x": torch.randn(2, 8)}),
        ("head_dim", {"head_dim": 5}),
        ("head_dim", {"head_dim": 0}),
        ("wk", {"wk": torch.randn(8, 8).half()}),
        ("wv", {"wv": torch.randn(16, 8)}),
        ("bq", {"bq": torch.randn(15)}),
        ("index", {"index": torch.zeros(1, 2, dtype=torch.int32)}),
        ("index", {"index": torch.zeros(2, 2, dtype=torch.int64)}),
        ("count", {"count": torch.zeros(3, dtype=torch.int32)}),
        ("keep set", {"count": None}),
    ],
)
def test_refuses(name, change):
    arguments = {
        "x": torch.randn(2, 1, 8),
        "wq": torch.randn(16, 8),
        "bq": None,
        "wk": torch.randn(8, 8),
        "bk": None,
        "wv": torch.randn(8, 8),
        "bv": None,
        "head_dim": 8,
        "index": torch.zeros(2, 2, dtype=torch.int32),
        "count": torch.zeros(2, dtype=torch.int32),
    }
    torch.ops.shadowc.sparse_qkv(**arguments)
    with pytest.raises(KernelError, match=name):
        torch.ops.shadowc.sparse_qkv(**(arguments | change))
