"""Directories that appear whole or not at all, and whose files are checked before they are used."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shadowc.errors import ShadowcError

_CHUNK = 1 << 22


@contextlib.contextmanager
def atomic_directory(
    target: Path, *, marker: str, error: type[ShadowcError] = ShadowcError
) -> Iterator[Path]:
    """Give a temporary directory beside `target` that takes its place when the block succeeds.

    Everything is synced to disk before the rename; after a failure or an interrupt nothing is left
    and what was at `target` is still there.

    Args:
        target: Where the directory shall be. An existing one is replaced only if it is empty or
            holds `marker`, so that a mistyped --output destroys nothing.
        marker: Name of a file that such directories have.
        error: What to raise.

    Yields:
        The temporary directory to fill.
    """
    check_target(target, marker=marker, error=error)
    work = None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        new, old = work / "new", work / "old"
        new.mkdir()
        yield new
        for path in sorted(new.rglob("*")):
            _sync(path)
        _sync(new)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except BaseException:
            if old.exists():
                old.rename(target)
            raise
        _sync(target.parent)
    except OSError as cause:
        raise error(
            f"cannot write {target}",
            expected="a writable place with enough free space",
            got=cause.strerror or cause,
            fix="free some space or choose another place with --output",
        ) from cause
    finally:
        if work is not None:
            shutil.rmtree(work, ignore_errors=True)


def check_target(target: Path, *, marker: str, error: type[ShadowcError] = ShadowcError) -> None:
    """Raise before long work what `atomic_directory` would raise after it.

    Args:
        target: Where the directory shall be.
        marker: Name of a file that such directories have.
        error: What to raise.
    """
    if target.exists() and not _replaceable(target, marker):
        raise error(
            f"{target} exists and is not something shadowc wrote",
            expected=f"a new directory, or one with {marker} to replace",
            fix="choose another place with --output",
        )
    parent = _parent(target)
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        raise error(
            f"cannot write {target}",
            expected=f"a directory at {parent} that you may write to",
            fix="choose another place with --output",
        )


def check_space(target: Path, size: int, *, error: type[ShadowcError] = ShadowcError) -> None:
    """Raise unless so many bytes are free where `target` shall be.

    Args:
        target: Where something shall be written; what it replaces goes only when that is done.
        size: Bytes.
        error: What to raise.
    """
    parent = _parent(target)
    free = shutil.disk_usage(parent).free
    if size > free:
        raise error(
            f"{target} does not fit on the disk",
            expected=f"{size:,} bytes ({size / 1e9:.3g} GB)",
            got=f"{free:,} ({free / 1e9:.3g} GB) free in {parent}",
            fix="free some space or choose another place with --output",
        )


def _parent(target: Path) -> Path:
    """The directory that there is above a path."""
    return next(path for path in target.absolute().parents if path.exists())


def _replaceable(target: Path, marker: str) -> bool:
    return target.is_dir() and ((target / marker).is_file() or not any(target.iterdir()))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_fingerprint(
    found: Mapping[str, Any],
    wanted: Mapping[str, Any],
    path: Path,
    *,
    error: type[ShadowcError] = ShadowcError,
) -> None:
    """Raise unless what an unfinished work depends on is what this work depends on.

    Args:
        found: By name, as it was when the work began.
        wanted: By name, as it is now.
        path: Where the work's state is.
        error: What to raise.
    """
    others = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if others:

        def named(values: Mapping[str, Any]) -> str:
            return "; ".join(f"{key} {values.get(key)}" for key in others)

        raise error(
            f"{path} was made with another {', '.join(others)}",
            expected=named(wanted),
            got=named(found),
            fix="--fresh to start over, or another --output",
        )


def sha256(path: Path) -> str:
    """Hash of a file's content, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
