"""The graph that vLLM runs against the session: mixed tokens of several requests in one batch.

vLLM is not needed here: torch's attention over each request's tokens stands in for its paged one.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shadowc.config import Policy
from shadowc.native import CPU_LAUNCHERS
from shadowc.vllm.body import make_body
from shadowc.vllm.cut import CAP, Cut, products

TOPK = Policy(0.5, 0.5, min_neurons=2)
THRESHOLD = Policy(0.5, 0.5, min_neurons=2, selection="threshold")


def logits_of_session(session, ids, prompt):
    """Logits of the last prompt token, and of each that is decoded after it."""
    cache = session.new_cache(1)
    found = [session.step(ids[None, :prompt], cache)["logits"][0]]
    found += [session.step(token.view(1, 1), cache)["logits"][0] for token in ids[prompt:]]
    return torch.cat(found)


class Served:
    """A session's program as vLLM runs it: whole requests, prompt and answer, in one batch."""

    def __init__(self, session, program):
        self.session, self.lengths = session, []
        self.cut = Cut(1 - session.policy.neuron_sparsity)
        self.body = make_body(
            session.program(program),
            session.tensors,
            self.cut,
            self.attend,
            session.shape.head_dim,
        )

    def attend(self, layer, query, key, value):
        parts = zip(*(x.split(self.lengths) for x in (query, key, value)), strict=True)
        return torch.cat([self.attention(layer, *part) for part in parts]).flatten(1)

    def attention(self, layer, *tensors):
        query, key, value = (x.transpose(0, 1)[None] for x in tensors)
        scale = self.body.scales[layer]
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, scale=scale, enable_gqa=True
        )
        return context[0].transpose(0, 1)

    def run(self, requests, prompts):
        """Logits of every token of each request, and the keep sets."""
        self.lengths = [len(ids) for ids in requests]
        positions = [torch.arange(length) for length in self.lengths]
        pairs = zip(positions, prompts, strict=True)
        decoded = torch.cat([position >= prompt for position, prompt in pairs])
        self.cut.begin(decoded)
        given = {
            "input_ids": torch.cat(requests)[:, None],
            "position_ids": torch.cat(positions)[:, None],
        } | {
            name: sets.expand(-1, int(decoded.sum()), *sets.shape[2:]).contiguous()
            for name, sets in self.session.static_keep.items()
        }
        with torch.inference_mode():
            hidden, *kept = self.body.run(*(given[name] for name in self.body.inputs))
            head = self.session.tensors[self.body.head]
            logits = CPU_LAUNCHERS["linear"](hidden[:, 0].contiguous(), head, None)
        return logits.split(self.lengths), dict(zip(self.body.kept, kept, strict=True))


@pytest.mark.parametrize("policy", [TOPK, THRESHOLD], ids=["topk", "threshold"])
@pytest.mark.parametrize("break_even", [64, 1], ids=["native", "products"])
def test_mixed_batch_is_the_session(tiny, policy, break_even):
    session = tiny.session(policy)
    served = Served(session, "decode")
    served.cut.break_even = break_even
    requests = [tiny.ids(1, n, seed=n)[0] for n in (14, 9, 20)]
    prompts = (5, 9, 12)  # the second one has decoded nothing
    found, kept = served.run(requests, prompts)
    assert kept["neuron_count"].shape == (3, 9 + 8)  # of decoded tokens only
    for ids, prompt, logits in zip(requests, prompts, found, strict=True):
        expected = logits_of_session(session, ids, prompt)
        # Sums of other orders; the logits are around 10.
        torch.testing.assert_close(logits[prompt - 1 :], expected, atol=2e-3, rtol=0)
    dense, _ = Served(session, "dense").run(requests, (64, 64, 64))
    assert (dense[0] - found[0])[5:].abs().max() > 0.1  # units were skipped


def test_a_token_does_not_see_its_batch(tiny_opt):
    session = tiny_opt.session(TOPK)
    served = Served(session, "decode")
    requests = [tiny_opt.ids(1, 12, seed=seed)[0] for seed in range(4)]
    together, _ = served.run(requests, (6,) * 4)
    for ids, logits in zip(requests, together, strict=True):
        alone, _ = served.run([ids], (6,))
        torch.testing.assert_close(alone[0], logits, atol=1e-3, rtol=0)


@pytest.mark.parametrize("program", ["exact", "hold"])
def test_programs_without_a_predictor(tiny_opt, program):
    policy, calibration = Policy(0.0, 0.0), None
    if program == "hold":
        policy = TOPK
        calibration = replace(tiny_opt.calibration, predictor="static", weights={})
    session = tiny_opt.session(policy, calibration=calibration)
    ids = tiny_opt.ids(1, 12)[0]
    found, _ = Served(session, program).run([ids], (6,))
    expected = logits_of_session(session, ids, 6)
    torch.testing.assert_close(found[0][5:], expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.9])
def test_products_are_the_native_op(gated, share):
    generator = torch.Generator().manual_seed(0)
    width, neurons, tokens = 48, 700, 13
    x, residual = (torch.randn(tokens, 1, width, generator=generator) for _ in range(2))
    w1, up, w2t = (torch.randn(neurons, width, generator=generator).bfloat16() for _ in range(3))
    b1, b2 = (torch.randn(n, generator=generator) for n in (neurons, width))
    common = torch.rand(neurons, generator=generator) < share
    mask = common & (torch.rand(tokens, neurons, generator=generator) < 0.5)
    mask[3] = False  # a token may keep nothing
    assert (mask.any(0).float().mean() > CAP) == (share > CAP)  # both ways are run
    count = mask.sum(1, dtype=torch.int32)
    index = torch.zeros(tokens, neurons, dtype=torch.int32)
    for row, kept in zip(index, mask, strict=True):
        row[: int(kept.sum())] = kept.nonzero()[:, 0]
    if gated:
        given = (x, w1, up, None, w2t, None, residual, "silu")
        native = CPU_LAUNCHERS["sparse_gated_mlp"](
            x, w1, up, w2t, residual, "silu", False, index, count
        )
    else:
        given = (x, w1, None, b1, w2t, b2, residual, "relu")
        native = CPU_LAUNCHERS["sparse_mlp"](
            x, w1, b1, w2t, b2, residual, "relu", False, index, count
        )
    found, rows = products(*given, index, count)
    assert torch.equal(rows, native[1])
    scale = native[0].abs().max()
    assert (found - native[0]).abs().max() < 1e-5 * scale
