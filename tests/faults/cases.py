"""Faults while artifacts, calibrations and reports are written; `test_faults.py` runs it.

    python cases.py FOLDER STRIDE [--json FILE]

Everything is imported and made once, and each case is a fork: so many processes would take minutes
otherwise. A fault strikes at a numbered operation on files (Python's audit events tell them): a
kill -9, a disk that is full from there on, or Ctrl-C. STRIDE is the step between two that are
tried; 1 tries all. After each, what is at the target must be the old or the new state, whole; and
the same command must then work and leave nothing else behind.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import importlib.util
import itertools
import json
import os
import resource
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import typer

from shadowc import cli, directory
from shadowc.artifact import open_artifact, update_report, write_artifact
from shadowc.calibration import checkpoint
from shadowc.calibration.data import Example
from shadowc.calibration.fit import FitOptions, calibrate, forget
from shadowc.calibration.store import load_calibration, save_calibration
from shadowc.compiler import compile_model
from shadowc.config import Policy
from shadowc.errors import ArtifactError
from shadowc.evaluation.report import save_section
from shadowc.runtime.loading import load_session
from shadowc.stored import Stored

POLICY = Policy(0.4, 0.5, min_neurons=2)
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
DISK = 40 << 20  # an artifact asks for 16 MiB beyond what it knows it needs
NEW_NAMESPACE, PRIVATE, RECURSIVE = 0x20000, 1 << 18, 1 << 14  # linux/sched.h, linux/mount.h


class Faults:
    """Strikes at the n-th change of files below a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count, self.at, self.strike = str(folder), 0, None, None
        sys.addaudithook(self.hook)

    def hook(self, event, args):
        if event == "open":
            path, _, flags = args
            if not (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = args[0]
        else:
            return
        below = os.path.isabs(path) if isinstance(path, str) else not isinstance(path, int)
        if below and not os.fspath(path).startswith(self.folder):
            return
        self.count += 1
        if self.strike and self.count == self.at:
            strike, self.strike = self.strike, None
            strike()


def child(work, *, seconds=120):
    """Run in a fork: what it returned, or the name of what ended it."""
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.close(read)
        try:
            found = work()
        except BaseException as error:
            found = {"error": type(error).__name__, "text": str(error)[:300]}
            if os.environ.get("FAULTS_DEBUG"):
                traceback.print_exc()
        with os.fdopen(write, "w") as pipe:
            json.dump(found, pipe)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status):
        return {"signal": signal.Signals(os.WTERMSIG(status)).name}
    return json.loads(text) if text else {"exit": os.waitstatus_to_exitcode(status)}


def small_disk(folder: Path, size: int) -> None:
    """Mount a disk of its own for this process alone.

    Raises:
        OSError: If it may not.
    """
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result):
        if result:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(NEW_NAMESPACE))
    check(libc.mount(b"none", b"/", None, RECURSIVE | PRIVATE, None))
    check(libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, f"size={size}".encode()))


def fill(folder: Path, left: int) -> None:
    """Leave so many bytes on a small disk."""
    free = shutil.disk_usage(folder).free
    if free > left:
        with contextlib.suppress(OSError), (folder / "filler").open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, free - left)


class World:
    """Two artifacts and two calibrations of a tiny model, and how each is written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        spec = importlib.util.spec_from_file_location(
            "c", Path(__file__).parents[1] / "conftest.py"
        )
        made = importlib.util.module_from_spec(spec)
        sys.modules["c"] = made
        spec.loader.exec_module(made)
        tiny = self.tiny = made._tiny("opt")
        self.kept = folder / "kept"
        compile_model(tiny.loaded, tiny.calibration, POLICY, self.kept, max_seq_len=32)
        self.first = open_artifact(self.kept)
        loaded = tiny.loaded
        self.pretrained = (loaded.model.config, loaded.model.generation_config, loaded.tokenizer)
        self.programs = self.first.programs()
        self.tensors = [self.first.tensors()]
        self.tensors.append({k: v.clone() for k, v in self.tensors[0].items()})
        name = next(n for n in self.tensors[1] if n.endswith("_t"))
        self.tensors[1][name] += 1

    def write(self, target: Path, which: int) -> None:
        """One of the two artifacts."""
        manifest = {
            k: v for k, v in self.first.manifest.items() if k not in ("schema", "files", "checksum")
        }
        write_artifact(
            target,
            manifest=manifest | {"which": which},
            tensors={name: Stored.of(value) for name, value in self.tensors[which].items()},
            programs=self.programs,
            report={"compile": self.first.report()["compile"]},
            pretrained=self.pretrained,
        )

    def save(self, target: Path, which: int) -> None:
        """One of two calibrations."""
        from dataclasses import replace

        save_calibration(replace(self.tiny.calibration, seed=which), target)

    def report(self, target: Path, which: int) -> None:
        """A section of the report, with the page; `which` 0 is an artifact without."""
        if which:
            layers = self.first.report()["compile"]
            save_section(open_artifact(target), "note", {"which": which, "compile": layers})
        else:
            self.write(target, 0)

    def artifact_at(self, target: Path) -> int | None:
        """Which artifact is there, whole; None if nothing is.

        Raises:
            ArtifactError: If what is there is neither.
        """
        if not target.exists():
            return None
        opened = open_artifact(target)
        which = opened.manifest["which"]
        found, wanted = opened.tensors(), self.tensors[which]
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)
        assert opened.programs() == self.programs
        return which

    def calibration_at(self, target: Path) -> int | None:
        """As `artifact_at`."""
        return load_calibration(target).seed if target.exists() else None

    def report_at(self, target: Path) -> int | None:
        """As `artifact_at`."""
        self.artifact_at(target)
        return open_artifact(target).report().get("note", {"which": 0})["which"]


def struck(world: World, faults: Faults, kind: str, fault: str, stride: int, old: bool):
    """Strike at every stride-th operation: cases, refusals, and what was lost."""
    write, at = {
        "artifact": (world.write, world.artifact_at),
        "calibration": (world.save, world.calibration_at),
        "report": (world.report, world.report_at),
    }[kind]
    found = {"cases": 0, "old": 0, "new": 0, "refused": 0, "interrupted": 0, "killed": 0,
             "losses": []}  # fmt: skip
    folder = world.folder / f"{kind}-{fault}-{int(old)}"
    folder.mkdir()
    target = folder / "target"
    before = 0 if old else None
    for number in itertools.count(1, stride):
        for left in folder.iterdir():
            shutil.rmtree(left) if left.is_dir() else left.unlink()

        def prepare():
            if old:
                write(target, 0)
            faults.count, faults.at = 0, number

        def strike():
            if fault == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif fault == "interrupt":
                raise KeyboardInterrupt
            else:
                fill(folder, 4096 * (number % 3))

        def one():
            if fault == "full":
                small_disk(folder, DISK)
            prepare()
            faults.strike = strike
            error = None
            try:
                write(target, 1)
            except (Exception, KeyboardInterrupt) as raised:
                error = type(raised).__name__
            reached, faults.strike = faults.strike is None, None
            (folder / "filler").unlink(missing_ok=True)
            if not reached:
                return {"end": True}
            return {"error": error} | (after() if fault == "full" else {})

        def after():
            """The state, then the state once the same command ran again."""
            state = at(target)
            left = {path.name for path in folder.iterdir()} - {"target"}
            write(target, 1)
            again = {path.name for path in folder.iterdir()} | {
                path.name for path in target.iterdir() if path.name.endswith(directory.NEW)
            }
            return {
                "state": state,
                "again": at(target),
                "left": sorted(left),
                "there": sorted(again),
            }

        result = child(one)
        if result.get("end"):
            break
        found["cases"] += 1
        if fault != "full":
            result |= child(after)
        where = f"{kind} {fault} at {number}: {result}"
        if "signal" in result:
            found["killed"] += 1
        elif result.get("error") == "KeyboardInterrupt":
            found["interrupted"] += 1
        elif result.get("error") in ("ArtifactError", "CalibrationError", "OSError"):
            found["refused"] += 1
        elif result.get("error"):
            found["losses"].append(where)
        if result.get("state", "?") not in (before, 1) or result.get("again") != 1:
            found["losses"].append(where)
        # Ctrl-C while the old state is removed leaves some of it to the next command.
        cleaning = fault == "interrupt" and result.get("state") == 1
        if result.get("there") != ["target"] or (
            result["left"] and fault != "kill" and not cleaning
        ):
            found["losses"].append(where)
        if fault != "kill" and not result.get("error") and result.get("state") != 1:
            found["losses"].append(where)  # it said that it was done
        found["new" if result.get("state") == 1 else "old"] += 1
    return found


def full_while_calibrating(world: World, faults: Faults, stride: int):
    """A disk that fills up while sums are written: refused, and the same command goes on."""
    checkpoint.EVERY, checkpoint.SHARE = 1, 1e9
    ids = world.tiny.ids(6, 10).tolist()
    examples = [Example(row, [True] * len(row)) for row in ids]
    options = FitOptions(("sens",), rank=4, random_features=0, batch_tokens=10)
    folder = world.folder / "calibrating"
    folder.mkdir()
    state = folder / ".c.unfinished"

    def whole(checkpoint_path):
        (made,) = calibrate(world.tiny.loaded, examples, options, checkpoint=checkpoint_path)
        return made

    def same(one, other):
        return all(torch.equal(v, other.tensors()[k]) for k, v in one.tensors().items())

    expected = whole(None)
    found = {"cases": 0, "refused": 0, "losses": []}
    for number in itertools.count(1, stride):

        def one():
            small_disk(folder, 8 << 20)
            faults.count, faults.at = 0, number
            faults.strike = lambda: fill(folder, 4096)
            error = None
            try:
                whole(state)
            except Exception as raised:
                error = type(raised).__name__
            reached, faults.strike = faults.strike is None, None
            (folder / "filler").unlink(missing_ok=True)
            going_on = state.exists()
            again = whole(state)
            forget(state)
            return {
                "end": not reached,
                "error": error,
                "same": same(expected, again),
                "going_on": going_on,
                "left": [path.name for path in folder.iterdir()],
            }

        result = child(one)
        if result.get("end") or number > 40:
            break
        found["cases"] += 1
        found["refused"] += result.get("error") == "CalibrationError"
        # At the last operation everything is written.
        if (
            not result.get("same")
            or result["left"]
            or result["error"] not in ("CalibrationError", None)
        ):
            found["losses"].append(f"calibrating at {number}: {result}")
    return found


def read_only(world: World):
    """A disk that cannot be written: refused, and what is there still loads."""
    folder = world.folder / "read-only"
    folder.mkdir()

    def one():
        small_disk(folder, DISK)
        world.write(folder / "a", 0)
        libc = ctypes.CDLL(None, use_errno=True)
        remount = 32 | 1
        assert libc.mount(b"none", os.fsencode(folder), b"tmpfs", remount, None) == 0
        refused = []
        for work in (
            lambda: world.write(folder / "a", 1),
            lambda: world.write(folder / "b", 1),
            lambda: world.save(folder / "c", 1),
            lambda: update_report(open_artifact(folder / "a"), "note", {}),
        ):
            try:
                work()
            except (ArtifactError, OSError, cli.CalibrationError) as error:
                refused.append(str(error).split("\n")[0])
        return {
            "refused": refused,
            "state": world.artifact_at(folder / "a"),
            "there": sorted(path.name for path in folder.iterdir()),
        }

    return child(one)


def without_memory(world: World, extras: tuple[int, ...]):
    """Little address space: refused in words, or the right result; what is on disk stays."""
    ids = world.tiny.ids(1, 8)
    folder = world.folder / "memory"
    folder.mkdir()

    def digest(value):
        return hashlib.sha256(value.numpy().tobytes()).hexdigest()

    def run():
        session = load_session(open_artifact(world.kept))
        cache = session.new_cache(1)
        first = session.step(ids, cache)["logits"]
        return torch.cat((first, session.step(first[:, -1].argmax(-1)[None], cache)["logits"]))

    def fit():
        rows = world.tiny.ids(8, 60).tolist()
        examples = [Example(row, [True] * len(row)) for row in rows]
        options = FitOptions(("sens",), rank=4, random_features=0, batch_tokens=480)
        (made,) = calibrate(world.tiny.loaded, examples, options)
        return made.mean_neuron_scores

    def write():
        world.write(folder / "target", 1)
        return torch.zeros(1)

    child(lambda: world.write(folder / "target", 1))
    found = {"cases": 0, "done": 0, "refused": 0, "died": [], "losses": [], "by": {}}
    for name, work in (("run", run), ("calibrate", fit), ("write", write)):
        # In a fork: memory that this process has had would be there to be used again.
        expected = child(lambda: {"digest": digest(work())})["digest"]
        for extra in extras:

            def one():
                gc.collect()
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                null = os.open(os.devnull, os.O_WRONLY)
                if not os.environ.get("FAULTS_DEBUG"):
                    os.dup2(null, 2)
                ctypes.CDLL(None).malloc_trim(0)  # what was freed is not there to be used again
                resource.setrlimit(resource.RLIMIT_AS, (used + extra, resource.RLIM_INFINITY))
                try:
                    with cli._reported(debug=False):
                        same = digest(work()) == expected
                except typer.Exit as done:
                    return {"exit": done.exit_code}
                finally:
                    resource.setrlimit(
                        resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
                    )
                return {"same": same}

            result = child(one)
            result["there"] = child(lambda: {
                "which": world.artifact_at(folder / "target"),
            })  # fmt: skip
            found["cases"] += 1
            where = f"{name} with {extra >> 10} KiB: {result}"
            if result["there"] != {"which": 1} or result.get("same") is False:
                found["losses"].append(where)
            elif result.get("same"):
                found["done"] += 1
            elif result.get("exit") == 2:
                found["refused"] += 1
                found["by"][name] = found["by"].get(name, 0) + 1
            elif "signal" in result:
                found["died"].append(where)
            else:
                found["losses"].append(where)
    child(lambda: world.write(folder / "target", 1))
    found["left"] = sorted(path.name for path in folder.iterdir())
    return found


def truncated(world: World):
    """Weights cut off in place while a process has them mapped: it ends, it says nothing wrong."""
    path = world.folder / "truncated"
    shutil.copytree(world.kept, path)
    ids = world.tiny.ids(1, 8)

    def one():
        session = load_session(open_artifact(path))
        before = session.step(ids, session.new_cache(1))["logits"]
        os.truncate(path / "model.safetensors", 4096)
        after = session.step(ids, session.new_cache(1))["logits"]
        return {"same": torch.equal(before, after)}

    return {"process": child(one), "next": child(lambda: open_artifact(path).manifest["schema"])}


def main() -> None:
    """Run all; print one JSON object."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("stride", type=int)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)  # threads do not survive a fork
    folder = options.folder.resolve()
    faults = Faults(folder)
    world = World(folder)
    stride = options.stride
    found = {}
    try:
        child(lambda: small_disk(folder, 1 << 20))["error"]
        disks = False
    except TypeError:
        disks = True
    began = time.monotonic()
    for kind in ("artifact", "calibration", "report"):
        for fault in ("kill", "full", "interrupt"):
            if fault == "full" and not disks:
                continue
            step = 1 if kind != "artifact" else stride
            found[f"{kind}, {fault}"] = struck(world, faults, kind, fault, step, old=True)
    found["new artifact, kill"] = struck(world, faults, "artifact", "kill", stride, old=False)
    if disks:
        found["calibrating, full"] = full_while_calibrating(world, faults, stride)
        found["read-only"] = read_only(world)
    found["truncated"] = truncated(world)
    extras = tuple(1 << size for size in range(14, 28, 2 if stride > 1 else 1))
    found["memory"] = without_memory(world, extras)
    found["seconds"] = round(time.monotonic() - began, 1)
    text = json.dumps(found, indent=2)
    if options.json:
        options.json.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
