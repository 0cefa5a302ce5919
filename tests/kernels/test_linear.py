import pytest
import torch

from shadowc.errors import KernelError
from shadowc.kernels.linear import linear_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows, inputs", [(1, 1), (17, 127), (127, 17), (320, 2048), (5, 4097)])
@pytest.mark.parametrize("tokens", [(1, 1), (3,), (5, 1), (2, 8)])
def test_linear(each_isa, agree, dtype, rows, inputs, tokens):
    x, weight = torch.randn(*tokens, inputs), torch.randn(rows, inputs).to(dtype)
    for bias in (torch.randn(rows), None):
        got = torch.ops.shadowc.linear(x, weight, bias)
        agree("linear", got, linear_reference(x, weight, bias))


def test_every_half_value_converts(each_isa):
    """Subnormals, infinities and signed zeros too."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        values = bits.view(dtype)
        values = values[~values.isnan()]
        got = torch.ops.shadowc.linear(torch.ones(1, 1), values[:, None].contiguous(), None)
        assert torch.equal(got[0], values.float())


def test_no_copy_of_the_weight_in_prefill():
    """A chunk is converted at a time: no allocation comes near the size of a float32 weight."""
    weight = torch.randn(4096, 512).to(torch.bfloat16)
    x = torch.randn(16, 512)
    with torch.profiler.profile(profile_memory=True) as profile:
        torch.ops.shadowc.linear(x, weight, None)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert largest < 4 * weight.numel() / 2


@pytest.mark.parametrize(
    "name, change",
    [
        ("x", lambda a: a.update(x=a["x"].double())),
        ("x", lambda a: a.update(x=a["x"][..., :-1])),
        ("x", lambda a: a.update(x=torch.randn(8, 2).T)),
        ("weight", lambda a: a.update(weight=a["weight"].double())),
        ("weight", lambda a: a.update(weight=torch.randn(8, 5).T)),
        ("bias", lambda a: a.update(bias=torch.randn(6))),
    ],
)
def test_refuses(name, change):
    arguments = {"x": torch.randn(2, 8), "weight": torch.randn(5, 8), "bias": torch.randn(5)}
    change(arguments)
    with pytest.raises(KernelError, match=f"'{name}'"):
        torch.ops.shadowc.linear(**arguments)
