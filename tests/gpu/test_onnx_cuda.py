"""The onnx-cuda target on a GPU: what only ONNX Runtime's CUDA provider can show."""

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)
if "CUDAExecutionProvider" not in pytest.importorskip("onnxruntime").get_available_providers():
    pytest.skip("needs onnxruntime-gpu", allow_module_level=True)

from shadowc.calibration.data import calibration_examples
from shadowc.calibration.fit import FitOptions, calibrate
from shadowc.compiler import compile_model
from shadowc.config import Policy
from shadowc.errors import OptionError
from shadowc.evaluation.bench import bench
from shadowc.models import load_model
from shadowc.onnx.names import MODEL
from shadowc.runtime.loading import load
from shadowc.runtime.onnx import open_model

TYPES = {"fp16": torch.float16, "fp32": torch.float32}
#: Largest error over the largest logit: the functions round activations to the type of the weights.
TOLERANCE = {"fp16": 1e-2, "fp32": 1e-4}


@pytest.fixture(scope="module")
def books():
    loaded = load_model("opt-books-15m")
    windows = calibration_examples(loaded, "pydoc", 8, 272, 0)
    (found,) = calibrate(loaded, windows, FitOptions(("plainact",), "shadow"))
    return loaded, found, torch.tensor([windows[0].ids[:96]])


@pytest.fixture(scope="module", params=TYPES)
def artifact(request, books, tmp_path_factory):
    """Compiled, and checked on this GPU: logits, masks and 64 greedy tokens."""
    loaded, found, _ = books
    return request.param, compile_model(
        loaded, found, Policy(0.5, 0.5), tmp_path_factory.mktemp(request.param) / "artifact",
        target="onnx-cuda", dtype=TYPES[request.param], max_seq_len=256,
    )  # fmt: skip


def test_compile_checks_on_the_gpu(artifact):
    name, made = artifact
    report = made.report()["compile"]
    print(name, report)
    assert report["checked_on"] == torch.cuda.get_device_name()
    assert report["max_abs_error"] < report["tolerance"] * (1e-1 if name == "fp32" else 1)
    assert report["greedy_tokens"] == 64


@torch.inference_mode()
def test_steps_agree_with_the_functions(artifact, books):
    """Every result of 80 steps, the cache in place beside one that grows."""
    name, made = artifact
    session, ids = load(made.path).session, books[2]
    plain = open_model(made.path / MODEL, library=False, cuda=True)
    caches = [session.new_cache(1, 128) for _ in range(2)]
    addresses = [t.data_ptr() for t in caches[0].tensors]
    assert all(t.is_cuda for t in caches[0].tensors)
    differing = 0
    for first, last in ((0, 16), *((place, place + 1) for place in range(16, 96))):
        ours = session.step(ids[:, first:last], caches[0])
        theirs = session.run_grown(plain, ids[:, first:last], caches[1])
        caches[1].length += last - first
        scale = theirs["logits"].abs().max()
        error = (ours["logits"] - theirs["logits"]).abs().max() / scale
        if first:
            wrong = sum(int((ours[k] != theirs[k]).sum()) for k in ("head_keep", "neuron_keep"))
            differing += wrong
            error = error if wrong == 0 else torch.zeros(())  # other units, other logits
        assert error < TOLERANCE[name], (first, float(error))
    units = sum(ours[k].numel() for k in ("head_keep", "neuron_keep"))
    assert differing / (80 * units) < 2e-2
    assert addresses == [t.data_ptr() for t in caches[0].tensors]
    assert [t.device.type for t in caches[0].tensors] == ["cuda"] * len(addresses)
    print(name, "units that differ:", differing, "of", 80 * units)


def test_generate(artifact):
    """One row skips units, more run dense; beams move the cache."""
    _, made = artifact
    model = load(made.path)
    one = model.tokenizer("It was", return_tensors="pt").to("cuda")
    options = {"max_new_tokens": 40, "do_sample": False}
    first = model.generate(**one, **options)
    assert torch.equal(first, model.generate(**one, **options)) and first.is_cuda
    print(model.tokenizer.decode(first[0]))
    two = model.tokenizer(["It was", "The captain looked at"], return_tensors="pt", padding=True)
    assert model.session.policy_in_effect(2) == "dense (batch 2 >= 2)"
    assert model.generate(**two.to("cuda"), **options).shape[0] == 2
    model.generate(**one, **options, num_beams=3)


def test_dense_and_sparse_steps_share_a_cache(artifact, books):
    _, made = artifact
    session, ids = load(made.path).session, books[2]
    cache = session.new_cache(1, 64)
    session.step(ids[:, :16], cache)
    for place, program in enumerate((None, "dense", None, "dense"), start=16):
        logits = session.step(ids[:, place : place + 1], cache, program=program)["logits"]
    whole = session.step(ids[:, :20], session.new_cache(1, 64), program="dense")["logits"]
    assert (logits[0, -1] - whole[0, -1]).abs().max() < 0.2 * whole.abs().max()
    assert torch.isfinite(logits).all()


def test_bench(artifact):
    _, made = artifact
    found = bench(made, prompt_len=32, new_tokens=48, hugging_face=False)
    print({key: found[key] for key in ("ms_per_token", "dense_ms_per_token", "device")})
    assert found["device"] == torch.cuda.get_device_name()
    assert found["policy_in_effect"] == "sparse" and found["ms_per_token"] > 0


def test_what_is_refused(books, tmp_path):
    loaded, found, _ = books
    for options, message in (
        ({"dtype": torch.bfloat16}, "no bf16"),
        ({"dtype": torch.float16, "dense_from_batch": 4}, "for one row"),
    ):
        with pytest.raises(OptionError, match=message):
            compile_model(
                loaded, found, Policy(0.5, 0.5), tmp_path / "none", target="onnx-cuda", **options
            )
