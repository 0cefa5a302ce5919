"""An artifact loads only as it was written, in this process or another."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys

import pytest
import torch

import shadowc
from shadowc.artifact import MANIFEST, open_artifact, sealed, update_report, write_artifact
from shadowc.compiler import check_same_model, compile_model
from shadowc.config import Policy
from shadowc.errors import ArtifactError, CalibrationError
from shadowc.runtime.loading import load_session

POLICY = Policy(0.4, 0.5, min_neurons=2)


@pytest.fixture(scope="module")
def artifact(tiny_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("artifacts") / "tiny"
    compile_model(tiny_llama.loaded, tiny_llama.calibration, POLICY, path, max_seq_len=48)
    return path


@pytest.fixture
def copy(artifact, tmp_path):
    return shutil.copytree(artifact, tmp_path / "copy")


def logits(session, ids):
    cache = session.new_cache(*ids.shape)
    session.step(ids[:, :-2], cache)
    session.step(ids[:, -2:-1], cache)
    return session.step(ids[:, -1:], cache)["logits"]


def test_a_fresh_process_computes_the_same(tiny_llama, artifact, tmp_path):
    ids = tiny_llama.ids()
    torch.save(logits(load_session(open_artifact(artifact)), ids), tmp_path / "here.pt")
    code = f"""
import torch
from shadowc.artifact import open_artifact
from shadowc.runtime.loading import load_session
session = load_session(open_artifact({str(artifact)!r}))
ids = torch.tensor({ids.tolist()})
cache = session.new_cache(*ids.shape)
session.step(ids[:, :-2], cache)
session.step(ids[:, -2:-1], cache)
there = session.step(ids[:, -1:], cache)["logits"]
here = torch.load({str(tmp_path / "here.pt")!r})
assert torch.equal(here, there), (here - there).abs().max()
import sys
assert "transformers" not in sys.modules  # the bare step function needs torch alone
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_the_manifest_tells_what_it_is(artifact):
    manifest = json.loads((artifact / MANIFEST).read_text())
    assert manifest["policy"]["head_sparsity"] == 0.4
    assert manifest["target"] == "cpu" and manifest["dtype"] == "bfloat16"
    assert set(manifest["versions"]) >= {"shadowc", "torch", "transformers"}
    listed = {name for name in manifest["files"]}
    found = {p.relative_to(artifact).as_posix() for p in artifact.rglob("*") if p.is_file()}
    assert listed == found - {MANIFEST}
    suffixes = {os.path.splitext(name)[1] for name in found}
    assert suffixes <= {".json", ".safetensors", ".html", ".jinja"}  # nothing executable, no pickle
    report = open_artifact(artifact).report()["compile"]
    assert report["max_abs_error"] <= report["tolerance"]


@pytest.mark.parametrize("name", ["model.safetensors", "programs/decode.json", "config.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "edited"])
def test_a_damaged_file_is_named(copy, name, damage):
    path = copy / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        middle = len(content) // 2
        path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ArtifactError, match=path.name):
        open_artifact(copy)


def edit(copy, change):
    path = copy / MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(sealed(manifest))


def test_a_foreign_or_broken_manifest_is_refused(copy, tmp_path):
    with pytest.raises(ArtifactError, match="is not an artifact"):
        open_artifact(tmp_path)
    edit(copy, lambda m: m.update(schema=99))
    with pytest.raises(ArtifactError, match="schema 2"):
        open_artifact(copy)
    (copy / MANIFEST).write_text("{")
    with pytest.raises(ArtifactError, match="valid JSON"):
        open_artifact(copy)


def test_the_manifest_names_nothing_outside(copy):
    edit(copy, lambda m: m["files"].update({"../x": {"bytes": 0, "sha256": ""}}))
    with pytest.raises(ArtifactError, match="files inside the artifact"):
        open_artifact(copy)


def test_a_program_calls_only_known_operators(copy):
    from shadowc.runtime.program import Program

    value = json.loads((copy / "programs/decode.json").read_text())
    value["nodes"][0]["target"] = "os.system.default"
    with pytest.raises(ArtifactError, match="decode.json is not a program"):
        Program.from_json(value, "programs/decode.json")


def test_an_added_program_is_refused(copy):
    shutil.copy(copy / "programs/dense.json", copy / "programs/extra.json")
    with pytest.raises(ArtifactError, match="extra.json"):
        open_artifact(copy)


def test_update_report_keeps_the_artifact_valid(copy):
    artifact = open_artifact(copy)
    update_report(artifact, "note", {"x": 1})
    assert open_artifact(copy).report()["note"] == {"x": 1}


def test_a_failed_write_leaves_nothing(tiny_llama, tmp_path):
    class Full:
        def save_pretrained(self, path):
            (path / "config.json").write_text("{}")
            raise OSError(28, "No space left on device")

    target = tmp_path / "out"
    with pytest.raises(ArtifactError, match="No space left on device"):
        write_artifact(
            target,
            manifest={"target": "cpu"},
            tensors={},
            programs={},
            report={},
            pretrained=[Full()],
        )
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_keeps_the_old_artifact(copy):
    before = (copy / MANIFEST).read_text()

    class Interrupted:
        def save_pretrained(self, path):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_artifact(
            copy,
            manifest={"target": "cpu"},
            tensors={},
            programs={},
            report={},
            pretrained=[Interrupted()],
        )
    assert (copy / MANIFEST).read_text() == before
    assert [p.name for p in copy.parent.iterdir()] == ["copy"]


def test_something_else_is_not_overwritten(tiny_llama, tmp_path):
    (tmp_path / "thesis.txt").write_text("dear")
    with pytest.raises(ArtifactError, match="not something shadowc wrote"):
        write_artifact(
            tmp_path, manifest={"target": "cpu"}, tensors={}, programs={}, report={}, pretrained=[]
        )
    assert (tmp_path / "thesis.txt").read_text() == "dear"


def test_a_calibration_of_another_model_is_refused(tiny_opt, tiny_llama):
    with pytest.raises(CalibrationError, match="another shape"):
        check_same_model(tiny_opt.loaded, tiny_llama.calibration)
    from dataclasses import replace

    other = replace(tiny_opt.calibration, model={**tiny_opt.calibration.model, "fingerprint": "x"})
    with pytest.raises(CalibrationError, match="other weights"):
        check_same_model(tiny_opt.loaded, other)


def test_load_gives_a_model_with_its_tokenizer(artifact):
    model = shadowc.load(artifact)
    assert model.tokenizer.padding_side == "left"
    assert model.manifest["target"] == "cpu"
