"""One process, many requests of all kinds, and many threads: nothing grows and nothing changes.

`make soak` sets SOAK_GENERATIONS to 1,000.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import json
import os
import random
import resource
import threading
from pathlib import Path

import pytest
import torch

import shadowc
from shadowc.errors import LengthError, ShadowcError

GENERATIONS = int(os.environ.get("SOAK_GENERATIONS", "60"))
BOUND = 4 << 20
"""Bytes that a process may grow by once a tenth of the generations has run."""
LIMIT = 32  # tokens that the artifact is compiled for
VOCAB = 8192
SAMPLINGS = (
    {"do_sample": False},
    {"do_sample": True, "temperature": 0.7},
    {"do_sample": True, "top_k": 20},
    {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.1},
    {"do_sample": False, "num_beams": 2},
    {"do_sample": True, "num_return_sequences": 2},
)
LENGTHS = (0, 1, 2, 7, LIMIT - 6, LIMIT - 1, LIMIT, LIMIT + 9)


@pytest.fixture(scope="module")
def model(made):
    return shadowc.load(made / "one")


def memory():
    """Bytes of memory of this process that are its own, and nothing that could be given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pages = Path("/proc/self/statm").read_text().split()
    return (int(pages[1]) - int(pages[2])) * resource.getpagesize()


def probe(model):
    """Tokens and logits that must never change."""
    ids = torch.randint(5, VOCAB, (2, 9), generator=torch.Generator().manual_seed(1))
    greedy = model.generate(ids, max_new_tokens=8, do_sample=False)
    torch.manual_seed(3)
    sampled = model.generate(ids, max_new_tokens=8, do_sample=True, temperature=0.9)
    return greedy, sampled, model(ids, use_cache=True).logits, model(ids, use_cache=False).logits


def request(draw, length):
    """A batch of prompts, padded on the left."""
    rows = draw.choice((1, 1, 2, 3))
    ids = torch.tensor([[draw.randrange(5, VOCAB) for _ in range(length)] for _ in range(rows)],
                       dtype=torch.int64).view(rows, length)  # fmt: skip
    mask = torch.ones_like(ids)
    for row in range(1, rows):
        mask[row, : draw.randrange(max(1, length))] = 0
    return ids, mask


def test_a_short_soak(model, capsys):
    draw, found = random.Random(0), {"generations": 0, "refused": 0, "tokens": 0}
    first = probe(model)
    warm = None
    for number in itertools.count():
        if found["generations"] == GENERATIONS:
            break
        length, new = draw.choice(LENGTHS), draw.choice((1, 3, 6))
        ids, mask = request(draw, length)
        options = {**draw.choice(SAMPLINGS), "max_new_tokens": new}
        torch.manual_seed(number)
        if length == 0 or length + new > LIMIT:
            with pytest.raises(LengthError):
                model.generate(input_ids=ids, attention_mask=mask, **options)
            found["refused"] += 1
        else:
            out = model.generate(input_ids=ids, attention_mask=mask, **options)
            assert out.shape[0] == len(ids) * options.get("num_return_sequences", 1)
            assert torch.equal(out[:: len(out) // len(ids), :length], ids)
            assert length < out.shape[1] <= length + new
            found["generations"] += 1
            found["tokens"] += out.numel() - len(out) * length
        if warm is None and found["generations"] > max(GENERATIONS // 10, 20):
            warm = memory()
    assert all(map(torch.equal, first, probe(model)))
    found["growth_bytes"] = memory() - warm
    with capsys.disabled():
        print(f"\n{json.dumps(found)}")
    assert found["refused"] > GENERATIONS // 5
    assert found["growth_bytes"] < BOUND


def test_eight_threads_call_one_model(model):
    """Each gets what it would get alone: steps wait for each other."""
    draw = random.Random(1)
    prompts = [request(draw, length) for length in (1, 3, 5, 7, 9, 11, 13, 15)]

    def ask(ids, mask, number):
        beams = 1 + number % 2
        return model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=5, do_sample=False, num_beams=beams
        )

    expected = [ask(*prompt, number) for number, prompt in enumerate(prompts)]
    before = model.counters()
    start, wrong = threading.Barrier(len(prompts)), []

    def many(number):
        start.wait()
        for _ in range(5):
            try:
                if not torch.equal(ask(*prompts[number], number), expected[number]):
                    wrong.append((number, "other tokens"))
            except Exception as error:
                wrong.append((number, error))

    threads = [threading.Thread(target=many, args=(number,)) for number in range(len(prompts))]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert wrong == []
    after = model.counters()
    assert after["requests"] - before["requests"] == 5 * len(prompts)


def test_a_step_waits_for_the_one_before(made):
    """Two threads with one session, step by step: the native kernels are given one at a time."""
    session = shadowc.load(made / "one").session
    inside, most, step = [], [], session._step

    def watched(*arguments):
        inside.append(threading.get_ident())
        most.append(len(inside))
        try:
            return step(*arguments)
        finally:
            inside.pop()

    session._step = watched
    ids = torch.arange(5, 11)[None]

    def decode():
        cache = session.new_cache(1)
        for token in range(6):
            session.step(ids[:, token : token + 1], cache)

    threads = [threading.Thread(target=decode) for _ in range(4)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    assert len(most) == 24 and max(most) == 1


def test_refusals_are_ours(model):
    ids = torch.arange(5, 5 + LIMIT)[None]
    with pytest.raises(ShadowcError):
        model.generate(ids, max_new_tokens=1)
    with pytest.raises(ValueError):  # servers know how to answer one
        model.generate(ids[:, :0], max_new_tokens=1)
    assert model.generate(ids[:, :-1], max_new_tokens=1).shape == (1, LIMIT)
