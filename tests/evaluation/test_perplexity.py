"""Perplexity is causal, scores the same tokens for all masks, and reports what ran."""

from __future__ import annotations

import math

import pytest
import torch

from shadowc.calibration.data import Question
from shadowc.config import Policy
from shadowc.errors import OptionError
from shadowc.evaluation.masks import teacher_forced
from shadowc.evaluation.oracle import true_scores
from shadowc.evaluation.perplexity import accuracy, batches, evaluate

HALF = Policy(0.5, 0.5, min_neurons=2)


def windows_of(tiny, count=3, tokens=12):
    return tiny.ids(count, tokens).tolist()


def test_it_is_the_perplexity_of_token_by_token_decoding(tiny):
    session, windows = tiny.session(HALF), windows_of(tiny)
    loss, count = 0.0, 0
    for window in windows:
        ids = torch.tensor([window])
        cache = session.new_cache(1, len(window))
        session.step(ids[:, :1], cache)
        for token in range(1, len(window) - 1):
            logits = session.step(ids[:, token : token + 1], cache)["logits"][0, -1]
            loss -= float(logits.log_softmax(-1)[window[token + 1]])
            count += 1
    found = evaluate(session, windows, against=())["artifact"]
    assert found["tokens"] == count
    assert found["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-3)


def test_dense_is_the_original_model(tiny):
    windows = windows_of(tiny)
    found = evaluate(tiny.session(HALF), windows)["dense"]
    ids = torch.tensor(windows)
    logits = tiny.loaded.model(ids).logits[:, 1:-1]
    loss = torch.nn.functional.cross_entropy(logits.mT, ids[:, 2:])
    assert found["perplexity"] == pytest.approx(math.exp(float(loss)), rel=1e-3)
    assert found["head_sparsity"] == found["neuron_sparsity"] == 0.0


@pytest.mark.parametrize("refresh", [0, 1, 3])
def test_all_masks_have_the_same_budget_on_the_same_tokens(tiny_opt, refresh):
    policy = Policy(0.5, 0.5, refresh=refresh, min_neurons=2)
    session, windows = tiny_opt.session(policy), windows_of(tiny_opt)
    oracle = true_scores(tiny_opt.loaded, "sens", windows)
    names = ("dense", "static", "random", "oracle")
    found = evaluate(session, windows, against=names, oracle=oracle)
    assert {value["tokens"] for value in found.values()} == {3 * (10 if refresh else 5)}
    for name in ("artifact", "static", "random", "oracle"):
        assert found[name]["head_sparsity"] == pytest.approx(0.5, abs=0.01)
        assert found[name]["neuron_sparsity"] == pytest.approx(0.5, abs=0.01)
    assert len({value["perplexity"] for value in found.values()}) == len(found)


@pytest.mark.parametrize("taps", [(0, 2), (0, 1, 2)])
def test_several_taps_are_measured_beside_rankings_of_the_whole_model(tiny_opt, taps):
    """By their own masks; the others have the nominal budget exactly."""
    policy = Policy(0.5, 0.5, min_neurons=2, selection="threshold")
    session, windows = tiny_opt.with_taps(taps).session(policy), windows_of(tiny_opt)
    oracle = true_scores(tiny_opt.loaded, "sens", windows)
    found = evaluate(session, windows, against=("dense", "static", "oracle"), oracle=oracle)
    for name in ("static", "oracle"):
        assert found[name]["neuron_sparsity"] == pytest.approx(0.5, abs=0.01)
    taught = teacher_forced(session, torch.tensor(windows))
    for kind in ("head", "neuron"):
        skipped = 1 - taught[f"{kind}_mask"][:, 1:-1].float().mean().item()
        assert found["artifact"][f"{kind}_sparsity"] == pytest.approx(skipped)
    assert len({value["perplexity"] for value in found.values()}) == len(found)


@pytest.mark.parametrize("refresh", [0, 1, 3])
def test_with_a_stride_only_new_tokens_are_scored(tiny, refresh):
    """The first window as ever; of the others the last five tokens, each decoded in its window."""
    session = tiny.session(Policy(0.5, 0.5, refresh=refresh, min_neurons=2))
    text = tiny.ids(1, 22)[0].tolist()
    windows = [text[start : start + 12] for start in (0, 5, 10)]
    loss, count = 0.0, 0
    for window in windows:
        new = 5 if count else 10 if refresh else 5
        ids = torch.tensor([window])
        prompt = 1 if refresh else 12 - 5 - 1 if count else 6
        logits = teacher_forced(session, ids, prompt=prompt)["logits"][0, -new - 1 : -1]
        loss += float(torch.nn.functional.cross_entropy(logits, ids[0, -new:], reduction="sum"))
        count += new
    found = evaluate(session, windows, stride=5)
    assert found["artifact"]["tokens"] == found["dense"]["tokens"] == count
    assert found["artifact"]["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-3)
    longer = evaluate(session, windows[1:], stride=5)["artifact"]
    assert longer["tokens"] == count - 5


def test_a_stride_of_whole_windows_is_none(tiny):
    session, windows = tiny.session(HALF), windows_of(tiny)
    plain, found = evaluate(session, windows), evaluate(session, windows, stride=11)
    for name in ("artifact", "dense"):
        assert found[name] == pytest.approx(plain[name])


def test_static_masks_are_those_of_a_static_artifact(tiny):
    fixed, windows = tiny.calibration.static(), windows_of(tiny)
    beside = evaluate(tiny.session(HALF), windows, against=("static",))["static"]
    alone = evaluate(tiny.session(HALF, calibration=fixed), windows, against=())["artifact"]
    assert beside == pytest.approx(alone)


def test_the_oracle_ranks_by_the_effect_on_the_loss(tiny_opt):
    """Plainact of a head is |g*a|: removing the unit with the largest changes the loss the most."""
    ids = tiny_opt.ids(1, 12)
    heads, neurons = true_scores(tiny_opt.loaded, "plainact", ids.tolist())(ids)
    shape = tiny_opt.shape
    assert heads.shape == (1, 12, shape.layers, shape.heads)
    assert neurons.shape == (1, 12, shape.layers, shape.ffn)
    assert (heads >= 0).all() and heads[:, 1:-1].sum() > 0
    assert heads[:, -1].sum() == 0  # nothing depends on the last token


def test_what_cannot_be_compared(tiny_opt):
    windows = windows_of(tiny_opt)
    with pytest.raises(OptionError, match="'magic'"):
        evaluate(tiny_opt.session(HALF), windows, against=("magic",))
    with pytest.raises(OptionError, match="skips no units"):
        evaluate(tiny_opt.session(Policy(0.0, 0.0)), windows, against=("static",))
    with pytest.raises(OptionError, match="original model"):
        evaluate(tiny_opt.session(HALF), windows, against=("oracle",))


def test_batches_keep_lengths_apart_and_lose_nothing():
    windows = [[1, 2, 3], [4, 5, 6], [7, 8], [9, 10]]
    found = batches(windows, vocab=1 << 20)  # so large that a batch has one window
    assert [batch.tolist() for batch in found] == [[window] for window in windows]
    found = batches(windows, vocab=8)
    assert [batch.tolist() for batch in found] == [windows[:2], windows[2:]]


def test_accuracy_counts_the_likeliest_choice(tiny_opt):
    session = tiny_opt.session(HALF)
    choices = (("It was", " late"), ("It was", " a very long day"))
    questions = [Question(choices, 0), Question(choices, 1)]
    assert accuracy(session, tiny_opt.loaded, questions) == 0.5  # one of both labels is right
    dense = [accuracy(session, tiny_opt.loaded, [q], dense=True) for q in questions]
    tokenizer, scores = tiny_opt.loaded.tokenizer, []
    for prompt, ending in choices:
        start = len(tokenizer(prompt).input_ids)
        ids = torch.tensor([tokenizer(prompt + ending).input_ids])
        logits = tiny_opt.loaded.model(ids).logits[0, start - 1 : -1].log_softmax(-1)
        scores.append(float(logits.gather(1, ids[0, start:, None]).sum()))
    assert dense == [float(scores[0] > scores[1]), float(scores[1] > scores[0])]


def test_a_mask_depends_on_no_later_token(tiny):
    session, ids = tiny.session(HALF), tiny.ids(1, 12)
    changed = ids.clone()
    changed[0, 8:] = 5
    before, after = teacher_forced(session, ids), teacher_forced(session, changed)
    for name in ("head_mask", "neuron_mask"):
        assert torch.equal(before[name][:, :8], after[name][:, :8])
