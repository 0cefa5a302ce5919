"""The artifact directory: what `compile` writes and a runtime loads.

    manifest.json               schema, model, policy, target, versions, sha256 + size of every file
    config.json, tokenizer ...         Hugging Face files of the model
    model*.safetensors                 packed weights, once; above a size in shards with an index
                                       (ONNX targets: weights*.safetensors, see `weights_stem`)
    predictor.safetensors              predictor, mean scores, and keep sets that never change
    programs/*.json                    what the target runs
    programs/*.pt2                     packages for C++, machine code without weights (on request)
    kernels/sm_NN/*                    compiled kernels (CUDA targets)
    report.json                        what was measured on this artifact

Safetensors, JSON and images of kernels only, and packages that Python never loads. The manifest
names no path outside the directory and no code to import. Loading checks schema, sizes and hashes
before anything is used: SECURITY.md.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from torch import Tensor

from shadowc import foreign, stored
from shadowc.directory import (
    NEW,
    atomic_directory,
    check_space,
    locked,
    recover,
    replace_text,
    sha256,
    write_synced,
)
from shadowc.errors import ArtifactError
from shadowc.foreign import damaged
from shadowc.manifest import check_manifest
from shadowc.stored import MAX_SHARD_SIZE, Stored

SCHEMA = 2
MANIFEST, REPORT = "manifest.json", "report.json"
NO_NATIVE = "SHADOWC_NO_NATIVE"
"""Environment variable: 1 refuses artifacts that bring machine code."""
PREDICTOR_PREFIXES = ("predictor.", "keep.", "scores.")
_ATTEMPTS = 3
_MALFORMED = (ArtifactError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
_REST = 16 << 20
"""Bytes left for what has no size before it is written: tokenizer, kernels, report."""


class Place:
    """A directory that is kept open, so that its number is given to no other meanwhile.

    Raises:
        OSError: If there is none.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECTORY)

    def is_at(self, path: Path) -> bool:
        """Whether a path names it."""
        return os.path.samestat(os.fstat(self._descriptor), path.stat())

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk, checked.

    Attributes:
        path: Its directory.
        manifest: What it says of itself.
        place: The directory itself, whatever its path names by now.
    """

    path: Path
    manifest: dict[str, Any]
    place: Place | None = field(default=None, compare=False)

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, memory-mapped: one copy, shared with the page cache."""
        names = [name for name in self.manifest["files"] if name.endswith(".safetensors")]
        seen: set[str] = set()
        for name in names:
            found = foreign.tensors_in(self.path, name)
            if twice := seen & found.keys():
                raise damaged(self.path / name, "tensors that no other file has", sorted(twice)[0])
            seen |= found.keys()
        loaded: dict[str, Tensor] = {}
        for name in names:
            try:
                loaded |= stored.load([self.path / name])
            except Exception as error:  # safetensors has errors of its own
                raise damaged(self.path / name, "a file of safetensors", error) from error
        return loaded

    @property
    def weight_bytes(self) -> int:
        """Size of the files of the weights, without the predictor's."""
        pattern = f"{weights_stem(self.manifest['target'])}*.safetensors"
        files = self.manifest["files"].items()
        return int(sum(f["bytes"] for name, f in files if PurePosixPath(name).match(pattern)))

    def programs(self) -> dict[str, dict[str, Any]]:
        """The programs' JSON by name."""
        names = [name for name in self.manifest["files"] if name.startswith("programs/")]
        return {
            PurePosixPath(name).stem: self._object(name)
            for name in sorted(names)
            if name.endswith(".json")
        }

    def report(self) -> dict[str, Any]:
        """What was measured on this artifact."""
        return self._object(REPORT)

    def _object(self, name: str) -> dict[str, Any]:
        """The JSON object of a file, which is what the manifest says."""
        text = foreign.read(self.path, name)
        if hashlib.sha256(text).hexdigest() != self.manifest["files"][name]["sha256"]:
            raise damaged(self.path / name, "what was opened", "another content")
        value = foreign.loads(text, self.path / name)
        if not isinstance(value, dict):
            raise damaged(self.path / name, "a JSON object", type(value).__name__)
        return value

    @contextlib.contextmanager
    def unreplaced(self) -> Iterator[None]:
        """Read files in the block: what is not found or not right there may be another artifact's.

        Raises:
            ArtifactError: If another artifact has taken its place by the end of the block.
        """
        try:
            yield
        except (ArtifactError, OSError):
            self.check_current()
            raise
        self.check_current()

    @contextlib.contextmanager
    def reopened(self, name: str) -> Iterator[None]:
        """As `unreplaced`, for one file that is read long after all were checked: it is again."""
        with self.unreplaced():
            foreign.check_content(self.path, name, self.manifest["files"].get(name))
            yield

    def check_current(self) -> None:
        """Raise unless it is still what was opened: after its files were read, not only checked.

        Raises:
            ArtifactError: If another artifact has taken its place.
        """
        try:
            same = self.place is not None and self.place.is_at(self.path)
            same = same and _lasting(_manifest(self.path)) == _lasting(self.manifest)
        except (OSError, *_MALFORMED):
            same = False
        if not same:
            raise _replaced(self.path)


def weights_stem(target: str) -> str:
    """How the names of a target's files of weights begin.

    An ONNX artifact's config has the checkpoint's model type, which runtimes ask for: its packed
    weights must not be found by those that would take them for the checkpoint's.
    """
    return "weights" if target.startswith("onnx-") else "model"


def write_artifact(
    target: Path,
    *,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Stored],
    programs: Mapping[str, Mapping[str, Any]],
    report: Mapping[str, Any],
    pretrained: Any,
    more: Callable[[Path], None] = lambda directory: None,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Callable[[int, int], object] = lambda written, total: None,
) -> Artifact:
    """Write an artifact, whole or not at all, with one tensor in memory at a time.

    Args:
        target: Where; an artifact already there is replaced.
        manifest: What it shall say of itself, without the files.
        tensors: Packed weights, predictor and keep sets by name.
        programs: Programs as JSON, by name.
        report: What was measured while compiling; written last.
        pretrained: Objects with `save_pretrained`: the model's config, its generation config,
            tokenizer.
        more: Writes what the target needs besides, and checks what is there.
        max_shard_size: Most bytes of weights in a file.
        progress: Called with the bytes of tensors that are written, and with those of all.

    Returns:
        The artifact.

    Raises:
        ArtifactError: If it cannot be written, or will not fit on the disk.
    """
    total = sum(tensor.nbytes for tensor in tensors.values())
    texts = {name: json.dumps(program, allow_nan=False) for name, program in programs.items()}
    needed = total + sum(map(len, texts.values())) + _REST
    check_space(target, needed, error=ArtifactError)
    written = 0

    def advance(size: int) -> None:
        nonlocal written
        written += size
        progress(written, total)

    with atomic_directory(target, marker=MANIFEST, error=ArtifactError) as new:
        try:
            for item in pretrained:
                item.save_pretrained(new)
        except Exception as error:
            if "os error" not in str(error):
                raise
            raise OSError(str(error)) from error  # tokenizers hides it in its own
        small = {k: v for k, v in tensors.items() if k.startswith(PREDICTOR_PREFIXES)}
        large = {k: v for k, v in tensors.items() if k not in small}
        stem = weights_stem(manifest["target"])
        hashes = stored.save(
            new, stem, large, max_shard_size=max_shard_size, advance=advance, finite=True
        )
        hashes |= stored.save(new, "predictor", small, advance=advance)
        (new / "programs").mkdir()
        for name, text in texts.items():
            (new / "programs" / f"{name}.json").write_text(text)
        more(new)
        (new / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        files = {}
        for path in sorted(path for path in new.rglob("*") if path.is_file()):
            name = path.relative_to(new).as_posix()
            digest = hashes.get(name) or sha256(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": digest}
        foreign.check_listing(new, files, MANIFEST)  # what would be refused is not written
        foreign.check_hugging_face(new, files)
        full = {"schema": SCHEMA, **manifest, "files": files}
        text = sealed(full)
        (new / MANIFEST).write_text(text)
    return Artifact(target, json.loads(text), Place(target))


def sealed(manifest: dict[str, Any]) -> str:
    """The text of a manifest, its checksum brought up to date."""
    manifest["checksum"] = foreign.seal(manifest)
    return json.dumps(manifest, indent=2, allow_nan=False) + "\n"


def update_report(
    artifact: Artifact,
    section: str,
    value: Mapping[str, Any],
    draw: Callable[[Artifact], Mapping[str, str]] = lambda artifact: {},
) -> None:
    """Add or replace one section of the report, and its hash in the manifest, in one step.

    The manifest is what decides: the new report waits beside the old one until the manifest names
    it, and `open_artifact` finishes or removes what a kill leaves. What others added stays.

    Args:
        artifact: The artifact; its manifest is changed too.
        section: Name of the section.
        value: What was measured, as plain JSON values.
        draw: Makes files that no manifest names, by name, of the new report.

    Raises:
        ArtifactError: If another artifact has taken its place since it was opened.
        OSError: If it cannot be written.
    """
    root = artifact.path
    with locked(root):
        _finish_report(root)
        now = Artifact(root, _manifest(root))
        if _lasting(now.manifest) != _lasting(artifact.manifest):
            raise _replaced(root)
        report = now.report() | {section: dict(value)}
        new = root / f"{REPORT}{NEW}"
        write_synced(new, json.dumps(report, indent=2) + "\n")
        now.manifest["files"][REPORT] = {"bytes": new.stat().st_size, "sha256": sha256(new)}
        try:
            replace_text(root / MANIFEST, sealed(now.manifest))
        except BaseException:
            _finish_report(root)
            raise
        new.replace(root / REPORT)
        artifact.manifest.update(files=now.manifest["files"], checksum=now.manifest["checksum"])
        for name, text in draw(artifact).items():
            replace_text(root / name, text)


def _finish_report(root: Path) -> None:
    """Bring the change of a report that was interrupted to its end; the directory is `locked`."""
    new = root / f"{REPORT}{NEW}"
    if new.is_symlink() or not new.is_file():
        return
    entry = _manifest(root)["files"][REPORT]
    if entry["bytes"] == new.stat().st_size and entry["sha256"] == sha256(new):
        new.replace(root / REPORT)
    else:
        new.unlink()


def _manifest(root: Path) -> dict[str, Any]:
    """The manifest as it is now, unchecked."""
    return foreign.read_object(root, MANIFEST)


def _lasting(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest without what reports change."""
    files = {name: entry for name, entry in manifest["files"].items() if name != REPORT}
    return {**manifest, "files": files, "checksum": None}


def _replaced(root: Path) -> ArtifactError:
    return ArtifactError(
        f"{root} was replaced by another artifact meanwhile",
        expected="the one that was opened",
        fix="do it again with the one that is there now",
    )


def _state(root: Path) -> list[tuple[int, ...] | None]:
    """What changes when an artifact is replaced, or its report."""

    def of(path: Path) -> tuple[int, ...] | None:
        try:
            found = path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino, found.st_ctime_ns

    return [of(root / name) for name in (MANIFEST, REPORT, f"{REPORT}{NEW}")]


def _steady(check: Callable[[Path], Artifact]) -> Callable[[str | Path], Artifact]:
    """Check again what was replaced, or whose report was changed, while it was checked."""

    @functools.wraps(check)
    def opened(path: str | Path) -> Artifact:
        root = Path(path)
        recover(root)
        for attempt in range(_ATTEMPTS):
            last = attempt == _ATTEMPTS - 1  # nobody changes what is locked
            before = _state(root)
            with contextlib.ExitStack() as held:
                try:
                    if last:
                        held.enter_context(locked(root))
                        with contextlib.suppress(*_MALFORMED):
                            _finish_report(root)
                        before = _state(root)
                    artifact, place = check(root), Place(root)
                except (ArtifactError, OSError):
                    if not last:
                        with contextlib.suppress(OSError, *_MALFORMED), locked(root):
                            _finish_report(root)
                    if _state(root) == before:
                        raise
                else:
                    if _state(root) == before:
                        return Artifact(root, artifact.manifest, place)
        raise ArtifactError(
            f"{root} is replaced again and again",
            expected="an artifact that stays while it is checked",
            fix="wait until nothing writes there",
        )

    return opened


def read_manifest(root: Path) -> dict[str, Any]:
    """What an artifact says of itself, checked; of its files nothing is.

    Raises:
        ArtifactError: If it is missing, of another schema or edited.
    """
    if not os.path.lexists(root / MANIFEST):
        raise ArtifactError(
            f"{root} is not an artifact",
            expected=f"a directory with {MANIFEST}",
            got="no such file",
            fix="make one with: shadowc compile --target cpu",
        )
    manifest = _manifest(root)
    if manifest.get("schema") != SCHEMA:
        raise damaged(root / MANIFEST, f"schema {SCHEMA}", manifest.get("schema"))
    if manifest.get("checksum") != foreign.seal(manifest):
        raise damaged(root / MANIFEST, "what its checksum says", "another content")
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise damaged(root / MANIFEST, "a list of files", type(files).__name__)
    foreign.check_listing(root, files, MANIFEST)
    check_manifest(root / MANIFEST, manifest)
    return manifest


@_steady
def open_artifact(path: Path) -> Artifact:
    """Check an artifact directory and read its manifest.

    Raises:
        ArtifactError: If it is missing, of another schema, or a file is missing, truncated, edited
            or outside the directory; names the file.
    """
    root = path
    manifest = read_manifest(root)
    files = manifest["files"]
    _refuse_machine_code(root, manifest)
    for name, entry in files.items():
        foreign.check_content(root, name, entry)
    needed = {REPORT, "config.json", *_weight_files(root, manifest)} - set(files)
    if needed:
        raise damaged(root / MANIFEST, f"an entry for {sorted(needed)[0]}", "none")
    foreign.check_listed(root, files, MANIFEST)
    foreign.check_hugging_face(root, files)
    return Artifact(root, manifest)


def _refuse_machine_code(root: Path, manifest: Mapping[str, Any]) -> None:
    """Raise if an artifact brings machine code and the user wants none."""
    if os.environ.get(NO_NATIVE, "0") in ("", "0"):
        return
    if found := foreign.brings_machine_code(manifest):
        raise ArtifactError(
            f"{root / found[0]} holds machine code, which you do not want",
            expected="an artifact without any, such as one of the targets cpu (without "
            "--aot-inductor) and onnx-cpu",
            got=found[0],
            fix=f"leave out --no-native ({NO_NATIVE}=1) if you trust who made it",
        )


def _weight_files(root: Path, manifest: Mapping[str, Any]) -> set[str]:
    """Names of the files that must hold weights."""
    whole = f"{weights_stem(manifest['target'])}.safetensors"
    index = f"{whole}.index.json"
    if index not in manifest["files"]:
        return {whole}
    found = foreign.read_object(root, index).get("weight_map")
    if not isinstance(found, dict) or not found:
        raise damaged(root / index, "an index of shards", found)
    return {foreign.check_name(root, name, index) for name in found.values()}
