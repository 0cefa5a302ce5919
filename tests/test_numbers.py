"""Numbers that are not finite are found where they arise, and the layer is named."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch
from transformers import GenerationConfig

from shadowc.calibration.data import Example
from shadowc.calibration.fit import FitOptions, calibrate
from shadowc.compiler import compile_model
from shadowc.config import Policy
from shadowc.errors import CalibrationError, LengthError, NumericsError
from shadowc.runtime.model import ShadowcForCausalLM
from shadowc.stored import Stored, all_finite, save_file

POLICY = Policy(0.4, 0.5, min_neurons=2)
INFINITY, NAN = float("inf"), float("nan")


def with_weight(loaded, name, value, *, everywhere=False):
    """The same model with another number in one weight."""
    model = copy.deepcopy(loaded.model)
    weight = model.get_parameter(name).detach()
    if everywhere:
        weight.fill_(value)
    else:
        weight.view(-1)[3] = value
    return replace(loaded, model=model)


def name_of(tiny, layer):
    """A matrix of that layer's MLP."""
    names = (name for name, _ in tiny.loaded.model.named_parameters())
    return next(n for n in names if f"layers.{layer}.fc2.w" in n or f"layers.{layer}.mlp.down" in n)


def fit(loaded, rows):
    examples = [Example(row, [True] * len(row)) for row in rows.tolist()]
    return calibrate(loaded, examples, FitOptions(("sens",), rank=4, random_features=0))


@pytest.mark.parametrize("which, value, word", [("opt", NAN, "NaN"), ("llama", INFINITY, "inf")])
def test_weights_are_looked_at_before_they_are_used(request, tmp_path, which, value, word):
    tiny = request.getfixturevalue(f"tiny_{which}")
    name = name_of(tiny, 1)
    broken = with_weight(tiny.loaded, name, value)
    with pytest.raises(CalibrationError, match=f"weights of {name} are not finite") as raised:
        fit(broken, tiny.ids(2, 8))
    assert word in str(raised.value)
    with pytest.raises(NumericsError, match=r"weights of .*layers\.1\..* are not finite") as raised:
        compile_model(broken, tiny.calibration, POLICY, tmp_path / "a", max_seq_len=32)
    assert word in str(raised.value) and not list(tmp_path.iterdir())


def test_a_weight_that_no_token_reads_is_looked_at_too(tiny_opt):
    broken = with_weight(tiny_opt.loaded, "model.decoder.embed_tokens.weight", NAN)
    with pytest.raises(CalibrationError, match="embed_tokens"):
        fit(broken, tiny_opt.ids(2, 8) + 1)


def test_activations_that_overflow_are_named(tiny_opt, tmp_path):
    huge = with_weight(tiny_opt.loaded, name_of(tiny_opt, 1), 3e38, everywhere=True)
    with pytest.raises(CalibrationError, match="activations of layer 1 overflow"):
        fit(huge, tiny_opt.ids(2, 8))
    with pytest.raises(NumericsError, match=r"activations of .*layers\.1\..* are not finite"):
        compile_model(
            huge, tiny_opt.calibration, POLICY, tmp_path / "a", max_seq_len=32, dtype=torch.float32
        )
    assert not list(tmp_path.iterdir())


def test_weights_that_do_not_fit_in_half_precision(tmp_path):
    large = Stored(torch.tensor([[1.0, -1e5]]), torch.float16, turned=True)
    with pytest.raises(NumericsError, match="weights of one do not fit in torch.float16") as raised:
        save_file(tmp_path / "a.safetensors", {"one": large}, finite=True)
    assert "65504" in str(raised.value) and "--dtype bf16" in str(raised.value)


def test_what_may_be_infinite_is_written(tmp_path):
    bounds = {"keep": Stored.of(torch.tensor([0.0, INFINITY])), "none": Stored.of(torch.empty(0))}
    save_file(tmp_path / "a.safetensors", bounds)
    with pytest.raises(NumericsError, match="keep"):
        save_file(tmp_path / "b.safetensors", bounds, finite=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_all_finite(dtype, value):
    tensor = torch.randn(3, 1000).to(dtype)
    assert all_finite(tensor) and all_finite(torch.empty(0)) and all_finite(torch.tensor([1]))
    tensor[1, 777] = value
    assert not all_finite(tensor)


def overflowing(tiny, layer):
    """A session whose MLP of one layer overflows when it runs."""
    session = tiny.session(POLICY)
    name = next(n for n in session.tensors if f"layers.{layer}." in n and
                any(part in n for part in ("fc2.weight", "down_proj.weight")))  # fmt: skip
    session.tensors = {**session.tensors, name: torch.full_like(session.tensors[name], 3e38)}
    session._bound = {}
    return session


@pytest.mark.parametrize("layer", [0, 2])
def test_an_overflow_while_it_runs_names_its_layer(tiny_opt, layer):
    ids = tiny_opt.ids(1, 8)
    session = overflowing(tiny_opt, layer)
    assert not session.step(ids, session.new_cache(1))["logits"].isfinite().all()  # not asked for
    session.check_finite = True
    with pytest.raises(NumericsError, match=f"first in layer {layer}, at ") as raised:
        session.step(ids, session.new_cache(1))
    assert "token 8" in str(raised.value) and "--dtype" in str(raised.value)


def test_an_overflow_of_a_decoded_token_is_named(tiny_opt):
    ids, good, bad = tiny_opt.ids(1, 8), tiny_opt.session(POLICY), overflowing(tiny_opt, 1)
    cache = good.new_cache(1)
    good.step(ids, cache)
    good.check_finite = True
    expected = good.step(ids[:, :1], cache)["logits"]  # looked at, and nothing is changed by that
    cache.take_back(1)
    bad.check_finite = True
    with pytest.raises(NumericsError, match=r"token 9 are not finite: first in layer 1, at "):
        bad.step(ids[:, :1], cache)
    assert cache.length == 9
    cache.take_back(1)
    assert torch.equal(good.step(ids[:, :1], cache)["logits"], expected)
    good.check_finite = False


def test_generation_stops_there(tiny_opt):
    session = overflowing(tiny_opt, 1)
    session.check_finite = True
    config = tiny_opt.loaded.model.config
    model = ShadowcForCausalLM(config, GenerationConfig(), session, {}, tiny_opt.loaded.tokenizer)
    with pytest.raises(NumericsError, match="layer 1"):
        model.generate(tiny_opt.ids(1, 4), max_new_tokens=2)


def test_a_prompt_of_no_tokens(tiny_opt):
    session, nothing = tiny_opt.session(POLICY), torch.empty(1, 0, dtype=torch.int64)
    config = tiny_opt.loaded.model.config
    model = ShadowcForCausalLM(config, GenerationConfig(), session, {}, tiny_opt.loaded.tokenizer)
    for ask in (
        partial(session.step, nothing, session.new_cache(1)),
        partial(model, nothing),
        partial(model, nothing, use_cache=False),
        partial(model.generate, nothing, max_new_tokens=2),
        partial(model.generate, input_ids=nothing, max_new_tokens=2),
    ):
        with pytest.raises(LengthError, match="the prompt has no tokens"):
            ask()
