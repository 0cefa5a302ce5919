"""Every op under opcheck and torch.export, and one compiled by AOTInductor."""

import pytest
import torch
from torch import Tensor

import shadowc.kernels.choose_above
import shadowc.kernels.choose_into
import shadowc.kernels.compact
import shadowc.kernels.decode_attention
import shadowc.kernels.linear
import shadowc.kernels.norm_linear
import shadowc.kernels.norm_mlp
import shadowc.kernels.norm_qkv
import shadowc.kernels.rms_norm
import shadowc.kernels.scale
import shadowc.kernels.scaled_out_proj
import shadowc.kernels.select
import shadowc.kernels.select_above
import shadowc.kernels.sparse_gated_mlp
import shadowc.kernels.sparse_mlp
import shadowc.kernels.sparse_out_proj
import shadowc.kernels.sparse_qkv  # noqa: F401

OPS = torch.ops.shadowc


def calls() -> dict[str, tuple[object, ...]]:
    torch.manual_seed(0)
    x, bias, wide = torch.randn(2, 1, 16), torch.randn(16), torch.randn(32)
    square, tall = torch.randn(16, 16), torch.randn(32, 16)
    heads = torch.ops.shadowc.compact(torch.tensor([[True, False], [True, True]]))
    neurons = torch.ops.shadowc.compact(torch.rand(2, 32) < 0.5)
    caches = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    start, position = torch.tensor([0, 1]), torch.tensor([3])
    rotary = torch.randn(2, 1, 8), torch.randn(2, 1, 8)
    scaled, stats = torch.ops.shadowc.scale(x, bias)
    layer, rms = (scaled, stats, "layer", 1e-5), (scaled, stats, "rms", 1e-5)
    three = (square, bias, bias) * 3
    return {
        "linear": (x, tall, wide),
        "rms_norm": (x, bias, 1e-5),
        "sparse_qkv": (x, square, bias, square, bias, square, bias, 8, *heads),
        "decode_attention": (x, x, x, *rotary, *caches, start, position, 0.3, *heads),
        "sparse_out_proj": (x, square, bias, x, 8, *heads),
        "sparse_mlp": (x, tall, wide, tall, bias, x, "relu", True, *neurons),
        "sparse_gated_mlp": (x, tall, tall, tall, x, "silu", False, *neurons),
        "select": (torch.randn(2, 3, 8), 9, 1, False),
        "select_above": (torch.randn(2, 3, 8), torch.randn(3)),
        "choose_above": (
            torch.randn(2, 1, 16), [tall, square], [wide, bias], [torch.zeros(1), torch.zeros(4)],
            True,
        ),
        "choose_into": (
            torch.randn(2, 1, 16), square, bias, [tall, square], [wide, bias],
            [torch.zeros(1), torch.zeros(4)],
            [
                torch.zeros(size, dtype=torch.int32)
                for size in ((2, 2, 32), (2, 2), (4, 2, 4), (4, 2))
            ],
            [1, 0],
        ),
        "compact": (torch.rand(2, 8) < 0.5,),
        "scale": (x, bias),
        "norm_linear": (*layer, tall, wide, wide),
        "norm_qkv": (*layer, *three, 8, *heads),
        "scaled_out_proj": (x, square, bias, x, bias, 8, *heads),
        "norm_mlp": (
            *layer, tall, wide, wide, None, tall, bias, x, bias, "relu", True, *neurons
        ),
        "norm_mlp gated": (
            *rms, tall, None, None, tall, tall, None, x, bias, "silu", False, None, None
        ),
        "norm_qkv rms": (*rms, *(square, None, None) * 3, 8, None, None),
    }  # fmt: skip


def overload(name: str) -> torch._ops.OpOverload:
    """The op of a call; what follows its name tells its variants apart."""
    return getattr(OPS, name.partition(" ")[0]).default


@pytest.mark.parametrize("op", calls())
def test_opcheck(op):
    torch.library.opcheck(overload(op), calls()[op])


@pytest.mark.parametrize("op", calls())
def test_export(op):
    class Model(torch.nn.Module):
        def forward(self, *arguments: object) -> object:
            return overload(op)(*arguments)

    exported = torch.export.export(Model(), calls()[op])
    torch.testing.assert_close(exported.module()(*calls()[op]), Model()(*calls()[op]))


def test_export_keeps_cache_updates():
    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("k_cache", torch.zeros(2, 2, 5, 8))
            self.register_buffer("v_cache", torch.zeros(2, 2, 5, 8))

        def forward(self, q: Tensor, start: Tensor, position: Tensor) -> Tensor:
            return OPS.decode_attention(
                q, q, q, None, None, self.k_cache, self.v_cache, start, position, 0.3, None, None
            )

    arguments = torch.randn(2, 1, 16), torch.tensor([0, 0]), torch.tensor([3])
    program = torch.export.export(Model(), arguments)
    program = program.run_decompositions()  # functionalised: the update is an output now
    module = program.module()
    module(*arguments)
    written = arguments[0].view(2, 2, 8)
    assert torch.equal(module.k_cache[:, :, 3], written)
    assert not module.k_cache[:, :, [0, 1, 2, 4]].any()


def test_aot_inductor(tmp_path):
    class Model(torch.nn.Module):
        def forward(
            self, x: Tensor, w1: Tensor, w2t: Tensor, index: Tensor, count: Tensor
        ) -> Tensor:
            y, _ = OPS.sparse_mlp(x, w1, None, w2t, None, x, "relu", True, index, count)
            return y + 1

    neurons = OPS.compact(torch.rand(1, 32) < 0.5)
    arguments = torch.randn(1, 1, 16), torch.randn(32, 16), torch.randn(32, 16), *neurons
    path = torch._inductor.aoti_compile_and_package(
        torch.export.export(Model(), arguments), package_path=str(tmp_path / "mlp.pt2")
    )
    compiled = torch._inductor.aoti_load_package(path)
    torch.testing.assert_close(compiled(*arguments), Model()(*arguments))
