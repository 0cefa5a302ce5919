"""The ten rules of the design, each with a test that fails when the rule is broken.

Rules 5 (train and serve see the same feature) and 7 (speed and quality on the same artifact) also
have tests of their parts in tests/calibration and tests/evaluation.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections import Counter

import pytest
import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from shadowc import native
from shadowc.budget import predictor_elements
from shadowc.calibration.collect import Collector
from shadowc.calibration.data import Example
from shadowc.compiler import compile_model
from shadowc.config import Policy
from shadowc.errors import ArtifactError, KernelError, OptionError
from shadowc.evaluation import bench
from shadowc.evaluation.masks import mask_source, teacher_forced, with_given_masks
from shadowc.evaluation.numerics import masks_of
from shadowc.evaluation.perplexity import evaluate_artifact
from shadowc.kernels.select import select_reference
from shadowc.runtime.loading import load_session
from shadowc.runtime.session import Session
from shadowc.runtime.usage import Usage
from shadowc.selection import TopK, selections
from shadowc.targets import load_target

HALF = Policy(0.4, 0.5, min_neurons=2)
ABOVE = dataclasses.replace(HALF, selection="threshold")
PROMPT = 4
#: Where predictors are and how they choose.
PLACES = {
    "one": ((0,), HALF),
    "one, threshold": ((0,), ABOVE),
    "two, threshold": ((0, 2), ABOVE),
    "all, threshold": ((0, 1, 2), ABOVE),
    "all, local": ((0, 1, 2), dataclasses.replace(HALF, scope="local")),
    "all, normed": ((0, 1, 2), ABOVE),
}


def at(tiny, place):
    """The model with predictors at that place, and the policy that goes with them."""
    taps, policy = PLACES[place]
    return tiny.with_taps(taps, "normed" if "normed" in place else "residual"), policy


def decode(session, ids, prompt=PROMPT):
    """Token-by-token logits [B, T - prompt, V] and the keep sets of each step."""
    cache = session.new_cache(ids.shape[0], ids.shape[1])
    session.step(ids[:, :prompt], cache)
    logits, keeps, results = [], [], []
    for token in range(prompt, ids.shape[1]):
        result = session.step(ids[:, token : token + 1], cache)
        results.append(result)
        logits.append(result["logits"][:, 0])
        keeps.append(dict(cache.keep))
    return torch.stack(logits, 1), keeps, results, cache


def given(session, ids, heads, neurons):
    """Logits of the masked program with masks of one's own."""
    program = with_given_masks(session.programs["masked"])
    return teacher_forced(
        session.with_program("given_masks", program), ids, masks=(heads, neurons)
    )["logits"]


def ones(shape, ids):
    size = (*ids.shape, shape.layers)
    return (
        torch.ones(*size, shape.heads, dtype=torch.bool),
        torch.ones(*size, shape.ffn, dtype=torch.bool),
    )


def test_rule_1_a_zero_neuron_mask_leaves_the_bias(tiny_opt):
    session, ids = tiny_opt.session(HALF), tiny_opt.ids()
    heads, neurons = ones(tiny_opt.shape, ids)
    neurons[:] = False
    model = tiny_opt.loaded.model
    hooks = [
        layer.fc2.register_forward_hook(lambda m, x, y: m.bias.expand_as(y))
        for layer in model.model.decoder.layers
    ]
    expected = model(ids).logits
    for hook in hooks:
        hook.remove()
    torch.testing.assert_close(given(session, ids, heads, neurons), expected, atol=1e-4, rtol=1e-4)


def test_rule_1_a_zero_head_mask_is_a_zeroed_context_slice(tiny):
    session, ids = tiny.session(HALF), tiny.ids()
    heads, neurons = ones(tiny.shape, ids)
    heads[:, :, 1, 2] = False
    d = tiny.shape.head_dim

    def zero(module, inputs):
        context = inputs[0].clone()
        context[..., 2 * d : 3 * d] = 0
        return (context,)

    base = tiny.loaded.model.model
    attention = getattr(base, "decoder", base).layers[1].self_attn
    projection = getattr(attention, "out_proj", None) or attention.o_proj
    hook = projection.register_forward_pre_hook(zero)
    expected = tiny.loaded.model(ids).logits
    hook.remove()
    torch.testing.assert_close(given(session, ids, heads, neurons), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("refresh", [1, 3, 0])
@pytest.mark.parametrize(
    "place, dtype", [("one", torch.bfloat16), *((place, torch.float32) for place in PLACES)]
)
def test_rules_1_and_2_decoding_equals_teacher_forcing(tiny, place, refresh, dtype):
    """Same tokens, same masks: lowered == masked, token by token, for every refresh mode."""
    tiny, policy = at(tiny, place)
    policy = dataclasses.replace(policy, refresh=refresh)
    session, ids = tiny.session(policy, dtype=dtype), tiny.ids(batch=1)
    logits, keeps, _, _ = decode(session, ids)
    taught = teacher_forced(session, ids, prompt=PROMPT)
    heads, neurons = masks_of(keeps, tiny.shape, PROMPT)
    assert torch.equal(heads, taught["head_mask"])
    assert torch.equal(neurons, taught["neuron_mask"])
    for mask in (heads[:, PROMPT:, 1:], neurons[:, PROMPT:]):
        assert 0.2 < mask.float().mean() < 0.8
    torch.testing.assert_close(logits, taught["logits"][:, PROMPT:], atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("place", PLACES)
def test_rule_1_sparsity_0_is_dense(tiny, place):
    """Also through masks: thresholds of a budget of everything keep everything."""
    tiny, policy = at(tiny, place)
    policy = dataclasses.replace(policy, head_sparsity=0.0, neuron_sparsity=0.0)
    ids = tiny.ids()
    logits, heads, neurons = tiny.graph("masked", policy)(
        *tiny.inputs(ids), torch.arange(ids.shape[1]).expand(2, -1)
    )
    assert heads.all() and neurons.all()
    torch.testing.assert_close(logits, tiny.loaded.model(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("refresh", [1, 3, 0])
@pytest.mark.parametrize("place", ["one", "two, threshold", "all, threshold", "all, local"])
def test_rule_2_a_later_token_changes_no_earlier_mask(tiny, place, refresh):
    tiny, policy = at(tiny, place)
    session = tiny.session(dataclasses.replace(policy, refresh=refresh))
    ids = tiny.ids()
    changed = ids.clone()
    changed[:, 8:] = tiny.ids(seed=9)[:, 8:]
    before = teacher_forced(session, ids, prompt=PROMPT)
    after = teacher_forced(session, changed, prompt=PROMPT)
    for name in ("head_mask", "neuron_mask", "logits"):
        assert torch.equal(before[name][:, :8], after[name][:, :8]), name
    assert not torch.equal(before["logits"][:, 8:], after["logits"][:, 8:])
    assert (mask_source(12, prompt=PROMPT, refresh=refresh) <= torch.arange(12)).all()


def test_rule_3_keys_and_values_are_written_for_every_head(tiny):
    session, ids = tiny.session(HALF), tiny.ids()
    _, keeps, _, cache = decode(session, ids)
    assert any((k["head_count"] < tiny.shape.heads).any() for k in keeps)
    for tensor in cache.tensors:
        assert (tensor[:, :, : ids.shape[1]].abs().sum(-1) > 0).all()


def test_rule_4_layer_0_is_dense_and_no_layer_is_emptied(tiny):
    """Scores that would empty a layer meet the stated minimum, masked and lowered."""
    calibration = tiny.calibration
    weights = {k: v.clone() for k, v in calibration.weights.items()}
    weights["0.heads_bias"][: tiny.shape.heads] = -1e6  # layer 1's heads come last in any ranking
    weights["0.neurons_bias"][: tiny.shape.ffn] = -1e6  # and layer 0's neurons
    starved = dataclasses.replace(calibration, weights=weights)
    session, ids = tiny.session(HALF, calibration=starved), tiny.ids(batch=1)
    taught = teacher_forced(session, ids, prompt=PROMPT)
    _, keeps, _, _ = decode(session, ids)
    for masks in (
        (taught["head_mask"], taught["neuron_mask"]),
        masks_of(keeps, tiny.shape, PROMPT),
    ):
        heads, neurons = (mask[:, PROMPT:] for mask in masks)
        assert heads[:, :, 0].all()
        assert (heads[:, :, 1].sum(-1) == HALF.min_heads).all()
        assert (neurons[:, :, 0].sum(-1) == HALF.min_neurons).all()


@pytest.mark.parametrize("place", PLACES)
def test_rule_5_the_artifact_computes_the_calibrated_scores(tiny, place):
    """The masks of the artifact are those of the predictors on what calibration sees."""
    tiny, policy = at(tiny, place)
    session, ids, calibration = tiny.session(policy), tiny.ids(), tiny.calibration
    collector = Collector(tiny.loaded.model, tiny.shape, calibration.feature, calibration.taps)
    features, _ = collector.features([Example(row, [True] * len(row)) for row in ids.tolist()])
    # The prompt runs dense, so its last token's features, and those of tap 0 at the first token
    # after it, are what calibration saw. The others follow from masks that are checked elsewhere.
    prompt = ids.shape[1] - 1
    held = dataclasses.replace(policy, refresh=0)
    result = teacher_forced(tiny.session(held), ids, prompt=prompt)
    maker = zip(features, calibration.build_predictors(), selections(calibration, policy),
                strict=True)  # fmt: skip
    for feature, predictor, (tap, *chosen) in maker:
        kinds = zip(("head", "neuron"), (tap.heads, tap.neurons), predictor(feature), chosen,
                    strict=True)  # fmt: skip
        for kind, layers, scores, how in kinds:
            expected = select(scores, how)
            assert torch.equal(result[f"{kind}_mask"][:, -1, list(layers)], expected[:, -2])
            if tap.layer == 0:
                every = teacher_forced(session, ids)[f"{kind}_mask"][:, 1, list(layers)]
                assert torch.equal(every, expected[:, 1])


def select(scores, how):
    """Masks [B, T, L', N] by the definitions."""
    if isinstance(how, TopK):
        return select_reference(scores, how.keep, how.floor, how.local)
    return scores > how[:, None]


@pytest.mark.parametrize("place", ["one", "two, threshold", "all, threshold"])
def test_rule_6_reported_sparsity_is_what_ran(tiny, place):
    tiny, policy = at(tiny, place)
    session, ids = tiny.session(policy), tiny.ids(batch=1)
    _, keeps, results, _ = decode(session, ids)
    usage = Usage.of(session)
    for result in results:
        usage.add(result)
    heads, neurons = (m[0, PROMPT:].float() for m in masks_of(keeps, tiny.shape, PROMPT))
    assert usage.head_sparsity == pytest.approx(1 - heads.mean().item())
    assert usage.neuron_sparsity == pytest.approx(1 - neurons.mean().item())
    # What was asked for counts all heads, those of layer 0 as run; the error is half a head.
    all_heads = tiny.shape.heads * tiny.shape.layers
    if policy.selection == "topk":
        assert usage.head_sparsity == pytest.approx(HALF.head_sparsity, abs=0.501 / all_heads)
        assert usage.neuron_sparsity == pytest.approx(HALF.neuron_sparsity)
    assert usage.to_json()["heads_by_layer"] == pytest.approx(
        heads.sum(-1).mean(0).tolist(), abs=0.01
    )
    shape, rows = tiny.shape, sum(int(r[f"rows_{i}"]) for r in results for i in range(3))
    n, d, c = len(results), shape.head_dim, shape.hidden
    elements = (
        heads.sum() * 2 * d * c
        + n * 3 * 2 * shape.kv_heads * d * c
        + neurons.sum() * c * (2 if shape.gated else 1)
        + rows * c
    )
    assert usage.layer_bytes == pytest.approx(float(elements) * 4 / n)
    predictor = sum(
        session.tensors[name].nbytes
        for name in session.programs["decode"].weights
        if name.startswith("predictor.")
    )
    assert usage.predictor_bytes == predictor > 0
    matrices = 4 * predictor_elements(tiny.calibration, heads=True, neurons=True)
    assert 0 < predictor - matrices < 0.1 * predictor  # biases and thresholds


def test_rule_7_quality_and_speed_run_the_same_masks(tiny, tmp_path, monkeypatch):
    """What `eval` scores and what `bench` times select the same units for the same tokens, and the
    dense baseline is a program of the same artifact over the same weights."""
    artifact = compile_model(
        tiny.loaded, tiny.calibration, HALF, tmp_path / "artifact",
        dtype=torch.float32, max_seq_len=64,
    )  # fmt: skip
    new, run, ran = 24, Session.run, []

    def recorded(session, name, *inputs):
        results = run(session, name, *inputs)
        ran.append((name, inputs[0].shape[1], results))
        return results

    monkeypatch.setattr(Session, "run", recorded)
    monkeypatch.setattr(bench, "read_bandwidth", lambda device: 1.0)
    speed = bench.bench(artifact, prompt_len=PROMPT, new_tokens=new, hugging_face=False)
    timed = [(name, results) for name, tokens, results in ran if tokens == 1]
    steps = {"decode": 2 * new, "dense": new}  # once more to time the selection
    if tiny.shape.activation == "relu":
        steps["exact"] = new
    assert Counter(name for name, _ in timed) == steps
    keeps = [results for name, results in timed if name == "decode"][:new]
    heads, neurons = masks_of(keeps, tiny.shape, PROMPT)

    ran.clear()
    quality = evaluate_artifact(artifact, seq_len=PROMPT + new, tokens=PROMPT + new)
    name, _, scored = ran[0]
    assert name == "masked"
    assert torch.equal(heads[:, PROMPT:], scored["head_mask"][:, PROMPT:])
    assert torch.equal(neurons[:, PROMPT:], scored["neuron_mask"][:, PROMPT:])
    for kind in ("head_sparsity", "neuron_sparsity"):
        assert quality[kind] == pytest.approx(speed[kind]) and speed[kind] > 0.3

    programs = load_session(artifact).programs
    weights = {n for n in programs["decode"].weights if not n.startswith("predictor")}
    assert weights == set(programs["dense"].weights)


_SYNCS = (
    "item",
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique",
    "is_nonzero",
    "equal",
)


@pytest.mark.parametrize("place", ["one", "all, threshold"])
def test_rule_8_a_decode_step_has_no_host_synchronisation(tiny, place):
    tiny, policy = at(tiny, place)
    session = tiny.session(policy)
    for name in ("decode", "dense"):
        targets = {str(n.target) for n in session.programs[name].graph.nodes}
        assert not [t for t in targets if any(f".{sync}." in t for sync in _SYNCS)], name
        assert not [t for t in targets if "sym_size" in t and name == "decode" and "mask" in t]


@pytest.mark.parametrize("place", ["one", "all, threshold"])
def test_rule_8_a_decode_step_reads_no_value_on_the_host(tiny, place, monkeypatch):
    """As above for what the operators do in Python."""
    tiny, policy = at(tiny, place)
    session, ids = tiny.session(policy), tiny.ids()
    cache = session.new_cache(*ids.shape)
    session.step(ids[:, :PROMPT], cache)

    def read(*_):
        raise AssertionError("the value of a tensor was read")

    with monkeypatch.context() as patch:
        for name in ("item", "tolist", "numpy", "nonzero", "__bool__", "__int__", "__float__",
                     "__index__"):  # fmt: skip
            patch.setattr(Tensor, name, read)
        for token, program in enumerate(("decode", "dense"), start=PROMPT):
            session.step(ids[:, token : token + 1], cache, program=program)
    assert cache.length == PROMPT + 2


@pytest.mark.parametrize("place", ["one", "all, threshold"])
def test_rule_8_zero_kept_units_are_legal(tiny, place):
    """A ragged budget may leave a layer without any unit; lowered and masked still agree."""
    tiny, policy = at(tiny, place)
    policy = dataclasses.replace(policy, min_heads=0, min_neurons=0)
    weights = {k: v.clone() for k, v in tiny.calibration.weights.items()}
    weights["0.heads_bias"][: tiny.shape.heads] = -1e6
    weights["0.neurons_bias"][: tiny.shape.ffn] = -1e6
    starved = dataclasses.replace(tiny.calibration, weights=weights)
    session, ids = tiny.session(policy, calibration=starved), tiny.ids(batch=1)
    logits, keeps, _, _ = decode(session, ids)
    assert all(int(k["head_count"][0, 0]) == 0 for k in keeps)
    assert all(int(k["neuron_count"][0, 0]) == 0 for k in keeps)
    taught = teacher_forced(session, ids, prompt=PROMPT)["logits"][:, PROMPT:]
    torch.testing.assert_close(logits, taught, atol=1e-3, rtol=1e-3)


class _Calls(TorchDispatchMode):
    """The last call of each op of the domain `shadowc`."""

    def __init__(self):
        super().__init__()
        self.last = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "shadowc":
            self.last[op] = args
        return op(*args, **kwargs or {})


def test_rule_9_nothing_falls_back(tiny, monkeypatch):
    """Without the native library every op raises; a program or target that is missing is not
    replaced."""
    monkeypatch.setattr("shadowc.runtime.program._direct", lambda graph: graph)  # calls are seen
    session, ids = tiny.session(HALF), tiny.ids(1)
    cache = session.new_cache(*ids.shape)
    session.step(ids[:, :PROMPT], cache)
    with _Calls() as calls:
        session.step(ids[:, PROMPT : PROMPT + 1], cache)
    assert len(calls.last) >= 6
    monkeypatch.setenv("SHADOWC_ISA", "vliw")
    native.library.cache_clear()
    try:
        for op, arguments in calls.last.items():
            with pytest.raises(KernelError, match="SHADOWC_ISA"):
                op(*arguments)
    finally:
        monkeypatch.undo()
        native.library.cache_clear()

    session.programs = {k: v for k, v in session.programs.items() if k != "decode"}
    with pytest.raises(ArtifactError, match="'decode'"):
        session.step(ids[:, -1:], cache)
    with pytest.raises(OptionError, match="'tpu'"):
        load_target("tpu")


def test_rule_10_same_inputs_same_artifact(tiny, tmp_path):
    hashes = []
    for run in ("a", "b"):
        artifact = compile_model(
            tiny.loaded, tiny.calibration, HALF, tmp_path / run, max_seq_len=64
        )
        files = artifact.manifest["files"]
        hashes.append({k: v["sha256"] for k, v in files.items() if k != "report.json"})
    assert hashes[0] == hashes[1]
    assert isinstance(tiny.traced, fx.GraphModule)


def test_rule_10_another_process_makes_the_same_artifact(tiny_opt, tmp_path):
    """From calibration on, and whatever order Python's hashing gives to sets there."""
    model = tmp_path / "model"
    tiny_opt.loaded.model.save_pretrained(model)
    tiny_opt.loaded.tokenizer.save_pretrained(model)
    small = ["--examples", "4", "--seq-len", "16", "--rank", "4"]
    made = []
    for seed in ("1", "2"):
        calibration, artifact = (str(tmp_path / f"{name}{seed}") for name in ("c", "a"))
        code = f"""
from shadowc.cli import app
app(["calibrate", {str(model)!r}, *{small!r}, "--output", {calibration!r}], standalone_mode=False)
app(["compile", {calibration!r}, "--output", {artifact!r}], standalone_mode=False)
"""
        environment = os.environ | {"PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300)
        manifest = json.loads((tmp_path / f"a{seed}" / "manifest.json").read_text())
        made.append({k: v["sha256"] for k, v in manifest["files"].items() if k != "report.json"})
    assert made[0] == made[1]
