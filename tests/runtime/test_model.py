"""transformers' `generate` on an artifact: at sparsity 0, exactly what the original model gives."""

from __future__ import annotations

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from shadowc.config import Policy
from shadowc.errors import LengthError, OptionError
from shadowc.runtime.model import ShadowcForCausalLM, padding

TEXTS = ["It was", "The captain looked at her and", "She", "When the morning came, they all"]


@pytest.fixture(params=["opt", "llama"])
def pair(request):
    """(compiled at sparsity 0, original, tokenizer)."""
    tiny = request.getfixturevalue(f"tiny_{request.param}")
    loaded = tiny.loaded
    config = GenerationConfig(bos_token_id=2, eos_token_id=2, pad_token_id=1)
    loaded.model.generation_config = config
    session = tiny.session(Policy(0.0, 0.0))
    model = ShadowcForCausalLM(loaded.model.config, config, session, {}, loaded.tokenizer)
    return model, loaded.model, loaded.tokenizer


def encode(tokenizer, texts):
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left")


def same(pair, texts, **options):
    ours, theirs, tokenizer = pair
    inputs = encode(tokenizer, texts)
    results = []
    for model in (ours, theirs):
        torch.manual_seed(0)
        results.append(model.generate(**inputs, max_new_tokens=16, **options))
    assert torch.equal(*results)
    return results[0]


def test_greedy(pair):
    same(pair, TEXTS[:1], do_sample=False)


def test_greedy_batch_padded_on_the_left(pair):
    same(pair, TEXTS, do_sample=False)


def test_sampling(pair):
    same(pair, TEXTS, do_sample=True, temperature=0.8, top_k=20)


def test_beam_search(pair):
    same(pair, TEXTS[:2], num_beams=3, do_sample=False)


def test_several_sequences_a_prompt(pair):
    assert same(pair, TEXTS[:2], num_return_sequences=2, do_sample=True).shape[0] == 4


def test_streaming_and_stop_tokens(pair):
    ours, _, tokenizer = pair

    class Collect(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    inputs = encode(tokenizer, TEXTS[:1])
    full = ours.generate(**inputs, max_new_tokens=12, do_sample=False)
    stop = int(full[0, inputs.input_ids.shape[1] + 4])
    streamer = Collect()
    cut = ours.generate(
        **inputs, max_new_tokens=12, do_sample=False, eos_token_id=stop, streamer=streamer
    )
    assert int(cut[0, -1]) == stop and cut.shape[1] <= full.shape[1] - 7
    assert streamer.tokens == cut[0].tolist() and streamer.ended


def test_a_conversation_goes_on_from_its_cache(pair):
    ours, theirs, tokenizer = pair
    ids = encode(tokenizer, TEXTS[1:2]).input_ids
    cache = ours.session.new_cache(1)
    first = ours.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
    longer = torch.cat((first, ids[:, 1:]), dim=1)
    second = ours.generate(longer, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert torch.equal(second, theirs.generate(longer, max_new_tokens=4, do_sample=False))


def test_too_long_is_refused_before_anything_runs(pair):
    ours, _, tokenizer = pair
    inputs = encode(tokenizer, TEXTS[:1])
    ours.session.step = lambda *a, **k: pytest.fail("a program ran")
    with pytest.raises(LengthError, match="at most 64 tokens"):
        ours.generate(**inputs, max_new_tokens=64)


def test_the_bare_step_refuses_too_much(pair):
    session = pair[0].session
    with pytest.raises(LengthError, match="does not fit in the cache"):
        session.step(torch.zeros(1, 9, dtype=torch.int64), session.new_cache(1, 8))


def test_padding_on_the_right_is_refused():
    assert padding(torch.tensor([[0, 1, 1], [1, 1, 1]])).tolist() == [1, 0]
    with pytest.raises(OptionError, match="not on the left"):
        padding(torch.tensor([[1, 1, 0]]))


def test_scoring_returns_all_logits(pair):
    ours, theirs, tokenizer = pair
    ids = encode(tokenizer, TEXTS[1:2]).input_ids
    logits = ours(ids, use_cache=False).logits
    torch.testing.assert_close(logits, theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("refresh", [1, 3, 0])
def test_sparse_rows_of_a_padded_batch_are_independent(tiny, refresh):
    """A row of a padded batch generates what it generates alone, with its own masks."""
    session = tiny.session(Policy(0.4, 0.5, min_neurons=2, refresh=refresh))
    config = GenerationConfig(bos_token_id=2, eos_token_id=2, pad_token_id=1)
    model = ShadowcForCausalLM(tiny.loaded.model.config, config, session, {})
    tokenizer = tiny.loaded.tokenizer
    batch = encode(tokenizer, TEXTS)
    together = model.generate(**batch, max_new_tokens=10, do_sample=False)[:, -10:]
    for row, text in enumerate(TEXTS):
        alone = model.generate(**encode(tokenizer, [text]), max_new_tokens=10, do_sample=False)
        assert torch.equal(alone[0, -10:], together[row]), text
