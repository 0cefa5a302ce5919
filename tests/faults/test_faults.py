"""After a fault there is the old state or the new one, whole, and the next command works."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shadowc import directory
from shadowc.artifact import MANIFEST, REPORT, open_artifact, update_report
from shadowc.directory import atomic_directory, only_one, recover
from shadowc.errors import ArtifactError, ShadowcError
from shadowc.runtime.loading import load_session

STRIDE = os.environ.get("FAULTS_STRIDE", "6")  # `make faults` strikes at every operation
MARKER = "state"


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    """What the cases found, every sixth operation of the longest struck."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("cases.py")),
         str(tmp_path_factory.mktemp("faults")), STRIDE],
        capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_nothing_is_lost(cases, capsys):
    struck = {name: found for name, found in cases.items() if name.rpartition(", ")[2] in
              ("kill", "full", "interrupt")}  # fmt: skip
    with capsys.disabled():
        for name, found in struck.items():
            print(name, {key: n for key, n in found.items() if isinstance(n, int) and n})
    for name, found in struck.items():
        assert found["losses"] == [], name
        assert found["cases"] >= 2, name
    faults = ("kill", "full") if "artifact, full" in struck else ("kill",)
    for name in (f"{what}, {fault}" for what in ("artifact", "calibration") for fault in faults):
        assert struck[name]["old"] >= 2 and struck[name]["new"] >= 2, name
    if "full" not in faults:
        pytest.skip("of full and read-only disks nothing is known: none may be mounted here")
    for name in ("artifact, full", "calibration, full", "report, full", "calibrating, full"):
        assert struck[name]["refused"] >= 1, name
    assert len(cases["read-only"]["refused"]) == 4 and cases["read-only"]["state"] == 0
    assert cases["read-only"]["there"] == ["a"]


def test_what_memory_does_not_suffice_for_is_refused(cases):
    found = cases["memory"]
    assert found["losses"] == [] and found["left"] == ["target"]
    assert (
        found["refused"] >= 4 and found["done"] >= 4 and found["by"].keys() >= {"run", "calibrate"}
    )
    assert found["died"] == []


def test_weights_that_are_truncated_while_they_are_mapped(cases):
    """No program can go on with what is no longer there: the system ends it."""
    found = cases["truncated"]
    assert found["process"] == {"signal": "SIGBUS"}
    assert found["next"]["error"] == "ArtifactError"
    assert "model.safetensors" in found["next"]["text"]


def fork(work):
    """Run something that only touches files in a process of its own."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        work()
        code = 0
    finally:
        os._exit(code)


def write(target, state, pause=lambda: None):
    with atomic_directory(target, marker=MARKER) as new:
        (new / MARKER).write_text(state)
        (new / "more").write_text(state)
        pause()


def state(target):
    both = {(target / name).read_text() for name in (MARKER, "more")}
    assert len(both) == 1
    return both.pop()


@pytest.mark.parametrize("by", ["reading", "writing"])
def test_a_kill_in_the_middle_of_the_swap(tmp_path, monkeypatch, by):
    """Where a file system cannot exchange names there are two steps, and a moment between them."""
    monkeypatch.setattr(directory, "exchange", lambda one, other: False)
    target = tmp_path / "target"
    write(target, "old")
    write(target, "new")
    assert state(target) == "new" and [p.name for p in tmp_path.iterdir()] == ["target"]

    def killed():
        rename, done = Path.rename, []

        def stop(self, other):
            if done:
                os.kill(os.getpid(), signal.SIGKILL)
            done.append(self)
            return rename(self, other)

        Path.rename = stop
        write(target, "newer")

    assert os.WTERMSIG(os.waitpid(fork(killed), 0)[1]) == signal.SIGKILL
    assert not target.exists()
    if by == "reading":
        recover(target)
        assert state(target) == "newer"
    else:
        write(target, "newest")
        assert state(target) == "newest"
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_a_failed_second_step_is_taken_back(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "exchange", lambda one, other: False)
    target, rename = tmp_path / "target", Path.rename
    write(target, "old")

    def fail(self, other):
        if self.name == "new":
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, other)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(ShadowcError, match="Input/output error"):
        write(target, "new")
    assert state(target) == "old" and [path.name for path in tmp_path.iterdir()] == ["target"]


def test_what_a_living_process_writes_is_not_stale(tmp_path):
    target, other = tmp_path / "deep" / "target", tmp_path / "deep" / "target.v2"
    read, end = os.pipe()
    pid = fork(lambda: write(target, "theirs", lambda: (os.write(end, b"x"), time.sleep(600))))
    try:
        os.read(read, 1)
        theirs = {path.name for path in target.parent.iterdir()}
        with pytest.raises(ShadowcError, match=r"another process is writing .*target"):
            write(target, "mine")
        with pytest.raises(ShadowcError, match="another process"), only_one(target):
            pass
        write(other, "beside it")
        assert {path.name for path in target.parent.iterdir()} == theirs | {"target.v2"}
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    write(target, "mine")
    assert state(target) == "mine" and state(other) == "beside it"
    assert {path.name for path in target.parent.iterdir()} == {"target", "target.v2"}


def test_one_lock_is_held_all_along(tmp_path):
    target = tmp_path / "made" / "target"
    with only_one(target):
        write(target, "one")
        assert (target.parent / ".target.lock").exists()
    with pytest.raises(KeyError), only_one(tmp_path / "other" / "target"):
        raise KeyError
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def none(descriptor, how):
        raise OSError(errno.ENOLCK, "No locks available")

    target = tmp_path / "target"
    write(target, "old")
    theirs = tmp_path / ".target.writing-abcdefgh"
    theirs.mkdir()
    monkeypatch.setattr(fcntl, "flock", none)
    write(target, "new")
    assert state(target) == "new" and theirs.exists()  # perhaps somebody writes there
    monkeypatch.undo()
    write(target, "newer")
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


@pytest.fixture
def one(made, tmp_path):
    return shutil.copytree(made / "one", tmp_path / "artifact")


def put(source, target):
    """Let a copy of an artifact take the place of another."""
    with atomic_directory(target, marker=MANIFEST) as new:
        shutil.copytree(source, new, dirs_exist_ok=True, copy_function=os.link)


def step(session, ids):
    return session.step(ids, session.new_cache(*ids.shape))["logits"]


def test_an_artifact_that_is_replaced_while_it_is_loaded(made, one, tiny_opt):
    def again_and_again():
        draw = random.Random(0)
        while True:
            for name in ("two", "one"):
                put(made / name, one)
                time.sleep(draw.choice((0.0, 0.02, 1.0)))

    ids = tiny_opt.ids(1, 6)
    expected = {
        name: step(load_session(open_artifact(made / name)), ids) for name in ("one", "two")
    }
    pid = fork(again_and_again)
    found = {"one": 0, "two": 0, "refused": 0}
    try:
        for _ in range(40):
            try:
                opened = open_artifact(one)
                session = load_session(opened)
            except ArtifactError as error:
                assert "was replaced" in str(error) or "again and again" in str(error), error
                found["refused"] += 1
                continue
            assert torch.equal(step(session, ids), expected[opened.manifest["name"]])
            found[opened.manifest["name"]] += 1
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert found["one"] + found["two"] > 0 and found["refused"] > 0, found
    put(made / "one", one)
    open_artifact(one)


def test_a_report_is_not_added_to_another_artifact(made, one):
    opened = open_artifact(one)
    put(made / "one", one)  # the same again: it is what was measured
    update_report(opened, "note", {"x": 1})
    assert open_artifact(one).report()["note"] == {"x": 1}
    put(made / "two", one)
    before = (one / MANIFEST).read_bytes(), (one / REPORT).read_bytes()
    with pytest.raises(ArtifactError, match="was replaced by another artifact"):
        update_report(opened, "note", {"x": 2})
    assert before == ((one / MANIFEST).read_bytes(), (one / REPORT).read_bytes())


def test_two_reports_at_once(one):
    opened = open_artifact(one)

    def add(who):
        for number in range(15):
            update_report(opened, f"{who}{number}", {"by": who})

    children = [fork(lambda who=who: add(who)) for who in "ab"]
    looked = 0
    while any(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None
              for pid in children):  # fmt: skip
        open_artifact(one)  # at every moment
        looked += 1
    assert [os.waitpid(pid, 0)[1] for pid in children] == [0, 0] and looked
    report = open_artifact(one).report()
    assert report.keys() == {"compile", *(f"{who}{n}" for who in "ab" for n in range(15))}


def test_weights_that_are_replaced_while_they_are_mapped(made, one, tiny_opt):
    ids = tiny_opt.ids(1, 6)
    session = load_session(open_artifact(one))
    before = step(session, ids)
    put(made / "two", one)
    assert torch.equal(step(session, ids), before)  # the files that it has opened are still there
    (one / "model.safetensors.new").write_bytes((made / "one/model.safetensors").read_bytes())
    (one / "model.safetensors.new").replace(one / "model.safetensors")
    assert torch.equal(step(session, ids), before)
    with pytest.raises(ArtifactError, match="model.safetensors"):
        open_artifact(one)
