"""transformers' `generate` on an artifact: at sparsity 0, exactly what the original model gives."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache, GenerationConfig, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from shadowc.config import Policy
from shadowc.errors import LengthError, OptionError
from shadowc.runtime.config import artifact_config
from shadowc.runtime.model import ShadowcForCausalLM, padding
from shadowc.runtime.serve import _fit

TEXTS = ["It was", "The captain looked at her and", "She", "When the morning came, they all"]


@pytest.fixture(params=["opt", "llama"])
def pair(request):
    """(compiled at sparsity 0, original, tokenizer)."""
    tiny = request.getfixturevalue(f"tiny_{request.param}")
    loaded = tiny.loaded
    config = GenerationConfig(bos_token_id=2, eos_token_id=2, pad_token_id=1)
    loaded.model.generation_config = config
    session = tiny.session(Policy(0.0, 0.0))
    own = artifact_config(loaded.model.config, "cpu", 64)
    model = ShadowcForCausalLM(own, config, session, {}, loaded.tokenizer)
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


def test_a_cache_goes_on_with_the_padding_that_it_began_with(pair):
    """Zeros that stand in the middle would be read as tokens."""
    model, _, tokenizer = pair
    inputs = encode(tokenizer, TEXTS[:2])
    more = torch.ones(2, 3, dtype=torch.int64)
    for mask in (more, more.clone().index_fill_(1, torch.tensor([0]), 0)):
        cache = model(**inputs, use_cache=True).past_key_values
        mask = torch.cat((inputs["attention_mask"], mask), 1)
        if mask[:, -3:].all():
            model(more + 4, attention_mask=mask, past_key_values=cache)
        else:
            with pytest.raises(OptionError, match="padding"):
                model(more + 4, attention_mask=mask, past_key_values=cache)
    cache = model(**inputs, use_cache=True).past_key_values
    with pytest.raises(OptionError, match="other padding than the cache began with"):
        model(more + 4, attention_mask=torch.ones_like(mask), past_key_values=cache)


def test_too_long_is_refused_before_anything_runs(pair):
    ours, _, tokenizer = pair
    inputs = encode(tokenizer, TEXTS[:1])
    ours.session.step = lambda *a, **k: pytest.fail("a program ran")
    with pytest.raises(LengthError, match="at most 64 tokens"):
        ours.generate(**inputs, max_new_tokens=64)


def test_requests_to_the_server_fit_or_are_refused(pair):
    model = pair[0]

    def new_tokens(prompt, **options):
        config = GenerationConfig(**options)
        _fit(model, {"input_ids": torch.zeros(1, prompt)}, config)
        return config.max_new_tokens

    assert new_tokens(60) == new_tokens(60, max_new_tokens=1024) == 4, "what fits, if none is named"
    assert new_tokens(60, max_new_tokens=3) == 3
    for prompt, new in ((0, 3), (60, 5), (70, None)):
        with pytest.raises(LengthError):
            new_tokens(prompt, max_new_tokens=new)


def test_the_bare_step_refuses_too_much(pair):
    session = pair[0].session
    with pytest.raises(LengthError, match="does not fit in the cache"):
        session.step(torch.zeros(1, 9, dtype=torch.int64), session.new_cache(1, 8))


def test_padding_on_the_right_is_refused():
    assert padding(torch.tensor([[0, 1, 1], [1, 1, 1]])).tolist() == [1, 0]
    with pytest.raises(OptionError, match="not on the left"):
        padding(torch.tensor([[1, 1, 0]]))


def test_scoring_returns_all_logits_and_the_loss(pair):
    """What `model(ids)` gives, and harnesses and perplexity scripts ask for."""
    ours, theirs, tokenizer = pair
    batch = tokenizer(TEXTS, return_tensors="pt", padding=True, padding_side="right")
    labels = batch.input_ids.masked_fill(batch.attention_mask == 0, -100)
    found, wanted = (model(**batch, labels=labels) for model in (ours, theirs))
    real = batch.attention_mask.bool()
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(found.logits[real], wanted.logits[real], **close)
    torch.testing.assert_close(found.loss, wanted.loss, **close)
    assert found.past_key_values is None
    with pytest.raises(OptionError, match="not on the left"):
        ours(**encode(tokenizer, TEXTS))
    with pytest.raises(LengthError, match="at most 64 tokens"):
        ours(torch.zeros(1, 65, dtype=torch.int64))


def test_a_loop_of_ones_own(pair):
    ours, theirs, tokenizer = pair
    ids = encode(tokenizer, TEXTS[1:2]).input_ids
    out, tokens = ours(ids, use_cache=True), []
    for _ in range(6):
        tokens.append(out.logits[:, -1:].argmax(-1))
        out = ours(tokens[-1], past_key_values=out.past_key_values)
    wanted = theirs.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(torch.cat(tokens, 1), wanted[:, ids.shape[1] :])


def test_stopping_criteria_and_stop_strings(pair):
    class After(StoppingCriteria):
        def __call__(self, ids, scores, **_):
            return torch.full((len(ids),), ids.shape[1] >= 9)

    assert same(pair, TEXTS[:1], do_sample=False, stopping_criteria=[After()]).shape[1] == 9
    ours, _, tokenizer = pair
    inputs = encode(tokenizer, TEXTS[:1])
    full = ours.generate(**inputs, max_new_tokens=16, do_sample=False)
    stop = tokenizer.decode(full[0, inputs.input_ids.shape[1] + 3])
    found = same(pair, TEXTS[:1], do_sample=False, stop_strings=[stop], tokenizer=tokenizer)
    assert found.shape[1] < full.shape[1]


@pytest.mark.parametrize("kind", ["static", "dynamic"])
def test_either_kind_of_cache_that_is_asked_for_is_ours(pair, kind):
    same(pair, TEXTS, do_sample=False, cache_implementation=kind)


def test_scores_are_returned(pair):
    ours, theirs, tokenizer = pair
    inputs = encode(tokenizer, TEXTS)
    options = {"max_new_tokens": 4, "do_sample": False, "output_scores": True}
    found, wanted = (
        model.generate(**inputs, **options, return_dict_in_generate=True)
        for model in (ours, theirs)
    )
    assert torch.equal(found.sequences, wanted.sequences)
    for ours_, theirs_ in zip(found.scores, wanted.scores, strict=True):
        torch.testing.assert_close(ours_, theirs_, atol=1e-4, rtol=1e-4)


def test_an_artifact_drafts_for_a_dense_model(tiny):
    """Assisted generation with an assistant that skips half: the words of the dense model."""
    config = GenerationConfig(bos_token_id=2, eos_token_id=2, pad_token_id=1)
    dense, tokenizer = tiny.loaded.model, tiny.loaded.tokenizer
    dense.generation_config = config
    session = tiny.session(Policy(0.4, 0.5, min_neurons=2))
    draft = ShadowcForCausalLM(artifact_config(dense.config, "cpu", 64), config, session, {})
    draft.generation_config.assistant_confidence_threshold = 0.0
    ids = encode(tokenizer, TEXTS[1:2]).input_ids
    options = {"max_new_tokens": 16, "do_sample": False}
    found = dense.generate(ids, **options, assistant_model=draft)
    assert torch.equal(found, dense.generate(ids, **options))
    assert draft.counters()["tokens"] > 0


@pytest.mark.parametrize("options, message", [
    ({"prompt_lookup_num_tokens": 3}, "cannot verify"),
    ({"use_cache": False}, "own static cache"),
    ({"cache_implementation": "quantized"}, "own static cache"),
    ({"past_key_values": DynamicCache()}, "a cache of its own"),
    ({"output_attentions": True, "return_dict_in_generate": True}, "returns logits"),
    ({"output_hidden_states": True, "return_dict_in_generate": True}, "returns logits"),
])  # fmt: skip
def test_what_does_not_work_is_refused(pair, options, message):
    ours, _, tokenizer = pair
    inputs = encode(tokenizer, TEXTS[:1])
    with pytest.raises(ValueError, match=message):
        ours.generate(**inputs, max_new_tokens=4, do_sample=False, **options)


def test_an_assistant_is_refused(pair):
    ours, theirs, tokenizer = pair
    with pytest.raises(OptionError, match="cannot verify"):
        ours.generate(**encode(tokenizer, TEXTS[:1]), max_new_tokens=4, assistant_model=theirs)
    with pytest.raises(OptionError, match="takes token ids"):
        ours(inputs_embeds=torch.zeros(1, 2, 64))


def test_it_stays_where_it_is(pair):
    ours = pair[0]
    assert ours.to("cpu") is ours and ours.to(torch.float32) is ours
    with pytest.raises(OptionError, match="was compiled for|compiled for"):
        ours.to("cuda")
    with pytest.raises(OptionError, match="compiled for"):
        ours.to(torch.float16)
    with pytest.raises(OptionError, match="copy the artifact"):
        ours.save_pretrained("anywhere")


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
