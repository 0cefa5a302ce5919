"""Baselines run what they say: the same budget on the same weights, chosen in another way."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shadowc.compiler import build_programs
from shadowc.config import Policy
from shadowc.errors import OptionError
from shadowc.evaluation.baselines import (
    dejavu_counts,
    dejavu_kept,
    dejavu_session,
    static_session,
    with_given_keep,
)
from shadowc.evaluation.masks import teacher_forced, with_given_masks
from shadowc.passes.manager import copy_module
from shadowc.runtime.session import Session
from shadowc.runtime.usage import Usage
from shadowc.targets import load_target

HALF = Policy(0.5, 0.5, min_neurons=2)
TARGETS = ["cpu", "h100"]


def made(tiny, policy=HALF, target="cpu", predictor="shadow") -> Session:
    """A session of a target's programs, in fp32; on the CPU those of a GPU run the references."""
    calibration = tiny.calibration
    if predictor == "static":
        calibration = dataclasses.replace(calibration, predictor="static", weights={})
    key = ("baselines", policy, target, predictor)
    if key not in tiny.built:
        tiny.built[key] = build_programs(
            copy_module(tiny.traced), tiny.loaded, calibration, policy, load_target(target),
            torch.float32,
        )  # fmt: skip
    built = tiny.built[key]
    return Session(
        tiny.shape, policy, built.programs, built.packed, built.keep, 64, built.predictor_bytes
    )


def decode(session, ids, program, prompt=4):
    """Logits of the steps after a prompt, and what ran."""
    cache, usage = session.new_cache(len(ids)), Usage.of(session)
    session.step(ids[:, :prompt], cache, program="dense")
    logits = []
    for token in range(prompt, ids.shape[1]):
        results = session.step(ids[:, token : token + 1], cache, program=program)
        usage.add(results)
        logits.append(results["logits"])
    return torch.cat(logits, 1), usage


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("refresh", [1, 3])
def test_static_is_what_compiling_with_mean_scores_gives(tiny, target, refresh):
    policy = dataclasses.replace(HALF, refresh=refresh)
    session, ids = made(tiny, policy, target), tiny.ids(2, 10)
    own = made(tiny, HALF, target, predictor="static")
    got, usage = decode(static_session(session), ids, "hold")
    want, plain = decode(own, ids, "hold")
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    assert usage.to_json() == plain.to_json() and usage.predictor_bytes == 0
    assert usage.neuron_sparsity == pytest.approx(0.5, abs=0.01)
    sparse, _ = decode(session, ids, "decode")
    assert not torch.allclose(got, sparse, atol=1e-3)
    assert not session.static_keep  # the artifact is as it was


@pytest.mark.parametrize("target", TARGETS)
def test_a_decode_program_with_given_keep_sets_is_hold(tiny, target):
    session = made(tiny, dataclasses.replace(HALF, refresh=3), target)
    program = with_given_keep(session.programs["decode"])
    assert program.inputs == session.programs["hold"].inputs
    ids, found = tiny.ids(2, 6), []
    for hold in (session.programs["hold"], program):
        other = session.with_program("hold", hold)
        cache = other.new_cache(2)
        other.step(ids[:, :4], cache)
        other.step(ids[:, 4:5], cache, program="decode")
        found.append(other.step(ids[:, 5:], cache, program="hold")["logits"])
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def with_weights(session, scale):
    """DejaVu's session with weights, all zero or random."""
    other, new = dejavu_session(session)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: scale * torch.randn(value.shape, generator=generator) for name, value in new.items()
    }
    other.tensors = {**other.tensors, **weights}
    return other, weights


@pytest.mark.parametrize("target", TARGETS)
def test_dejavu_chooses_in_every_layer(tiny, target):
    """All scores the same: each layer keeps its first units, and is masked like that."""
    session, shape, ids = made(tiny, target=target), tiny.shape, tiny.ids(2, 9)
    other, new = with_weights(session, 0.0)
    got, _ = decode(other, ids, "decode")
    heads, neurons = dejavu_kept(shape, HALF)
    assert (heads, neurons) == (1, shape.ffn // 2)  # of 3 layers' heads, the first's always run
    masks = [torch.ones(2, 9, shape.layers, n, dtype=torch.bool) for n in (shape.heads, shape.ffn)]
    masks[0][:, 4:, 1:, heads:] = False
    masks[1][:, 4:, :, neurons:] = False
    given = session.with_program("given_masks", with_given_masks(session.programs["masked"]))
    want = teacher_forced(given, ids, prompt=4, masks=tuple(masks))["logits"][:, 4:]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    sizes = (shape.layers - 1) * (1000 * (shape.hidden + shape.heads))
    sizes += shape.layers * (512 * (shape.hidden + shape.ffn))
    assert other.predictor_bytes == 4 * sizes == sum(value.nbytes for value in new.values())
    usage = Usage.of(other)
    usage.add({"logits": got[:, :1], **dejavu_counts(other, 2)})
    assert usage.neuron_sparsity == 0.5 and usage.predictor_bytes == 4 * sizes
    assert usage.head_sparsity == pytest.approx(2 * 3 / 12)


def test_dejavu_reads_the_residual_stream_where_it_stands(tiny):
    """Both lowerings know it under another name; with random weights they choose the same."""
    ids = tiny.ids(2, 9)
    found = [decode(with_weights(made(tiny, target=t), 1.0)[0], ids, "decode")[0] for t in TARGETS]
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    first, _ = decode(with_weights(made(tiny), 0.0)[0], ids, "decode")
    assert not torch.allclose(found[0], first, atol=1e-3)


def test_dejavu_skips_only_what_the_budget_skips(tiny_opt):
    policy = Policy(0.0, 0.5, min_neurons=2)
    other, new = dejavu_session(made(tiny_opt, policy))
    assert len(new) == 2 * tiny_opt.shape.layers
    assert set(dejavu_counts(other, 1)) == {"neuron_count"}


@pytest.mark.parametrize("make", [static_session, dejavu_session])
def test_what_predicts_nothing_is_refused(tiny_opt, make):
    with pytest.raises(OptionError, match="skips no units"):
        make(tiny_opt.session(Policy(0.0, 0.0)))
    with pytest.raises(OptionError, match="itself runs the keep sets of the mean scores"):
        make(made(tiny_opt, predictor="static"))
