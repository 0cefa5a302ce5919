import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shadowc.errors import KernelError
from shadowc.kernels.select import select_reference


def sorted_selection(scores: Tensor, keep: int, floor: int, local: bool) -> Tensor:
    """The definition, by sorting (score descending, layer, unit): [L, N] -> mask."""
    layers, units = scores.shape
    mask = torch.zeros(layers, units, dtype=torch.bool)
    ranked = sorted((-float(s), at) for at, s in enumerate(scores.flatten()))
    for layer in range(layers):
        size = keep // layers + (layer < keep % layers) if local else floor
        own = [at for _, at in ranked if at // units == layer]
        mask.flatten()[own[:size]] = True
    rest = [at for _, at in ranked if not mask.flatten()[at]]
    mask.flatten()[rest[: keep - int(mask.sum())]] = True
    return mask


def as_mask(index: Tensor, count: Tensor) -> Tensor:
    """[L, B, N] keep sets -> mask [B, L, N]; checks that the indices ascend."""
    mask = torch.zeros(index.shape, dtype=torch.bool)
    for layer, rows in enumerate(index):
        for row, kept in enumerate(rows):
            valid = kept[: count[layer, row]].long()
            assert (valid.diff() > 0).all()
            mask[layer, row, valid] = True
    return mask.transpose(0, 1)


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_select(data):
    batch, layers, units = (data.draw(st.integers(1, top)) for top in (3, 5, 40))
    local = data.draw(st.booleans())
    floor = data.draw(st.integers(0, units))
    keep = data.draw(st.integers(0 if local else layers * floor, layers * units))
    few = data.draw(st.sampled_from([1, 3, 1000]))  # few distinct values make many ties
    seed = data.draw(st.integers(0, 1000))
    torch.manual_seed(seed)
    scores = torch.randint(-few, few + 1, (batch, layers, units)).float() * 1e-3
    scores[torch.rand_like(scores) < 0.05] = -torch.inf
    scores[torch.rand_like(scores) < 0.05] = -0.0
    want = torch.stack([sorted_selection(row, keep, floor, local) for row in scores])
    assert torch.equal(select_reference(scores, keep, floor, local), want)
    got = as_mask(*torch.ops.shadowc.select(scores, keep, floor, local))
    assert torch.equal(got, want)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("spread", ["normal", "exponential", "relu", "equal"])
@pytest.mark.parametrize("share", [0.01, 0.5, 1.0])
def test_select_whole_model(each_isa, local, spread, share):
    scores = torch.randn(2, 24, 4097)
    if spread == "exponential":  # one layer far above the others: their floors decide
        scores = (5 * scores).exp()
        scores[:, 3] *= 1e10
    if spread == "relu":
        scores = scores.relu()
    if spread == "equal":
        scores = torch.zeros_like(scores)
    keep = int(share * 24 * 4097)
    got = as_mask(*torch.ops.shadowc.select(scores, keep, 16, local))
    assert torch.equal(got, select_reference(scores, keep, 16, local))
    assert (got.sum((1, 2)) == keep).all()


def test_not_a_number_counts_as_best():
    scores = torch.tensor([[[1.0, torch.nan, 3.0], [torch.inf, -torch.nan, 2.0]]])
    want = torch.tensor([[[False, True, False], [True, True, False]]])
    assert torch.equal(as_mask(*torch.ops.shadowc.select(scores, 3, 0, False)), want)
    assert torch.equal(select_reference(scores, 3, 0, False), want)


def test_reference_exports_with_dynamic_leading_dimensions():
    class Model(torch.nn.Module):
        def forward(self, scores: Tensor) -> tuple[Tensor, Tensor]:
            return select_reference(scores, 21, 2, False), select_reference(scores, 21, 2, True)

    batch, tokens = torch.export.Dim("batch"), torch.export.Dim("tokens")
    exported = torch.export.export(
        Model(), (torch.randn(2, 3, 4, 9),), dynamic_shapes=({0: batch, 1: tokens},)
    )
    scores = torch.randn(5, 7, 4, 9)
    for got, local in zip(exported.module()(scores), (False, True), strict=True):
        assert torch.equal(got, select_reference(scores, 21, 2, local))


@pytest.mark.parametrize("keep, floor", [(-1, 0), (25, 0), (5, 3), (24, 13), (5, -1)])
def test_refuses(keep, floor):
    with pytest.raises(KernelError, match="'keep'|'floor'"):
        torch.ops.shadowc.select(torch.randn(1, 2, 12), keep, floor, False)
