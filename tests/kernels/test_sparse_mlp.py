import pytest
import torch

from shadowc.errors import KernelError
from shadowc.kernels.sparse_mlp import sparse_mlp_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARES = ["None", "zero", "one", "half", "all"]
SHAPES = [(1, 1, 1, 1), (1, 1, 17, 127), (1, 1, 4097, 17), (2, 1, 127, 4097),
          (5, 1, 64, 320), (3, 4, 33, 65)]  # fmt: skip


def tensors(batch, tokens, hidden, neurons, dtype):
    return {
        "x": torch.randn(batch, tokens, hidden) / hidden**0.5,
        "w1": torch.randn(neurons, hidden).to(dtype),
        "b1": torch.randn(neurons),
        "w2t": torch.randn(neurons, hidden).to(dtype),
        "b2": torch.randn(hidden),
        "residual": torch.randn(batch, tokens, hidden),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("batch, tokens, hidden, neurons", SHAPES)
def test_sparse_mlp(
    each_isa, agree, keep_set, unkept, dtype, share, batch, tokens, hidden, neurons
):
    given = tensors(batch, tokens, hidden, neurons, dtype)
    keep = keep_set(share, batch, neurons)
    poisoned = dict(given)
    for name in ("w1", "w2t"):
        poisoned[name] = given[name].clone()
        poisoned[name][unkept(keep, neurons)] = torch.nan
    for activation, skip_zeros in (("relu", True), ("relu", False), ("silu", True), ("gelu", 0)):
        rest = (activation, bool(skip_zeros), *keep)
        want, want_rows = sparse_mlp_reference(*given.values(), *rest)
        got, rows = torch.ops.shadowc.sparse_mlp(*poisoned.values(), *rest)
        agree("sparse_mlp", got, want)
        # An activation within rounding of zero may fall on either side.
        assert (rows - want_rows).abs().max() <= (activation == "relu") * skip_zeros
    bare = given | {"b1": None, "b2": None, "residual": None}
    want, _ = sparse_mlp_reference(*bare.values(), "relu", True, *keep)
    got, _ = torch.ops.shadowc.sparse_mlp(*bare.values(), "relu", True, *keep)
    agree("sparse_mlp", got, want)


@pytest.mark.parametrize("batch", [1, 3])
def test_rows_of_zero_activations_are_not_read(each_isa, batch):
    given = tensors(batch, 1, 64, 256, torch.bfloat16)
    h = torch.nn.functional.linear(given["x"], given["w1"].float(), given["b1"])
    dead = (h <= -1e-3).all(0)[0]
    assert dead.sum() > 10
    given["w2t"][dead] = torch.nan
    y, _ = torch.ops.shadowc.sparse_mlp(*given.values(), "relu", True, None, None)
    assert torch.isfinite(y).all()
    y, _ = torch.ops.shadowc.sparse_mlp(*given.values(), "relu", False, None, None)
    assert y.isnan().all()


@pytest.mark.parametrize("batch", [1, 4, 70])
def test_same_result_for_any_number_of_threads(keep_set, batch):
    given = tensors(batch, 1, 192, 1000, torch.bfloat16)
    keep = keep_set("half", batch, 1000)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 2, 3, 7):
        torch.set_num_threads(threads)
        y, _ = torch.ops.shadowc.sparse_mlp(*given.values(), "relu", True, *keep)
        results.append(y)
    torch.set_num_threads(before)
    assert all(torch.equal(y, results[0]) for y in results)


def test_nan_of_one_row_stays_there(each_isa, keep_set):
    given = tensors(3, 1, 64, 96, torch.float32)
    given["x"][1] = torch.nan
    y, _ = torch.ops.shadowc.sparse_mlp(*given.values(), "relu", True, *keep_set("half", 3, 96))
    assert y[1].isnan().all()
    assert torch.isfinite(y[[0, 2]]).all()


@pytest.mark.parametrize(
    "name, change",
    [
        ("x", {"x": torch.randn(2, 8)}),
        ("x", {"x": torch.randn(2, 1, 8).half()}),
        ("w1", {"w1": torch.randn(16, 8).double()}),
        ("w2t", {"w2t": torch.randn(8, 16)}),
        ("w2t", {"w2t": torch.randn(16, 8).half()}),
        ("w2t", {"w2t": torch.randn(8, 16).T}),
        ("b1", {"b1": torch.randn(8)}),
        ("b2", {"b2": torch.randn(16)}),
        ("residual", {"residual": torch.randn(2, 8)}),
        ("activation", {"activation": "tanh"}),
        ("index", {"index": torch.zeros(2, 8, dtype=torch.int32)}),
    ],
)
def test_refuses(name, change):
    arguments = tensors(2, 1, 8, 16, torch.float32) | {
        "activation": "relu",
        "skip_zeros": True,
        "index": torch.zeros(2, 16, dtype=torch.int32),
        "count": torch.zeros(2, dtype=torch.int32),
    }
    torch.ops.shadowc.sparse_mlp(**arguments)
    with pytest.raises(KernelError, match=f"'{name}'"):
        torch.ops.shadowc.sparse_mlp(**(arguments | change))
