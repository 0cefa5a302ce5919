"""Counters count what `Usage` counts, and probes come when they are due."""

from __future__ import annotations

import logging

import pytest
import torch
from transformers import GenerationConfig

from shadowc.config import Policy
from shadowc.errors import OptionError
from shadowc.runtime import watch as watch_module
from shadowc.runtime.model import ShadowcForCausalLM
from shadowc.runtime.usage import Usage
from shadowc.runtime.watch import Counters, Watch


@pytest.mark.parametrize("refresh", [1, 3, 0])
@pytest.mark.parametrize("collapse", [2, 512])
def test_counters_are_what_ran(tiny, refresh, collapse, monkeypatch):
    monkeypatch.setattr(watch_module, "_COLLAPSE", collapse)
    session = tiny.session(Policy(0.4, 0.5, min_neurons=2, refresh=refresh))
    usage, ids, cache = Usage.of(session), tiny.ids(3, 9), session.new_cache(3)
    session.step(ids[:, :4], cache)
    for token in range(4, 9):
        session.step(ids[:, token : token + 1], cache)
        usage.add({"logits": torch.zeros(3, 1, 1), **cache.keep})
    found = session.counters.read()
    assert found["prompt_tokens"] == 12 and found["tokens"] == 15 == usage.tokens
    assert found["heads"] == usage.heads.sum() < found["heads_dense"]
    assert found["neurons"] == usage.neurons.sum() < found["neurons_dense"]
    assert found["heads_dense"] == 15 * tiny.shape.layers * tiny.shape.heads


def test_a_program_that_was_asked_for_counts_as_what_it_is(tiny):
    session = tiny.session(Policy(0.4, 0.5, min_neurons=2))
    ids, cache = tiny.ids(1, 6), session.new_cache(1)
    session.step(ids[:, :4], cache)
    session.step(ids[:, 4:5], cache)
    sparse = session.counters.read()["neurons"]
    session.step(ids[:, 5:], cache, program="dense")
    whole = tiny.shape.layers * tiny.shape.ffn
    assert 0 < sparse < whole and session.counters.read()["neurons"] == sparse + whole


def test_masks_of_other_runtimes_count_too(tiny_opt):
    counters = Counters(tiny_opt.shape)
    mask = torch.zeros(2, 1, 4, dtype=torch.bool)
    mask[:, :, 0] = True
    counters.decoded(1, {"head_keep": mask})
    assert counters.read()["heads"] == 4 + 2  # layer 0's, and one in each other


def model(tiny, every, alarm=None):
    config = GenerationConfig(bos_token_id=2, eos_token_id=None, pad_token_id=1)
    session = tiny.session(Policy(0.4, 0.5, min_neurons=2))
    watch = Watch(every, alarm)
    return ShadowcForCausalLM(tiny.loaded.model.config, config, session, {}, None, watch)


def test_every_nth_request_is_probed_and_an_alarm_rings(tiny_opt, caplog):
    ours = model(tiny_opt, 2, alarm=1.0)
    with caplog.at_level(logging.INFO, "shadowc"):
        for _ in range(5):
            ours.generate(tiny_opt.ids(1, 4), max_new_tokens=6, do_sample=False)
    assert [r.message.split(":")[0] for r in caplog.records if r.levelname == "INFO"] == [
        "probe of request 2, 6 tokens", "probe of request 4, 6 tokens"
    ] or len(ours.watch.probes) == 2  # fmt: skip
    assert sum(r.levelname == "WARNING" and "below 1.00" in r.message for r in caplog.records) == 2
    found = ours.counters()
    assert found["requests"] == 5 and 0 < found["probe_recall"] < 1
    assert 0 <= found["probe_agreement"] <= 1


def test_a_probe_does_not_see_padding(tiny_opt):
    """A padded row's probe is that of the row alone."""
    ids = tiny_opt.ids(1, 5)
    padded = torch.cat((torch.full((1, 3), 1), ids), 1)
    mask = (torch.arange(8) >= 3).long()[None]
    alone, together = model(tiny_opt, 1), model(tiny_opt, 1)
    options = {"max_new_tokens": 8, "do_sample": False}
    alone.generate(ids, attention_mask=torch.ones_like(ids), **options)
    together.generate(padded, attention_mask=mask, **options)
    assert list(alone.watch.probes) == list(together.watch.probes) != []


def test_a_probe_does_not_see_what_follows_the_end(tiny_opt):
    """A row that ended while another one went on is probed as far as it goes."""
    ours, ids = model(tiny_opt, 1), tiny_opt.ids(2, 5)
    answers = ours.generate(ids, max_new_tokens=20, do_sample=False)[:, 5:].tolist()
    ends = next(i for i in range(3, 19) if answers[0].index(answers[0][i]) == i
                and answers[0][i] not in answers[1][: i + 4])  # fmt: skip
    ours.generation_config.eos_token_id = answers[0][ends]
    ours.generate(ids, max_new_tokens=20, do_sample=False)
    assert ours.watch.probes[-1]["tokens"] == ends == ours.watch.probes[0]["tokens"] - 19 + ends


def test_a_draft_is_no_request(tiny_opt):
    ours = model(tiny_opt, 1)
    config = GenerationConfig(max_new_tokens=4, do_sample=False)
    config.is_assistant, config.assistant_confidence_threshold = True, 0
    ours.generate(tiny_opt.ids(1, 4), generation_config=config)
    assert ours.counters()["requests"] == 0 and not ours.watch.probes


def test_an_answer_that_cannot_be_probed_is_returned(tiny_opt, monkeypatch, caplog):
    def fail(*arguments):
        raise RuntimeError("out of memory")

    monkeypatch.setattr("shadowc.evaluation.probe.probe", fail)
    ours = model(tiny_opt, 1)
    with caplog.at_level(logging.WARNING, "shadowc"):
        found = ours.generate(tiny_opt.ids(1, 4), max_new_tokens=3, do_sample=False)
    assert found.shape == (1, 7) and "request 1 could not be probed" in caplog.text


@pytest.mark.parametrize("name, value", [("SHADOWC_PROBE_EVERY", "-1"),
                                         ("SHADOWC_PROBE_ALARM", "much")])  # fmt: skip
def test_settings_of_the_environment(name, value, monkeypatch):
    monkeypatch.setenv("SHADOWC_PROBE_EVERY", "7")
    assert Watch().every == 7 and Watch(0).every == 0
    monkeypatch.setenv(name, value)
    with pytest.raises(OptionError, match=f"{name} is out of range"):
        Watch()
