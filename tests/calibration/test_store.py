import dataclasses
import errno
import json
import os
from pathlib import Path

import pytest
import torch

from shadowc.calibration.damage import LEVELS
from shadowc.calibration.predictor import ShadowPredictor
from shadowc.calibration.quantiles import QUANTILES
from shadowc.calibration.store import (
    JSON_FILE,
    TENSOR_FILE,
    Calibration,
    load_calibration,
    save_calibration,
)
from shadowc.config import ModelShape, taps_of
from shadowc.errors import CalibrationError

SHAPE = ModelShape("llama", 3, 4, 2, 16, 32, 48, 100, 64, "silu", True)


def make(feature: str = "residual", predictor: str = "shadow") -> Calibration:
    torch.manual_seed(0)
    width = SHAPE.heads * SHAPE.head_dim if feature == "context" else SHAPE.hidden
    taps = {"shadow": (0,), "layerwise": (0, 1, 2), "static": ()}[predictor]
    weights = {
        f"{tap.layer}.{name}": torch.randn_like(value)
        for tap in (taps_of(3, taps) if taps else ())
        for name, value in ShadowPredictor(SHAPE, 5, 7, width, tap).state_dict().items()
    }
    return Calibration(
        model={"name": "tiny", "fingerprint": "0"}, shape=SHAPE, criterion="sens",
        predictor=predictor, feature=feature, taps=taps, rank=5, random_features=7, data="pydoc",
        examples=2, tokens=10, seq_len=8, seed=0, metrics={"spearman_heads": 0.5}, versions={},
        mean_head_scores=torch.rand(3, 4), mean_neuron_scores=torch.rand(3, 48),
        zero_rate=torch.rand(3, 48), head_quantiles=torch.rand(3, QUANTILES).sort().values,
        neuron_quantiles=torch.rand(3, QUANTILES).sort().values,
        head_damage=torch.rand(3, LEVELS), neuron_damage=torch.rand(3, LEVELS), weights=weights,
    )  # fmt: skip


@pytest.mark.parametrize(
    "feature, predictor",
    [
        ("residual", "shadow"),
        ("context", "shadow"),
        ("residual", "layerwise"),
        ("normed", "layerwise"),
        ("residual", "static"),
        ("context", "static"),
    ],
)
def test_round_trip(tmp_path, feature, predictor):
    saved = make(feature, predictor)
    loaded = load_calibration(save_calibration(saved, tmp_path / "deep" / "c"))
    assert loaded.summary() == saved.summary()
    assert {*loaded.tensors()} == {*saved.tensors()}
    for name, value in saved.tensors().items():
        assert torch.equal(loaded.tensors()[name], value)
    assert {path.name for path in (tmp_path / "deep" / "c").iterdir()} == {JSON_FILE, TENSOR_FILE}
    assert len(loaded.build_predictors()) == len(saved.taps)
    x = torch.randn(2, 3, saved.width)
    for here, there in zip(loaded.build_predictors(), saved.build_predictors(), strict=True):
        assert here.tap == there.tap
        for a, b in zip(here(x), there(x), strict=True):
            assert torch.equal(a, b)


def test_kinds_have_names_of_their_own():
    made = make(predictor="layerwise")
    assert made.kind == [] and make().kind == ["shadow"] and made.static().kind == ["static"]
    assert dataclasses.replace(made, predictor="shadow", taps=(0, 2)).kind == ["taps2"]
    assert made.static().build_predictors() == []


def test_an_existing_calibration_is_replaced(tmp_path):
    save_calibration(make(), tmp_path / "c")
    save_calibration(dataclasses.replace(make(), criterion="l2norm"), tmp_path / "c")
    assert load_calibration(tmp_path / "c").criterion == "l2norm"
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_another_directory_is_not_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CalibrationError, match="--output"):
        save_calibration(make(), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


@pytest.mark.parametrize("name", [JSON_FILE, TENSOR_FILE])
def test_a_missing_or_truncated_file_is_named(tmp_path, name):
    path = save_calibration(make(), tmp_path / "c") / name
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(CalibrationError, match=name):
        load_calibration(tmp_path / "c")
    path.unlink()
    with pytest.raises(CalibrationError, match=name):
        load_calibration(tmp_path / "c")


def test_one_flipped_bit_is_noticed(tmp_path):
    path = save_calibration(make(), tmp_path / "c") / TENSOR_FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=f"{TENSOR_FILE} is damaged"):
        load_calibration(tmp_path / "c")


def edit(path: Path, **changes):
    header = json.loads(path.read_text())
    for key, value in changes.items():
        header[key] = value
    path.write_text(json.dumps(header))


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 6},
        {"rank": "five"},
        {"feature": "context"},
        {"taps": [0, 2]},
        {"taps": [1]},
        {"taps": None},
        {"shape": {**SHAPE.to_json(), "layers": 4}},
        {"shape": {"layers": 3}},
        {"tensors": {"file": TENSOR_FILE}},
        {"tensors": None},
        {"invented": 1},
    ],
)
def test_an_edited_header_is_refused(tmp_path, changes):
    path = save_calibration(make(), tmp_path / "c") / JSON_FILE
    edit(path, **changes)
    with pytest.raises(CalibrationError, match=JSON_FILE):
        load_calibration(tmp_path / "c")


@pytest.mark.parametrize("content", ["[]", "null", "{}", '{"schema": 99}'])
def test_another_schema_is_refused(tmp_path, content):
    path = save_calibration(make(), tmp_path / "c") / JSON_FILE
    path.write_text(content)
    with pytest.raises(CalibrationError, match="schema"):
        load_calibration(tmp_path / "c")


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("existing", [False, True])
def test_a_failing_write_changes_nothing(tmp_path, monkeypatch, failure, existing):
    if existing:
        save_calibration(make(), tmp_path / "c")

    def fail(*_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    expected = CalibrationError if isinstance(failure, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(failure, OSError) else None):
        save_calibration(dataclasses.replace(make(), criterion="l2norm"), tmp_path / "c")
    assert [path.name for path in tmp_path.iterdir()] == (["c"] if existing else [])
    if existing:
        assert load_calibration(tmp_path / "c").criterion == "sens"


def test_a_place_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CalibrationError, match="cannot write"):
        save_calibration(make(), tmp_path / "file" / "c")
