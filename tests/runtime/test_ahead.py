"""The loop that launches the next step early gives what transformers' own loop gives."""

import pytest
import torch
from transformers import GenerationConfig
from transformers.generation.streamers import BaseStreamer

from shadowc.config import Policy
from shadowc.runtime.model import ShadowcForCausalLM

POLICY = Policy(0.5, 0.5, min_neurons=2)


class Streamer(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens.append(value.tolist())

    def end(self):
        self.ended = True


def both(tiny, monkeypatch, ids, **options):
    """What `generate` gives with either loop, and what the streamers saw."""
    results = []
    for ahead in (False, True):
        session = tiny.session(POLICY)
        monkeypatch.setattr(session, "runs_ahead", ahead, raising=False)
        config = GenerationConfig(pad_token_id=1, eos_token_id=2)
        model = ShadowcForCausalLM(tiny.loaded.model.config, config, session, {}, None)
        streamer = Streamer() if len(ids) == 1 else None
        torch.manual_seed(0)
        found = model.generate(input_ids=ids, streamer=streamer, **options)
        results.append((found, streamer.tokens if streamer else None))
    return results


@pytest.mark.parametrize("options", [
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.8, "top_k": 20},
    {"do_sample": False, "repetition_penalty": 1.3},
])  # fmt: skip
def test_same_tokens(tiny, monkeypatch, options):
    ids = tiny.ids(batch=1)
    (own, seen), (ahead, seen_ahead) = both(tiny, monkeypatch, ids, max_new_tokens=12, **options)
    assert torch.equal(own, ahead) and ahead.shape == (1, 24)
    assert seen[1:] == seen_ahead[1:]  # the prompt first, then token after token


def test_rows_stop_at_their_own_end(tiny, monkeypatch):
    ids = tiny.ids(batch=3)
    (free, _), _ = both(tiny, monkeypatch, ids, max_new_tokens=12, do_sample=False)
    ends = [int(free[0, 15]), int(free[1, 13])]  # tokens that come on the way
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": ends}
    (own, _), (ahead, _) = both(tiny, monkeypatch, ids, **options)
    assert torch.equal(own, ahead)
    assert not torch.equal(own, free[:, : own.shape[1]])


def test_a_stop_takes_the_step_back(tiny, monkeypatch):
    session = tiny.session(POLICY)
    monkeypatch.setattr(session, "runs_ahead", True, raising=False)
    config = GenerationConfig(pad_token_id=1, eos_token_id=None)
    model = ShadowcForCausalLM(tiny.loaded.model.config, config, session, {}, None)
    ids = tiny.ids(batch=1)
    free = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)
    stop = int(free[0, 14])
    first = int((free[0, 12:] == stop).nonzero()[0]) + 13
    cache = session.new_cache(1, 40)
    stopped = model.generate(
        input_ids=ids, max_new_tokens=12, do_sample=False, eos_token_id=stop, past_key_values=cache
    )
    assert stopped.shape[1] == first
    assert cache.length == first - 1  # the last token was not fed
    onward = model.generate(
        input_ids=stopped, max_new_tokens=24 - first, do_sample=False, past_key_values=cache
    )
    assert torch.equal(onward, free)
