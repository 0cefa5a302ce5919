"""The ONNX target: its export, functions and library of one meaning, and what it refuses."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors.torch
import torch
from onnx import TensorProto
from onnxruntime.capi.onnxruntime_pybind11_state import InvalidArgument
from transformers import GenerationConfig

import shadowc
import shadowc.onnx
from shadowc import native
from shadowc.artifact import open_artifact, sealed
from shadowc.compiler import build_programs, compile_model
from shadowc.config import Policy
from shadowc.errors import (
    ArtifactError,
    KernelError,
    LengthError,
    NumericsError,
    OptionError,
    PassError,
)
from shadowc.evaluation.bench import bench
from shadowc.evaluation.numerics import check_numerics
from shadowc.onnx.export import ABI, IR_VERSION, OPSET, export, save
from shadowc.onnx.names import DENSE, MODEL
from shadowc.passes.manager import copy_module
from shadowc.runtime.loading import load, load_session
from shadowc.runtime.model import ShadowcForCausalLM
from shadowc.runtime.session import Session
from shadowc.targets import load_target

EXAMPLE = Path(__file__).parents[2] / "examples" / "onnx_plain.py"
SPARSE = Policy(0.5, 0.5, min_neurons=2)
POLICIES = {
    "global": SPARSE,
    "local": dataclasses.replace(SPARSE, scope="local", neuron_sparsity=0.4, head_sparsity=0.4),
    "threshold": dataclasses.replace(SPARSE, selection="threshold"),
    "two taps": dataclasses.replace(SPARSE, selection="threshold"),
    "neurons alone": dataclasses.replace(SPARSE, head_sparsity=0.0),
    "static": SPARSE,
    "exact": Policy(0.0, 0.0),
}
#: Only summation orders differ, whatever the type of the weights: activations are fp32.
TOLERANCE = 2e-4


def compiled(tiny, directory, policy=SPARSE, dtype=torch.float32):
    calibration = tiny.calibration if policy.neuron_sparsity else None
    return compile_model(
        tiny.loaded, calibration, policy, directory, target="onnx-cpu", dtype=dtype
    )


@pytest.fixture(scope="module", params=["opt", "llama"])
def artifact(request, tmp_path_factory):
    """An artifact of each architecture, compiled and with that checked."""
    tiny = request.getfixturevalue(f"tiny_{request.param}")
    return compiled(tiny, tmp_path_factory.mktemp(request.param) / "artifact")


@pytest.fixture(scope="module")
def llama_artifact(tiny_llama, tmp_path_factory):
    return compiled(tiny_llama, tmp_path_factory.mktemp("one") / "artifact")


def session_of(tiny, case, dtype, directory):
    """(the target's session, the same programs as torch runs them)."""
    if case == "two taps":
        tiny = tiny.with_taps((0, 2))
    policy, calibration = POLICIES[case], tiny.calibration
    if case == "static":
        calibration = dataclasses.replace(calibration, predictor="static", weights={})
    target = load_target("onnx-cpu")
    built = build_programs(
        copy_module(tiny.traced), tiny.loaded, calibration, policy, target, dtype
    )
    torch_ = Session(
        tiny.shape, policy, built.programs, built.packed, built.keep, 64, built.predictor_bytes
    )
    safetensors.torch.save_file(built.packed, directory / "model.safetensors")
    save(export(torch_), directory)
    return target.serve(torch_, directory, (1,), allow_jit=False), torch_


def run(model, ids, start=(0, 0), chunks=(6, 1, 1, 1)):
    """All results of every chunk with a cache that grows, as any user of the file has them."""
    past = {
        i.name: np.zeros((len(ids), i.shape[1], 0, i.shape[3]), np.float32)
        for i in model.get_inputs()
        if i.name.startswith("past")
    }
    names, found, first = [o.name for o in model.get_outputs()], [], 0
    for size in chunks:
        slots = np.arange(first + size)
        inputs = {
            "input_ids": ids[:, first : first + size].numpy(),
            "attention_mask": (slots >= np.array(start)[:, None]).astype(np.int64),
            "position_ids": np.maximum(slots[first:] - np.array(start)[:, None], 0),
        }
        results = dict(zip(names, model.run(None, inputs | past), strict=True))
        past = {k.replace("present", "past_key_values"): v for k, v in results.items()
                if k.startswith("present")}  # fmt: skip
        found.append(results)
        first += size
    return found


def open_plain(path, library=False):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    if library:
        options.register_custom_ops_library(str(shadowc.onnx.library_path()))
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def edited(artifact, tmp_path, change):
    """A model of the artifact, changed, beside the same weights."""
    model = onnx.load(artifact.path / MODEL, load_external_data=False)
    change(model)
    for file in artifact.path.glob("*.safetensors"):
        (tmp_path / file.name).hardlink_to(file)
    (tmp_path / MODEL).write_bytes(model.SerializeToString())
    return tmp_path / MODEL


def custom_nodes(model):
    (branch,) = [n for n in model.graph.node if n.op_type == "If"]
    graphs = {a.name: a.g for a in branch.attribute}
    assert not [n for n in graphs["then_branch"].node if n.domain]  # a prompt is plain ONNX
    return [n for n in graphs["else_branch"].node if n.domain == "shadowc"]


# The file ----------------------------------------------------------------------------------------


def test_the_model_is_what_servers_expect(artifact):
    model = onnx.load(artifact.path / MODEL, load_external_data=False)
    onnx.checker.check_model(artifact.path / MODEL, full_check=True)
    shape = artifact.manifest["shape"]
    assert (model.ir_version, OPSET) == (IR_VERSION, model.opset_import[0].version)
    assert [(o.domain, o.version) for o in model.opset_import][1:] == [("shadowc", ABI)]
    inputs = [i.name for i in model.graph.input]
    assert inputs[:4] == ["input_ids", "attention_mask", "position_ids", "past_key_values.0.key"]
    outputs = [o.name for o in model.graph.output]
    assert outputs[:3] == ["logits", "present.0.key", "present.0.value"]
    assert len(inputs) == 3 + 2 * shape["layers"]
    dims = [d.dim_param or d.dim_value for d in model.graph.input[3].type.tensor_type.shape.dim]
    assert dims == ["batch", shape["kv_heads"], "past", shape["head_dim"]]

    kinds = [node.op_type for node in custom_nodes(model)]
    mlp = "SparseGatedMLP" if shape["gated"] else "SparseMLP"
    assert kinds.count(mlp) == kinds.count("SparseAttention") == shape["layers"]
    assert kinds.count("Select") == 2
    assert {f.name for f in model.functions} == set(kinds)

    dense = onnx.load(artifact.path / DENSE, load_external_data=False)
    assert not dense.functions and {n.domain for n in dense.graph.node} == {""}


def test_there_is_one_copy_of_the_weights(artifact):
    for name in (MODEL, DENSE):
        model = onnx.load(artifact.path / name, load_external_data=False)
        for tensor in model.graph.initializer:
            place = {entry.key: entry.value for entry in tensor.external_data}
            assert place["location"].endswith(".safetensors") and not tensor.raw_data
        assert (artifact.path / name).stat().st_size < 300_000
    tensor = next(t for t in model.graph.initializer if len(t.dims) == 2)
    onnx.external_data_helper.load_external_data_for_tensor(tensor, str(artifact.path))
    stored = artifact.tensors()[tensor.name]
    assert np.array_equal(onnx.numpy_helper.to_array(tensor), stored.numpy())


def test_genai_config(artifact):
    config = json.loads((artifact.path / "genai_config.json").read_text())
    decoder, shape = config["model"]["decoder"], artifact.manifest["shape"]
    assert decoder["filename"] == MODEL
    assert decoder["num_hidden_layers"] == shape["layers"]
    assert decoder["inputs"]["past_key_names"] % 1 == "past_key_values.1.key"
    assert decoder["outputs"]["present_value_names"] % 0 == "present.0.value"


def test_the_check_is_in_the_report(artifact):
    report = artifact.report()["compile"]
    assert report["max_abs_error"] <= report["tolerance"]
    assert report["greedy_tokens"] == report["greedy_tokens_equal"] == 56  # all that fit
    assert {"onnx", "onnxruntime"} <= set(artifact.manifest["versions"])


def test_the_check_finds_another_model(tiny_llama, tmp_path):
    ours, _ = session_of(tiny_llama, "global", torch.float32, tmp_path)
    other = dict(ours.tensors)
    name = next(n for n in other if n.endswith("down_proj.weight_t"))
    other[name] = other[name] + 0.05
    ours.tensors = other  # what the masked program runs with; the ONNX model has its own
    with pytest.raises(NumericsError):
        check_numerics(ours, tiny_llama.loaded, load_target("onnx-cpu").tolerances(torch.float32))


# One meaning -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", POLICIES)
def test_steps_equal_those_of_the_lowered_programs(tiny, case, tmp_path):
    """Keep sets, rows and logits of a padded batch, for every kind of selection."""
    if case == "exact" and tiny.shape.gated:
        pytest.skip("SwiGLU has no exact zeros")
    _equal_to_torch(tiny, case, torch.float32, tmp_path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights(tiny, dtype, tmp_path):
    _equal_to_torch(tiny, "global", dtype, tmp_path)


def _equal_to_torch(tiny, case, dtype, directory):
    ours, theirs = session_of(tiny, case, dtype, directory)
    ids, caches = tiny.ids(), [s.new_cache(2, 16) for s in (ours, theirs)]
    for cache in caches:
        cache.start = torch.tensor([0, 2])
    for first, last in ((0, 6), (6, 7), (7, 8), (8, 9)):
        found, wanted = (
            s.step(ids[:, first:last], cache)
            for s, cache in zip((ours, theirs), caches, strict=True)
        )
        error = (found["logits"][:, -1] - wanted["logits"][:, -1]).abs().max()
        assert error < TOLERANCE
        if first:
            for kind in ("head", "neuron"):
                if f"{kind}_count" in wanted:
                    assert torch.equal(found[f"{kind}_keep"].sum(-1), wanted[f"{kind}_count"])
            for layer in range(tiny.shape.layers):
                assert torch.equal(found[f"rows_{layer}"], wanted[f"rows_{layer}"])
    kept = caches[0].keep.get("neuron_keep")
    if kept is not None:
        index, count = wanted["neuron_index"], wanted["neuron_count"]
        for layer in range(tiny.shape.layers):
            mask = native.keep_mask(index[layer], count[layer], tiny.shape.ffn)
            assert torch.equal(kept[layer], mask)


def test_function_and_library_agree(artifact, tiny_opt):
    ids = tiny_opt.ids()
    plain, fast = (
        run(open_plain(artifact.path / MODEL, library), ids, start=(0, 3))
        for library in (False, True)
    )
    for one, other in zip(plain, fast, strict=True):
        for name, value in one.items():
            live = value[:, 3:] if name == "logits" and value.shape[1] > 1 else value
            same = other[name][:, 3:] if live is not value else other[name]
            assert np.allclose(live, same, atol=TOLERANCE), name


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_other_activations(tiny_opt, activation, monkeypatch):
    """As the plain operators spell them."""
    from shadowc.onnx.bodies import Writer, activate

    w = Writer()
    out = activate(w, "x", activation)
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        w.nodes, "g", [value("x", TensorProto.FLOAT, ["n"])], [value(out, TensorProto.FLOAT, ["n"])]
    )
    model = onnx.helper.make_model(
        graph, opset_imports=[onnx.helper.make_opsetid("", OPSET)], ir_version=IR_VERSION
    )
    x = torch.linspace(-6, 6, 101)
    (y,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x.numpy()})
    assert torch.allclose(torch.from_numpy(y), native.activate(x, activation), atol=1e-6)


def test_equal_scores_go_to_the_lowest_units(artifact, tmp_path):
    """Also in the function, whose TopK must order ties as `select` does."""

    def flatten(model):
        for tensor in model.graph.initializer:
            if tensor.name.startswith("predictor.") and len(tensor.dims) == 2:
                del tensor.external_data[:]
                tensor.data_location = TensorProto.DEFAULT
                tensor.raw_data = bytes(4 * int(np.prod(tensor.dims)))

    path = edited(artifact, tmp_path, flatten)
    ids = torch.arange(18).view(2, 9)
    plain, fast = (run(open_plain(path, library), ids)[-1] for library in (False, True))
    for name in ("head_keep", "neuron_keep"):
        assert np.array_equal(plain[name], fast[name])


# Running -----------------------------------------------------------------------------------------


def test_generate_gives_the_tokens_of_the_cpu_target(tiny, artifact_of):
    artifact, reference = artifact_of(tiny)
    config = GenerationConfig(bos_token_id=2, eos_token_id=2, pad_token_id=1)
    ours = shadowc.load(artifact.path)
    theirs = ShadowcForCausalLM(
        tiny.loaded.model.config, config, reference, {}, tiny.loaded.tokenizer
    )
    inputs = ours.tokenizer(["It was", "The captain looked at"], return_tensors="pt", padding=True)
    for options in ({}, {"num_beams": 3}):
        found, wanted = (
            model.generate(
                **inputs, max_new_tokens=16, do_sample=False, generation_config=config, **options
            )
            for model in (ours, theirs)
        )
        assert torch.equal(found, wanted)


def test_a_model_that_skips_nothing_is_plain_onnx(tiny_llama, tmp_path):
    """One file, which grows its cache as any exported model does."""
    artifact = compiled(tiny_llama, tmp_path / "artifact", Policy(0.0, 0.0))
    assert not (artifact.path / DENSE).exists()
    ours, theirs, ids = shadowc.load(artifact.path), tiny_llama.loaded.model, tiny_llama.ids()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, "pad_token_id": 1}
    found = [model.generate(ids, attention_mask=torch.ones_like(ids), **options)
             for model in (ours, theirs)]  # fmt: skip
    assert torch.equal(*found)


@pytest.fixture
def artifact_of(request, tmp_path):
    def make(tiny):
        return compiled(tiny, tmp_path / "artifact"), tiny.session(SPARSE)

    return make


def test_the_cache_is_written_in_place(artifact, tiny_opt):
    session = load_session(artifact)
    cache, ids = session.new_cache(1, 16), tiny_opt.ids(1)
    session.step(ids[:, :6], cache)
    addresses, before = [t.data_ptr() for t in cache.tensors], [t.clone() for t in cache.tensors]
    session.step(ids[:, 6:7], cache)
    assert addresses == [t.data_ptr() for t in cache.tensors]
    for tensor, old in zip(cache.tensors, before, strict=True):
        changed = (tensor != old).any(-1).any(1)[0]
        assert changed.nonzero().flatten().tolist() == [6]  # the new token's slot and no other
    grown = run(open_plain(artifact.path / MODEL), ids, (0,), (6, 1))[-1]
    assert np.allclose(cache.tensors[0][:, :, :7].numpy(), grown["present.0.key"], atol=1e-5)


def test_dense_and_sparse_steps_share_a_cache(artifact, tiny_opt):
    session, ids = load_session(artifact), tiny_opt.ids(1)
    caches = [session.new_cache(1, 16) for _ in range(2)]
    for cache, programs in zip(caches, ((None, "dense"), (None, None)), strict=True):
        session.step(ids[:, :6], cache)
        for place, program in enumerate(programs, start=6):
            session.step(ids[:, place : place + 1], cache, program=program)
    dense, sparse = (
        session.step(ids[:, 8:9], cache, program="dense")["logits"] for cache in caches
    )
    whole = session.step(ids[:, :9], session.new_cache(1, 16))["logits"][:, -1:]
    cache = session.new_cache(1, 16)
    for place in range(9):
        logits = session.step(ids[:, place : place + 1], cache, program="dense")["logits"]
    assert torch.allclose(logits, whole, atol=TOLERANCE)
    session.step(ids[:, 8:9], caches[0])  # and back: from the grown cache into the one in place
    assert not torch.allclose(dense, sparse, atol=TOLERANCE)


def test_sessions_run_from_several_threads(llama_artifact, tiny_opt):
    model = open_plain(llama_artifact.path / MODEL, library=True)
    texts = [tiny_opt.ids(2, seed=seed) for seed in range(4)]
    wanted = [run(model, ids)[-1]["logits"] for ids in texts]
    found = [None] * len(texts)

    def work(place):
        for _ in range(5):
            found[place] = run(model, texts[place])[-1]["logits"]

    threads = [threading.Thread(target=work, args=(place,)) for place in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, wanted, strict=True):
        assert np.array_equal(one, other)


def test_a_fresh_python_with_onnxruntime_alone(artifact, tmp_path):
    """The example, with and without the library: the same tokens, and no torch to import."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("numpy", "numpy.libs", "onnxruntime", "flatbuffers", "packaging", "google"):
        spec = importlib.util.find_spec(name) if "." not in name else None
        found = Path(spec.submodule_search_locations[0]) if spec else None
        if name == "numpy.libs":
            found = Path(np.__file__).parents[1] / name
        if found and found.exists():
            (packages / name).symlink_to(found)
    environment = {"PYTHONPATH": str(packages), "PATH": os.environ["PATH"]}

    def python(*arguments):
        command = [sys.executable, "-S", *map(str, arguments)]
        return subprocess.run(
            command, capture_output=True, text=True, env=environment, cwd=tmp_path
        )

    for forbidden in ("torch", "shadowc", "onnx"):
        assert "ModuleNotFoundError" in python("-c", f"import {forbidden}").stderr
    done = [
        python(EXAMPLE, artifact.path, "11,29,5,303", *library)
        for library in ((), (shadowc.onnx.library_path(),))
    ]
    assert [d.returncode for d in done] == [0, 0], done
    assert done[0].stdout == done[1].stdout and done[0].stdout.count(",") == 31
    assert len(EXAMPLE.read_text().splitlines()) <= 40


def test_bench_and_inspect(artifact):
    found = bench(
        artifact, prompt_len=8, new_tokens=24, hugging_face=False,
        data=str(Path(__file__)),
    )  # fmt: skip
    assert found["ms_per_token"] > 0 and found["dense_ms_per_token"] > 0
    assert found["head_sparsity"] == pytest.approx(artifact.report()["compile"]["head_sparsity"])
    assert found["selection_ms"] is None


# Bad input ---------------------------------------------------------------------------------------


def test_masks_that_last_longer_than_a_token(tiny_llama):
    policy = dataclasses.replace(SPARSE, refresh=0)
    with pytest.raises(OptionError, match="from one token to the next"):
        build_programs(
            copy_module(tiny_llama.traced), tiny_llama.loaded, tiny_llama.calibration, policy,
            load_target("onnx-cpu"), torch.float32,
        )  # fmt: skip


def test_a_feature_inside_of_a_node(tiny_llama, tmp_path):
    with pytest.raises(PassError, match="inside of an attention node"):
        session_of(tiny_llama.with_taps((0,), "context"), "global", torch.float32, tmp_path)


def test_programs_that_are_not_in_the_model(llama_artifact):
    session = load_session(llama_artifact)
    with pytest.raises(ArtifactError, match="'hold' is not in the ONNX model"):
        session.step(torch.tensor([[3]]), session.new_cache(1, 8), program="hold")


def test_whole_sequences_are_scored(llama_artifact):
    """As from every other artifact: its config, which is the checkpoint's, asks for a cache."""
    model = load(llama_artifact.path)
    assert model.config.use_cache
    ids = torch.tensor([[3, 7, 4, 9]])
    found = model(ids, labels=ids)
    assert found.logits.shape[:2] == (1, 4) and found.loss > 0


def test_too_many_tokens(llama_artifact):
    session = load_session(llama_artifact)
    with pytest.raises(LengthError):
        session.step(torch.zeros(1, 9, dtype=torch.int64), session.new_cache(1, 8))


def test_transformers_does_not_take_its_weights_for_the_checkpoints(llama_artifact):
    from transformers import AutoModelForCausalLM

    import shadowc  # noqa: F401

    with pytest.raises(OSError, match="no file named model.safetensors"):
        AutoModelForCausalLM.from_pretrained(llama_artifact.path)


@pytest.mark.parametrize("name", [MODEL, "weights.safetensors"])
def test_a_missing_or_truncated_file(llama_artifact, tmp_path, name):
    copy = shutil.copytree(llama_artifact.path, tmp_path / "copy")
    (copy / name).write_bytes((copy / name).read_bytes()[:-8])
    with pytest.raises(ArtifactError, match=name):
        open_artifact(copy)
    (copy / name).unlink()
    with pytest.raises(ArtifactError, match=name):
        open_artifact(copy)


@pytest.mark.parametrize("what", ["edited", "replaced"])
def test_a_dense_model_that_is_opened_late_is_checked_again(llama_artifact, tmp_path, what):
    copy = tmp_path / "copy"
    shutil.copytree(llama_artifact.path, copy)
    session = load_session(open_artifact(copy))
    if what == "edited":
        shutil.copy(copy / MODEL, copy / DENSE)
        expected = "dense.onnx"
    else:
        copy.rename(tmp_path / "other")
        shutil.copytree(tmp_path / "other", copy)
        manifest = json.loads((copy / "manifest.json").read_text())
        (copy / "manifest.json").write_text(sealed(manifest | {"name": "another"}))
        expected = "was replaced"
    with pytest.raises(ArtifactError, match=expected):
        session.step(torch.tensor([[5, 6]]), session.new_cache(1), program="dense")


def test_another_opset(llama_artifact, tmp_path):
    from shadowc.runtime.onnx import open_model

    def newer(model):
        model.opset_import[0].version = 99

    with pytest.raises(ArtifactError, match=f"ONNX Runtime {onnxruntime.__version__} cannot load"):
        open_model(edited(llama_artifact, tmp_path, newer))


@pytest.mark.parametrize("abi", [ABI + 1, None])
def test_another_abi_of_the_custom_ops(llama_artifact, tmp_path, abi):
    from shadowc.runtime.onnx import open_model

    def change(model):
        for node in custom_nodes(model):
            (attribute,) = [a for a in node.attribute if a.name == "abi"]
            if abi is None:
                node.attribute.remove(attribute)
            else:
                attribute.i = abi

    path = edited(llama_artifact, tmp_path, change)
    with pytest.raises(ArtifactError, match=f"exported for ABI {abi or 0} of the custom ops"):
        open_model(path)
    run(open_plain(path), torch.zeros(2, 9, dtype=torch.int64))  # the functions still run it


def test_a_library_of_another_platform(llama_artifact, tmp_path, monkeypatch):
    file = tmp_path / "_native.so"
    head = bytearray(native.library_file().read_bytes()[:4096])
    head[18:20] = (183).to_bytes(2, "little")  # the ELF header's machine: AArch64
    file.write_bytes(head)
    monkeypatch.setattr(native, "library_file", lambda: file)
    native.library.cache_clear()
    with pytest.raises(KernelError, match="_native.so cannot be loaded"):
        load_session(llama_artifact)
    native.library.cache_clear()


def token_after(model, slots, mask, position=7):
    """Inputs of one token whose cache holds zeros."""
    past = {
        i.name: np.zeros((1, i.shape[1], slots, i.shape[3]), np.float32)
        for i in model.get_inputs()
        if i.name.startswith("past")
    }
    mask = np.array([mask], np.int64)
    return past | {
        "input_ids": np.array([[7]]),
        "position_ids": np.array([[position]]),
        "attention_mask": mask,
    }


@pytest.mark.parametrize(
    ("slots", "mask", "message"),
    [
        (5, [1] * 8, "the cache has 5 slots, attention_mask says that 7 are filled"),
        (7, [1, 1, 1, 0, 1, 1, 1, 1], "padding must be on the left"),
    ],
)
def test_a_mask_that_does_not_fit(llama_artifact, slots, mask, message):
    model = open_plain(llama_artifact.path / MODEL, library=True)
    with pytest.raises(InvalidArgument, match=message):
        model.run(None, token_after(model, slots, mask))


def test_a_weight_of_another_shape(llama_artifact, tmp_path):
    def narrow(model):
        for tensor in model.graph.initializer:
            if tensor.name.endswith("layers.1.mlp.up_proj.weight"):
                tensor.dims[0] //= 2
                for entry in tensor.external_data:
                    if entry.key == "length":
                        entry.value = str(int(entry.value) // 2)

    model = open_plain(edited(llama_artifact, tmp_path, narrow), library=True)
    with pytest.raises(InvalidArgument, match="SparseGatedMLP: up does not fit: expected .96 64"):
        model.run(None, token_after(model, 7, [1] * 8))


def test_positions_beyond_the_model(tiny_opt, tmp_path):
    """OPT's table of positions has an end: no answer comes from outside of it."""
    artifact = compiled(tiny_opt, tmp_path / "artifact")
    for library in (False, True):
        model = open_plain(artifact.path / MODEL, library)
        with pytest.raises(Exception, match="out of (data )?bounds"):
            model.run(None, token_after(model, 3, [1] * 4, position=64))


def test_an_overflow_is_named(llama_artifact, tiny_llama):
    session = load_session(llama_artifact)
    session.check_finite = True
    ids, cache = tiny_llama.ids(1, 6), session.new_cache(1)
    for begin, end in ((0, 4), (4, 5)):
        session.step(ids[:, begin:end], cache)
    cache.tensors[2][:, :, 1] = float("inf")  # keys of layer 1
    with pytest.raises(NumericsError, match="token 6 are not finite: .*layer 1"):
        session.step(ids[:, 5:], cache)
