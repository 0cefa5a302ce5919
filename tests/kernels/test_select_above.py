import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shadowc.errors import KernelError
from shadowc.kernels.select_above import select_above_reference


def by_hand(scores: Tensor, threshold: Tensor) -> tuple[list[list[list[int]]], list[list[int]]]:
    """The definition in Python: kept units ascending, then the others descending."""
    index, count = [], []
    for layer, least in enumerate(threshold.tolist()):
        index.append([])
        count.append([])
        for row in scores[:, layer].tolist():
            kept = [(float("inf") if s != s else s) > least for s in row]
            units = range(len(row))
            index[-1].append(
                [u for u in units if kept[u]] + [u for u in units[::-1] if not kept[u]]
            )
            count[-1].append(sum(kept))
    return index, count


@settings(deadline=None, max_examples=100)
@given(st.data())
def test_select_above(data):
    batch, layers, units = (data.draw(st.integers(1, top)) for top in (3, 5, 40))
    few = data.draw(st.sampled_from([1, 3, 1000]))  # few distinct values: many at the threshold
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    scores = torch.randint(-few, few + 1, (batch, layers, units)).float() * 1e-3
    threshold = torch.randint(-few, few + 1, (layers,)).float() * 1e-3
    for value in (torch.nan, -torch.nan, torch.inf, -torch.inf, -0.0):
        scores[torch.rand_like(scores) < 0.05] = value
        threshold[torch.rand_like(threshold) < 0.05] = value if value == value else torch.inf
    index, count = torch.ops.shadowc.select_above(scores, threshold)
    assert index.dtype == count.dtype == torch.int32
    assert (index.tolist(), count.tolist()) == by_hand(scores, threshold)
    mask = select_above_reference(scores, threshold)
    assert torch.equal(mask.sum(-1, dtype=torch.int32).T, count)
    for layer, rows in enumerate(index):
        for row, units_kept in enumerate(rows):
            assert mask[row, layer, units_kept[: count[layer, row]].long()].all()


@pytest.mark.parametrize("units", [1, 17, 4097])
@pytest.mark.parametrize("least", [torch.inf, 0.0, -torch.inf], ids=["zero", "half", "all"])
def test_whole_models_and_every_instruction_set(each_isa, units, least):
    scores = torch.randn(2, 24, units)
    index, count = torch.ops.shadowc.select_above(scores, torch.full((24,), least))
    mask = (scores > least).transpose(0, 1)
    assert torch.equal(count, mask.sum(-1, dtype=torch.int32))
    ranked = torch.arange(units).where(mask, 2 * units - torch.arange(units))
    assert torch.equal(index, ranked.argsort(-1).int())


def test_reference_exports_with_dynamic_leading_dimensions():
    class Model(torch.nn.Module):
        def forward(self, scores: Tensor, threshold: Tensor) -> Tensor:
            return select_above_reference(scores, threshold)

    dims = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    threshold = torch.tensor([0.0, 1.0, -1.0, 0.5])
    exported = torch.export.export(
        Model(), (torch.randn(2, 3, 4, 9), threshold), dynamic_shapes=(dims, None)
    )
    scores = torch.randn(5, 7, 4, 9)
    want = select_above_reference(scores, threshold)
    assert torch.equal(exported.module()(scores, threshold), want) and want.any()


@pytest.mark.parametrize(
    "scores, threshold",
    [
        (torch.zeros(2, 3), torch.zeros(2)),
        (torch.zeros(1, 2, 3), torch.zeros(3)),
        (torch.zeros(1, 2, 3), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(1, 3, 2).mT, torch.zeros(2)),
    ],
)
def test_refuses(scores, threshold):
    with pytest.raises(KernelError, match="'scores'|'threshold'"):
        torch.ops.shadowc.select_above(scores, threshold)
