"""The artifact directory: what `compile` writes and a runtime loads.

    manifest.json               schema, model, policy, target, versions, sha256 + size of every file
    config.json, tokenizer ...         Hugging Face files of the model
    model.safetensors                  packed weights, once
    predictor.safetensors              predictor, mean scores, and keep sets that never change
    programs/*.json                    what the target runs
    kernels/sm_NN/*                    compiled kernels (CUDA targets)
    report.json                        what was measured on this artifact

Safetensors, JSON and images of kernels only. The manifest names no path outside the directory and
no code to import. Loading checks schema, sizes and hashes before anything is used.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from shadowc.directory import atomic_directory, sha256
from shadowc.errors import ArtifactError

SCHEMA = 1
MANIFEST, REPORT = "manifest.json", "report.json"
WEIGHTS, PREDICTOR = "model.safetensors", "predictor.safetensors"
PREDICTOR_PREFIXES = ("predictor.", "keep.", "scores.")


@dataclass(frozen=True)
class Artifact:
    """An artifact on disk, checked.

    Attributes:
        path: Its directory.
        manifest: What it says of itself.
    """

    path: Path
    manifest: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name, memory-mapped: one copy, shared with the page cache."""
        found: dict[str, Tensor] = {}
        for name in (WEIGHTS, PREDICTOR):
            if (self.path / name).exists():
                with safe_open(self.path / name, framework="pt") as file:
                    found |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        return found

    def programs(self) -> dict[str, dict[str, Any]]:
        """The programs' JSON by name."""
        return {
            path.stem: json.loads(path.read_text())
            for path in sorted((self.path / "programs").glob("*.json"))
        }

    def report(self) -> dict[str, Any]:
        """What was measured on this artifact."""
        value: dict[str, Any] = json.loads((self.path / REPORT).read_text())
        return value


def write_artifact(
    target: Path,
    *,
    manifest: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    programs: Mapping[str, Mapping[str, Any]],
    report: Mapping[str, Any],
    pretrained: Any,
    more: Callable[[Path], None] = lambda directory: None,
) -> Artifact:
    """Write an artifact, whole or not at all.

    Args:
        target: Where; an artifact already there is replaced.
        manifest: What it shall say of itself, without the files.
        tensors: Packed weights, predictor and keep sets by name.
        programs: Programs as JSON, by name.
        report: What was measured while compiling; written last.
        pretrained: Objects with `save_pretrained`: the model's config, its generation config,
            tokenizer.
        more: Writes what the target needs besides, and checks what is there.

    Returns:
        The artifact.

    Raises:
        ArtifactError: If it cannot be written.
    """
    with atomic_directory(target, marker=MANIFEST, error=ArtifactError) as new:
        try:
            for item in pretrained:
                item.save_pretrained(new)
            small = {k: v for k, v in tensors.items() if k.startswith(PREDICTOR_PREFIXES)}
            large = {k: v for k, v in tensors.items() if k not in small}
            safetensors.torch.save_file(large, new / WEIGHTS, metadata={"format": "pt"})
            if small:
                safetensors.torch.save_file(small, new / PREDICTOR, metadata={"format": "pt"})
        except Exception as error:
            if "os error" not in str(error):
                raise
            raise OSError(str(error)) from error  # safetensors and tokenizers hide it in their own
        (new / "programs").mkdir()
        for name, program in programs.items():
            (new / "programs" / f"{name}.json").write_text(json.dumps(program))
        more(new)
        (new / REPORT).write_text(json.dumps(report, indent=2) + "\n")
        files = {
            path.relative_to(new).as_posix(): {"bytes": path.stat().st_size, "sha256": sha256(path)}
            for path in sorted(new.rglob("*"))
            if path.is_file()
        }
        full = {"schema": SCHEMA, **manifest, "files": files}
        (new / MANIFEST).write_text(json.dumps(full, indent=2) + "\n")
    return Artifact(target, full)


def update_report(artifact: Artifact, section: str, value: Mapping[str, Any]) -> None:
    """Add or replace one section of the report, and its hash in the manifest, atomically each."""
    report = artifact.report() | {section: dict(value)}
    _replace_text(artifact.path / REPORT, json.dumps(report, indent=2) + "\n")
    path = artifact.path / REPORT
    artifact.manifest["files"][REPORT] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
    _replace_text(artifact.path / MANIFEST, json.dumps(artifact.manifest, indent=2) + "\n")


def _replace_text(path: Path, text: str) -> None:
    partial = path.with_suffix(".tmp")
    partial.write_text(text)
    partial.replace(path)


def open_artifact(path: str | Path) -> Artifact:
    """Check an artifact directory and read its manifest.

    Raises:
        ArtifactError: If it is missing, of another schema, or a file is missing, truncated, edited
            or outside the directory; names the file.
    """
    root = Path(path)
    try:
        manifest = json.loads((root / MANIFEST).read_text())
    except OSError as error:
        raise ArtifactError(
            f"{root} is not an artifact",
            expected=f"a directory with {MANIFEST}",
            got=error.strerror,
            fix="make one with: shadowc compile --target cpu",
        ) from error
    except ValueError as error:
        raise _damaged(root / MANIFEST, "valid JSON", error) from error
    if not isinstance(manifest, dict) or manifest.get("schema") != SCHEMA:
        got = manifest.get("schema") if isinstance(manifest, dict) else "no object"
        raise _damaged(root / MANIFEST, f"schema {SCHEMA}", got)
    files = manifest.get("files")
    if not isinstance(files, dict):
        raise _damaged(root / MANIFEST, "a list of files", type(files).__name__)
    for name, entry in files.items():
        _check_file(root, name, entry)
    needed = {WEIGHTS, REPORT, "config.json"} - set(files)
    if needed:
        raise _damaged(root / MANIFEST, f"an entry for {sorted(needed)[0]}", "none")
    for path_ in sorted((root / "programs").glob("*.json")):
        if f"programs/{path_.name}" not in files:
            raise _damaged(path_, "a file that the manifest lists", "one that it does not")
    return Artifact(root, manifest)


def _check_file(root: Path, name: str, entry: Any) -> None:
    inside = PurePosixPath(name)
    if inside.is_absolute() or ".." in inside.parts:
        raise _damaged(root / MANIFEST, "files inside the artifact", name)
    path = root / name
    try:
        size, digest = entry["bytes"], entry["sha256"]
        found = path.stat().st_size
    except OSError as error:
        raise _damaged(path, "a file of the artifact", error.strerror) from error
    except (KeyError, TypeError) as error:
        raise _damaged(root / MANIFEST, "bytes and sha256 of every file", name) from error
    if found != size:
        raise _damaged(path, f"{size} bytes", f"{found} bytes")
    if sha256(path) != digest:
        raise _damaged(path, f"sha256 {digest}", "another content")


def _damaged(path: Path, expected: object, got: object) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged or not of this version",
        expected=expected,
        got=got,
        fix="compile the artifact again",
    )
