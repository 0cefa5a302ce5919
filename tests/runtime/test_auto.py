"""What `from_pretrained` takes, and what an artifact's config says."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from shadowc.auto import _AfterImport
from shadowc.compiler import compile_model
from shadowc.config import Policy
from shadowc.errors import ArtifactError, OptionError


@pytest.fixture(scope="module")
def artifact(tiny_opt, tmp_path_factory):
    path = tmp_path_factory.mktemp("auto") / "artifact"
    compile_model(tiny_opt.loaded, None, Policy(0.0, 0.0), path, max_seq_len=48)
    return path


def test_the_config_is_the_checkpoints_under_a_type_of_its_own(artifact, tiny_opt):
    config, original = AutoConfig.from_pretrained(artifact), tiny_opt.loaded.model.config
    assert config.model_type == "shadowc" and config.base_model_type == "opt"
    assert config.max_position_embeddings == 48, "the compiled length"
    for name in ("hidden_size", "ffn_dim", "num_attention_heads", "vocab_size", "eos_token_id"):
        assert getattr(config, name) == getattr(original, name)


def test_options_that_agree_with_the_artifact(artifact):
    stored = json.loads((artifact / "manifest.json").read_text())["dtype"]
    for options in ({}, {"dtype": "auto", "device_map": "auto"}, {"dtype": stored},
                    {"device_map": {"": "cpu"}, "attn_implementation": "sdpa"},
                    {"device_map": torch.device("cpu:0")},
                    {"probe_every": 3}):  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(artifact, **options)
        assert model.watch.every == options.get("probe_every", 0)


@pytest.mark.parametrize("options, message", [
    ({"dtype": torch.float64}, "weights of one type"),
    ({"device_map": "cuda:0"}, "where its target is"),
    ({"device_map": 0}, "where its target is"),
    ({"device_map": "cpu:1"}, "where its target is"),
    ({"device_map": "sequential"}, "where its target is"),
    ({"probe_alarm": 1.5}, "out of range"),
])  # fmt: skip
def test_options_that_do_not(artifact, options, message):
    with pytest.raises(OptionError, match=message):
        AutoModelForCausalLM.from_pretrained(artifact, **options)


def test_what_is_not_an_artifact(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "shadowc"}')
    with pytest.raises(ArtifactError, match="is not an artifact"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_who_asks_for_the_auto_classes_does_not_lose_them(monkeypatch):
    """Looking for the module is not importing it."""
    hook = _AfterImport()
    monkeypatch.setattr(sys, "meta_path", [hook, *sys.meta_path])
    path = [str(Path(modeling_auto.__file__).parent)]
    assert hook.find_spec("json", None) is None
    for _ in range(2):
        spec = hook.find_spec(modeling_auto.__name__, path)
        assert spec.loader.exec_module.__name__ == "then_register" and hook in sys.meta_path


def test_one_line_says_what_was_loaded(artifact, caplog):
    with caplog.at_level(logging.INFO, "shadowc"):
        AutoModelForCausalLM.from_pretrained(artifact)
    (line,) = caplog.messages
    assert "artifact in transformers" in line and "target cpu" in line and "skips 0%" in line
