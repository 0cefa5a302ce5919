"""Free-running generation beside the dense model."""

from __future__ import annotations

import math

import pytest
import torch

from shadowc.config import Policy
from shadowc.errors import LengthError
from shadowc.evaluation.generation import compare_with_dense, continue_greedily

HALF = Policy(0.5, 0.5, min_neurons=2)


def test_what_skips_nothing_agrees_with_dense(tiny):
    windows = tiny.ids(3, 16).tolist()
    found = compare_with_dense(tiny.session(Policy(0.0, 0.0)), windows, 10)
    assert found["equal_tokens"] == 1.0 and found["first_divergence"] == 10
    assert found["perplexity"] == found["dense_perplexity"]
    assert found["prompts"] == 3 and found["prompt_tokens"] == 8


def test_both_continuations_are_compared_and_judged_by_the_dense_model(tiny):
    session, windows = tiny.session(HALF), tiny.ids(2, 16, seed=3).tolist()
    found = compare_with_dense(session, windows, 6)
    prompts = [window[:8] for window in windows]
    texts = {
        dense: [continue_greedily(session, prompt, 6, dense=dense) for prompt in prompts]
        for dense in (False, True)
    }
    pairs = list(zip(texts[False], texts[True], strict=True))
    equal = [[a == b for a, b in zip(*pair, strict=True)] for pair in pairs]
    assert found["equal_tokens"] == sum(map(sum, equal)) / 12 < 1
    assert found["first_divergence"] == sum([*row, False].index(False) for row in equal) / 2
    for dense, key in ((False, "perplexity"), (True, "dense_perplexity")):
        ids = torch.tensor([p + text for p, text in zip(prompts, texts[dense], strict=True)])
        logits = tiny.loaded.model(ids).logits[:, 7:-1]
        loss = torch.nn.functional.cross_entropy(logits.mT, ids[:, 8:])
        assert found[key] == pytest.approx(math.exp(float(loss)), rel=1e-3)
    best = tiny.loaded.model.generate(
        torch.tensor(prompts[:1]), max_new_tokens=6, min_new_tokens=6, do_sample=False,
        pad_token_id=1, eos_token_id=None,
    )  # fmt: skip
    assert texts[True][0] == best[0, 8:].tolist()


def test_generation_stops_when_told_and_needs_room(tiny_opt):
    session, windows = tiny_opt.session(HALF), tiny_opt.ids(1, 60).tolist()
    assert len(continue_greedily(session, [5], 9, stop=lambda found: len(found) == 4)) == 4
    assert compare_with_dense(session, windows, 60)["prompt_tokens"] == 4
    with pytest.raises(LengthError, match="at most 63"):
        compare_with_dense(session, windows, 64)
