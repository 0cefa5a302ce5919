import pytest
import torch

from shadowc.errors import KernelError
from shadowc.kernels.sparse_gated_mlp import sparse_gated_mlp_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHARES = ["None", "zero", "one", "half", "all"]
SHAPES = [(1, 1, 1, 1), (1, 1, 17, 127), (1, 1, 4097, 17), (2, 1, 33, 4097),
          (5, 1, 64, 320), (3, 4, 33, 65)]  # fmt: skip


def tensors(batch, tokens, hidden, neurons, dtype):
    matrices = {
        name: torch.randn(neurons, hidden).to(dtype) for name in ("w_gate", "w_up", "w_downt")
    }
    return {
        "x": torch.randn(batch, tokens, hidden) / hidden**0.5,
        **matrices,
        "residual": torch.randn(batch, tokens, hidden),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", SHARES)
@pytest.mark.parametrize("batch, tokens, hidden, neurons", SHAPES)
def test_sparse_gated_mlp(
    each_isa, agree, keep_set, unkept, dtype, share, batch, tokens, hidden, neurons
):
    given = tensors(batch, tokens, hidden, neurons, dtype)
    keep = keep_set(share, batch, neurons)
    poisoned = dict(given)
    for name in ("w_gate", "w_up", "w_downt"):
        poisoned[name] = given[name].clone()
        poisoned[name][unkept(keep, neurons)] = torch.nan
    for activation, skip_zeros in (("silu", False), ("silu", True), ("relu", True), ("gelu", 0)):
        rest = (activation, bool(skip_zeros), *keep)
        want, want_rows = sparse_gated_mlp_reference(*given.values(), *rest)
        got, rows = torch.ops.shadowc.sparse_gated_mlp(*poisoned.values(), *rest)
        agree("sparse_gated_mlp", got, want)
        # An activation within rounding of zero may fall on either side.
        assert (rows - want_rows).abs().max() <= (activation == "relu")
    want, _ = sparse_gated_mlp_reference(
        *(given | {"residual": None}).values(), "silu", True, *keep
    )
    got, _ = torch.ops.shadowc.sparse_gated_mlp(
        *(given | {"residual": None}).values(), "silu", True, *keep
    )
    agree("sparse_gated_mlp", got, want)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_zero_gate_skips_both_rows(each_isa, batch):
    given = tensors(batch, 1, 64, 256, torch.bfloat16)
    gate = torch.nn.functional.linear(given["x"], given["w_gate"].float())
    dead = (gate <= -1e-3).all(0)[0]
    assert dead.sum() > 10
    given["w_up"][dead] = torch.nan
    given["w_downt"][dead] = torch.nan
    y, _ = torch.ops.shadowc.sparse_gated_mlp(*given.values(), "relu", True, None, None)
    assert torch.isfinite(y).all()


def test_silu_of_large_values(each_isa, agree):
    """exp must neither overflow nor lose its tail."""
    given = tensors(1, 1, 64, 64, torch.float32)
    given["x"] *= 100
    got, _ = torch.ops.shadowc.sparse_gated_mlp(*given.values(), "silu", False, None, None)
    want, _ = sparse_gated_mlp_reference(*given.values(), "silu", False, None, None)
    agree("sparse_gated_mlp", got, want)


@pytest.mark.parametrize(
    "name, change",
    [
        ("w_gate", {"w_gate": torch.randn(16, 8).double()}),
        ("w_up", {"w_up": torch.randn(15, 8)}),
        ("w_downt", {"w_downt": torch.randn(16, 8).half()}),
        ("residual", {"residual": torch.randn(2, 1, 7)}),
        ("activation", {"activation": "swish"}),
        ("count", {"count": torch.zeros(2, dtype=torch.int64)}),
    ],
)
def test_refuses(name, change):
    arguments = tensors(2, 1, 8, 16, torch.float32) | {
        "activation": "silu",
        "skip_zeros": False,
        "index": torch.zeros(2, 16, dtype=torch.int32),
        "count": torch.zeros(2, dtype=torch.int32),
    }
    torch.ops.shadowc.sparse_gated_mlp(**arguments)
    with pytest.raises(KernelError, match=f"'{name}'"):
        torch.ops.shadowc.sparse_gated_mlp(**(arguments | change))
