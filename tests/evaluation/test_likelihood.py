"""Log-likelihoods under the artifact's own masks, and the perplexity of a word made of them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shadowc.config import Policy
from shadowc.evaluation.likelihood import log_likelihoods, rolling_windows, word_perplexity
from shadowc.evaluation.masks import teacher_forced

TEXTS = ["It was late, and she had\nnot come. ", "He said that the sea was calm. " * 12]


def requests_of(tiny):
    """Of many lengths, so that some are padded."""
    rows = tiny.ids(4, 20).tolist()
    return [(row[:n], row[n : n + m]) for row, n, m in zip(rows, (3, 8, 5, 1), (5, 9, 1, 4),
                                                           strict=True)]  # fmt: skip


@pytest.mark.parametrize("refresh", [0, 1, 3])
def test_a_request_is_decoded_after_its_context(tiny, refresh):
    """Token by token: with one mask a prompt the context is the prompt, else all but one token."""
    session = tiny.session(Policy(0.5, 0.5, refresh=refresh, min_neurons=2))
    requests = requests_of(tiny)
    found = log_likelihoods(session, requests, rows=3)
    for (context, continuation), (got, _) in zip(requests, found, strict=True):
        text = torch.tensor([context + continuation])
        prompt = 1 if refresh else len(context)
        cache = session.new_cache(1, text.shape[1])
        logits = [session.step(text[:, :prompt], cache)["logits"][0, -1]]
        for token in range(prompt, text.shape[1] - 1):
            logits.append(session.step(text[:, token : token + 1], cache)["logits"][0, -1])
        chosen = torch.stack(logits).log_softmax(-1).gather(1, text[0, prompt:, None])
        assert got == pytest.approx(float(chosen[-len(continuation) :].sum()), rel=1e-3)
    assert found != log_likelihoods(session, requests, dense=True)


def test_greedy_continuations_are_called_so(tiny):
    session, context = tiny.session(Policy(0.0, 0.0)), tiny.ids(1, 6).tolist()[0]
    best = int(teacher_forced(session, torch.tensor([context]))["logits"][0, -1].argmax())
    other = (best + 1) % tiny.shape.vocab
    found = log_likelihoods(session, [(context, [best]), (context, [other])])
    assert [greedy for _, greedy in found] == [True, False] and found[0][0] > found[1][0]


@given(st.integers(0, 40), st.integers(1, 12))
def test_windows_predict_every_token_once(tokens, length):
    ids = list(range(tokens))
    windows = rolling_windows(ids, -1, length)
    assert sum((continuation for _, continuation in windows), []) == ids
    for context, continuation in windows:
        assert len(context) + len(continuation) <= length + 1
        assert context[-1] == continuation[0] - 1  # -1 is the prefix
    if tokens > length:
        assert len(windows[-1][0]) + len(windows[-1][1]) == length + 1  # all the context there is


def test_word_perplexity_counts_what_whitespace_separates(tiny_opt):
    session, loaded = tiny_opt.session(Policy(0.0, 0.0)), tiny_opt.loaded
    found = word_perplexity(session, loaded, TEXTS[:1], 64)
    ids = loaded.tokenizer(TEXTS[0], return_tensors="pt").input_ids  # BOS first
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(
            loaded.model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"
        )
    words = 8 + 1  # as the harness counts: the empty one behind the last space too
    assert found == pytest.approx(math.exp(float(loss) / words), rel=1e-3)
    both = word_perplexity(session, loaded, TEXTS, 16)
    assert both != pytest.approx(found) and both != word_perplexity(session, loaded, TEXTS, 64)
