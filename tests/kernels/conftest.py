"""What the kernel tests share: one table of tolerances, keep sets, and the instruction sets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import shadowc.kernels.compact  # noqa: F401
from shadowc.native import isa, library

# Largest RMS error over RMS value. References and kernels read the same rounded weights and add in
# float32, so the weight dtype does not matter: what is allowed is another order of addition.
TOLERANCES = {
    "linear": 3e-6,
    "rms_norm": 3e-7,
    "sparse_qkv": 3e-6,
    "decode_attention": 3e-6,  # a mean over many slots cancels most of its terms
    "sparse_out_proj": 3e-6,
    "sparse_mlp": 5e-6,
    "sparse_gated_mlp": 5e-6,
}

Keep = tuple[Tensor | None, Tensor | None]


@pytest.fixture
def agree() -> Callable[[str, Tensor, Tensor], None]:
    """Compares an output with its reference at the op's tolerance."""

    def compare(op: str, got: Tensor, want: Tensor) -> None:
        assert got.shape == want.shape and got.dtype == want.dtype
        assert torch.isfinite(got).all()
        error = (got.double() - want.double()).square().mean().sqrt()
        assert error <= TOLERANCES[op] * want.double().square().mean().sqrt() + 1e-30

    return compare


@pytest.fixture
def keep_set() -> Callable[[str, int, int], Keep]:
    """Makes a keep set; rows of a batch differ, and entries past the count are poisoned."""

    def make(share: str, batch: int, units: int) -> Keep:
        if share == "None":
            return None, None
        mask = torch.zeros(batch, units, dtype=torch.bool)
        size = {"zero": 0, "one": 1, "half": (units + 1) // 2, "all": units}[share]
        for row in mask:
            row[torch.randperm(units)[:size]] = True
        index, count = torch.ops.shadowc.compact(mask)
        beyond = torch.arange(units) >= count[:, None]
        return index.masked_fill(beyond, torch.iinfo(torch.int32).max), count

    return make


@pytest.fixture
def unkept() -> Callable[[Keep, int], Tensor]:
    """Mask [N] of the units that no row of the batch keeps: their weights may hold anything."""

    def mask(keep: Keep, units: int) -> Tensor:
        free = torch.zeros(units, dtype=torch.bool)
        if keep[0] is not None and keep[1] is not None:
            free[:] = True
            for index, count in zip(*keep, strict=True):
                free[index[:count].long()] = False
        return free

    return mask


@pytest.fixture(params=["best", "generic"])
def each_isa(request: pytest.FixtureRequest) -> Iterator[None]:
    """Runs a test with the best instruction set of this CPU and with the portable one."""
    best = isa()
    if request.param == "generic":
        library().shadowc_isa(b"generic")
    yield
    library().shadowc_isa(best.encode())


@pytest.fixture(autouse=True)
def seed() -> None:
    """Same numbers in every run."""
    torch.manual_seed(0)
