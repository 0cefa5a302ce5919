"""A probe's effects are those of knocking units out; its recall is 1 for whoever knows them."""

from __future__ import annotations

import pytest
import torch

from shadowc.config import Policy
from shadowc.evaluation.masks import teacher_forced, with_given_masks
from shadowc.evaluation.probe import _effects, _recall, probe

HALF = Policy(0.5, 0.5, min_neurons=2)


def test_effects_are_first_order_knock_outs(tiny):
    """Lowering one unit's mask a little changes the loss by its effect."""
    session, ids = tiny.session(HALF), tiny.ids(1, 10)
    ran = teacher_forced(session, ids, prompt=3)
    logits, effects = _effects(session, ids, ran["head_mask"], ran["neuron_mask"])
    given = session.with_program("given_masks", with_given_masks(session.programs["masked"]))

    def loss(masks):
        found = teacher_forced(given, ids, masks=masks)["logits"]
        return torch.nn.functional.cross_entropy(found[0, :-1].double(), ids[0, 1:])

    ones = [torch.ones(effect.shape) for effect in effects]
    whole = teacher_forced(given, ids, masks=ones)["logits"]
    torch.testing.assert_close(logits, whole, atol=1e-5, rtol=1e-5)
    for kind, effect in enumerate(effects):
        place = torch.unravel_index(effect.argmax(), effect.shape)
        step, masks = 0.004, [[one.clone() for one in ones] for _ in range(2)]
        masks[0][kind][place] -= step
        masks[1][kind][place] += step
        change = (loss(masks[0]) - loss(masks[1])).abs() / (2 * step)
        assert float(change) == pytest.approx(float(effect[place]), rel=0.02)


def test_recall_of_an_oracle_and_of_a_fool():
    effect = torch.rand(5, 3, 8, generator=torch.Generator().manual_seed(0))
    best = torch.zeros(5, 3, 8, dtype=torch.bool)
    best.scatter_(-1, effect.topk(3, dim=-1).indices, True)
    worst = torch.zeros_like(best)
    worst.scatter_(-1, effect.topk(3, dim=-1, largest=False).indices, True)
    assert _recall(best, effect) == 1.0 and _recall(worst, effect) == 0.0
    assert _recall(best, torch.zeros_like(effect)) == 0.0, "nothing is wanted of no effect"


def test_a_probe_counts_decoded_tokens_alone(tiny):
    session = tiny.session(HALF)
    assert probe(session, tiny.ids(1, 12), prompt=4)["tokens"] == 7
    assert probe(session, tiny.ids(1, 5), prompt=4) is None
    assert probe(tiny.session(Policy(0.0, 0.0)), tiny.ids(1, 12), prompt=4) is None


def test_of_a_long_request_the_end_is_probed(tiny, monkeypatch):
    session, ids = tiny.session(HALF), tiny.ids(1, 20)
    monkeypatch.setattr("shadowc.evaluation.probe.MOST_TOKENS", 8)
    assert probe(session, ids, prompt=15) == probe(session, ids[:, 12:], prompt=3)
    assert probe(session, ids, prompt=4)["tokens"] == 6
