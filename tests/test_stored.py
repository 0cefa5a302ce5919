"""Weights are written shard by shard from what is mapped, and never held as a whole."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict

from shadowc import stored
from shadowc.artifact import open_artifact, sealed, weights_stem, write_artifact
from shadowc.compiler import compile_model
from shadowc.config import ModelShape, Policy
from shadowc.directory import sha256
from shadowc.errors import ArtifactError
from shadowc.runtime.loading import load_session
from shadowc.runtime.program import Program
from shadowc.runtime.session import Session
from shadowc.stored import Stored

POLICY = Policy(0.4, 0.5, min_neurons=2)


def tensors():
    """Some of every type that an artifact has, of odd sizes."""
    torch.manual_seed(0)
    types = (torch.float32, torch.bfloat16, torch.float16)
    found = {f"é.{i}.{t}": torch.randn(3 + i, 5).to(t) for i, t in enumerate(types * 3)}
    found |= {"z": torch.arange(7), "b": torch.arange(6, dtype=torch.int32).view(1, 2, 3)}
    return found | {"mask": torch.tensor([True, False]), "one": torch.tensor(0.5),
                    "none": torch.zeros(0, 4)}  # fmt: skip


def test_a_file_is_that_of_safetensors(tmp_path):
    given, seen = tensors(), []
    described = {name: Stored.of(tensor) for name, tensor in given.items()}
    hashes = stored.save(tmp_path, "model", described, advance=seen.append)
    safetensors.torch.save_file(given, tmp_path / "expected", metadata={"format": "pt"})
    assert (tmp_path / "model.safetensors").read_bytes() == (tmp_path / "expected").read_bytes()
    assert hashes == {"model.safetensors": sha256(tmp_path / "model.safetensors")}
    assert sum(seen) == sum(tensor.nbytes for tensor in given.values())


def test_shards_are_those_of_hugging_face(tmp_path):
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for path in (ours, theirs):
        path.mkdir()
    given = tensors()
    described = {name: Stored.of(tensor) for name, tensor in given.items()}
    hashes = stored.save(ours, "model", described, max_shard_size=100)
    save_torch_state_dict(given, theirs, max_shard_size=100)
    names = sorted(path.name for path in ours.iterdir())
    assert len(names) > 5 and names == sorted(path.name for path in theirs.iterdir())
    index = "model.safetensors.index.json"
    names.remove(index)
    assert json.loads((ours / index).read_text()) == json.loads((theirs / index).read_text())
    for name in names:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert hashes == {name: sha256(ours / name) for name in names}
    found = stored.load(ours / name for name in hashes)
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], value) for name, value in given.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("turned", [False, True])
def test_a_tensor_is_made_as_described(dtype, turned):
    source = torch.randn(6, 10)[:, ::2]
    described = Stored(source, dtype, turned)
    made = described.make()
    assert made.is_contiguous() and made.dtype == dtype
    assert torch.equal(made, (source.t() if turned else source).to(dtype))
    assert (described.shape, described.nbytes) == (made.shape, made.nbytes)
    assert Stored.of(made).make().data_ptr() == made.data_ptr()  # nothing to do, nothing copied


@pytest.fixture(scope="module", params=["cpu", "h100", "onnx-cpu"])
def both(request, tiny_opt, tmp_path_factory):
    """The same artifact in one file and in shards."""
    directory, sizes = tmp_path_factory.mktemp(request.param), {"whole": 10**9, "shards": 30_000}
    return [
        compile_model(
            tiny_opt.loaded, tiny_opt.calibration, POLICY, directory / name, max_seq_len=48,
            target=request.param, max_shard_size=size,
        )
        for name, size in sizes.items()
    ]  # fmt: skip


def runnable(artifact):
    """Its session; that of a GPU, which is not here, with the ops' references."""
    if artifact.manifest["target"] in ("cpu", "onnx-cpu"):
        return load_session(artifact)
    programs = {name: Program.from_json(value) for name, value in artifact.programs().items()}
    shape = ModelShape(**artifact.manifest["shape"])
    return Session(shape, POLICY, programs, artifact.tensors(), {}, 48)


def tokens(session, ids):
    cache = session.new_cache(1)
    found = ids
    for _ in range(16):
        logits = session.step(found[:, cache.length :], cache)["logits"][:, -1]
        found = torch.cat((found, logits.argmax(-1, keepdim=True)), 1)
    return found


def test_shards_give_the_same_tokens(both, tiny_opt):
    whole, shards = (open_artifact(artifact.path) for artifact in both)
    stem = weights_stem(whole.manifest["target"])
    names = [name for name in shards.manifest["files"] if name.startswith(f"{stem}-")]
    assert len(names) > 3 and f"{stem}.safetensors" in whole.manifest["files"]
    weights = whole.tensors()
    largest = max(tensor.nbytes for tensor in weights.values())
    assert all(shards.manifest["files"][n]["bytes"] < max(30_000, largest) + 4096 for n in names)
    mapped = shards.tensors()
    assert mapped.keys() == weights.keys()
    assert all(torch.equal(mapped[name], value) for name, value in weights.items())
    ids = tiny_opt.ids()[:1, :5]
    assert torch.equal(*(tokens(runnable(artifact), ids) for artifact in (whole, shards)))


@pytest.mark.parametrize("damage", ["missing", "truncated", "edited", "unlisted"])
@pytest.mark.parametrize("both", ["cpu"], indirect=True)
def test_a_damaged_shard_is_named(both, damage, tmp_path):
    copy = shutil.copytree(both[1].path, tmp_path / "copy")
    name = sorted(copy.glob("model-*"))[1].name
    content = bytearray((copy / name).read_bytes())
    (copy / name).unlink()
    if damage == "truncated":
        (copy / name).write_bytes(content[:-1])
    elif damage == "edited":
        content[-1] ^= 1
        (copy / name).write_bytes(content)
    elif damage == "unlisted":
        manifest = json.loads((copy / "manifest.json").read_text())
        del manifest["files"][name]
        (copy / "manifest.json").write_text(sealed(manifest))
    with pytest.raises(ArtifactError, match=name):
        open_artifact(copy)


def test_what_does_not_fit_is_not_begun(tmp_path, monkeypatch):
    weight = Stored(torch.zeros(1), torch.float32)
    monkeypatch.setattr(Stored, "nbytes", 40 * 10**9)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(0, 0, 10**9))
    with pytest.raises(ArtifactError, match=r"(?s)does not fit.*40,\d+.* \(40 GB\).*1 GB\) free"):
        write_artifact(
            tmp_path / "out", manifest={"target": "cpu"}, tensors={"w": weight}, programs={},
            report={}, pretrained=[],
        )  # fmt: skip
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import sys, threading, time
from pathlib import Path
import torch
from shadowc.compiler import compile_model
from shadowc.config import Policy
from shadowc.models import load_model

def anonymous():
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) * 1024

def compiled(model, output):
    loaded = load_model(model, dtype=None)
    assert loaded.model.dtype == torch.bfloat16
    compile_model(loaded, None, Policy(0.0, 0.0), Path(output), target=sys.argv[3],
                  max_seq_len=64, max_shard_size=20_000_000)

compiled(sys.argv[1], "narrow-artifact")
baseline, peak = anonymous(), 0
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.002)
threading.Thread(target=watch, daemon=True).start()
compiled(sys.argv[2], "wide-artifact")
print(peak - baseline)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
@pytest.mark.parametrize("target", ["cpu", "h100"])
def test_memory_does_not_grow_with_the_model(target, tmp_path):
    """At most two shards, and what does not depend on the weights, above a model of no size.

    The packed weights alone are eight shards; in fp32 the model is seventeen.
    """
    from transformers import OPTConfig

    from shadowc.models import load_model

    for name, hidden in (("narrow", 192), ("wide", 768)):  # wide: the layers of OPT-125M
        config = OPTConfig(
            hidden_size=hidden, ffn_dim=4 * hidden, num_hidden_layers=12, num_attention_heads=12,
            word_embed_proj_dim=hidden, vocab_size=512, max_position_embeddings=64,
        )  # fmt: skip
        config.save_pretrained(tmp_path / name)
        made = load_model(f"random:{tmp_path / name}", dtype=torch.bfloat16)
        made.model.save_pretrained(tmp_path / f"{name}-model", max_shard_size="20MB")
        made.tokenizer.save_pretrained(tmp_path / f"{name}-model")
    assert len(list((tmp_path / "wide-model").glob("model-*"))) > 8
    command = [sys.executable, "-c", MEASURE, "narrow-model", "wide-model", target]
    # Else glibc lets its threshold grow, and keeps holes of freed megabytes: 25 to 90 MB by chance.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=300, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "wide-artifact").glob("model-*"))) > 8
    slack = 30_000_000  # activations, Python's own, and the allocator's
    assert int(done.stdout) <= 2 * 20_000_000 + slack
