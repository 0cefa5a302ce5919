"""Directories that appear whole or not at all, and whose files are checked before they are used.

A directory is written beside its target and takes its place by one exchange of names. Whoever
writes holds the lock `.NAME.lock` beside it; whoever changes a file in it, or exchanges it, holds
the directory itself. Locks go with the process that holds them, so what a kill leaves behind is
known to be nobody's, and the next command removes it. Where a file system has no locks, nothing is
refused and nothing of others is removed.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import re
import shutil
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from shadowc.errors import ShadowcError

NEW = ".new"
"""Ends the name of a file that is about to take the place of another."""
_CHUNK = 1 << 22
_WRITING = ".writing-"
_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP)
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2
_held: dict[tuple[Path, int], bool] = {}  # by lock and thread


@contextlib.contextmanager
def atomic_directory(
    target: Path, *, marker: str, error: type[ShadowcError] = ShadowcError
) -> Iterator[Path]:
    """Give a temporary directory beside `target` that takes its place when the block succeeds.

    Everything is synced to disk before that; after a failure or an interrupt nothing is left and
    what was at `target` is still there. After a kill `target` is what it was or what it was to be.

    Args:
        target: Where the directory shall be. An existing one is replaced only if it is empty or
            holds `marker`, so that a mistyped --output destroys nothing.
        marker: Name of a file that such directories have.
        error: What to raise, also if another process writes there.

    Yields:
        The temporary directory to fill.
    """
    check_target(target, marker=marker, error=error)
    with only_one(target, error=error) as locked_here:
        work = None
        try:
            if locked_here:
                _tidy(target)
            prefix = f".{target.name}{_WRITING}"
            work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
            new = work / "new"
            new.mkdir()
            yield new
            for path in sorted(new.rglob("*")):
                _sync(path)
            _sync(new)
            _place(new, target)
            _sync(target.parent)
        except OSError as cause:
            raise _cannot_write(target, cause, error) from cause
        finally:
            if work is not None and (target.exists() or not (work / "old").exists()):
                shutil.rmtree(work, ignore_errors=True)


@contextlib.contextmanager
def only_one(target: Path, *, error: type[ShadowcError] = ShadowcError) -> Iterator[bool]:
    """Keep other processes from writing `target` as long as the block runs.

    It may be nested in one thread. Folders above `target` are made, and removed again if they stay
    empty.

    Args:
        target: Where something shall be written.
        error: What to raise if another process writes there, or nobody can.

    Yields:
        Whether the file system has locks.
    """
    target = target.absolute()
    lock = target.with_name(f".{target.name}.lock")
    key = (lock, threading.get_ident())
    if key in _held:
        yield _held[key]
        return
    missing = [path for path in target.parents if not path.exists()]
    descriptor = None
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            descriptor, locks = _lock(lock)
        except BlockingIOError as cause:
            raise error(
                f"another process is writing {target}",
                expected="one at a time",
                fix="wait for it, or choose another place with --output",
            ) from cause
        except OSError as cause:
            raise _cannot_write(target, cause, error) from cause
        _held[key] = locks
        try:
            yield locks
        finally:
            del _held[key]
            lock.unlink(missing_ok=True)  # while it is held: see _lock
    finally:
        if descriptor is not None:
            os.close(descriptor)
        with contextlib.suppress(OSError):
            for path in missing:
                path.rmdir()


def _lock(path: Path) -> tuple[int, bool]:
    """Make a file and lock it: its descriptor, and whether there are locks here.

    Raises:
        BlockingIOError: If another process holds it.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if _same(descriptor, path):
                return descriptor, True
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError:
            return descriptor, False
        os.close(descriptor)  # who held it has removed it since


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Be the only one that changes files of a directory, or puts another in its place.

    Raises:
        OSError: If there is no such directory.
    """
    while True:
        descriptor = os.open(directory, os.O_RDONLY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(OSError):  # no locks here
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if _same(descriptor, directory):
                yield
                return
        finally:
            os.close(descriptor)


def _same(descriptor: int, path: Path) -> bool:
    """Whether a path still names what was opened."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _place(new: Path, target: Path) -> None:
    """Put a directory where another may be."""
    if not os.path.lexists(target):
        new.rename(target)
        return
    with locked(target):
        if exchange(new, target):
            return
        old = new.with_name("old")
        try:  # a kill between these two is for `recover`
            target.rename(old)
            new.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise


def exchange(one: Path, other: Path) -> bool:
    """Exchange two names in one step, by Linux's `renameat2`; False where there is no such step."""
    sys.audit("os.rename", str(one), str(other), -1, -1)  # as of os.rename
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    names = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other))
    if libc.renameat2(*names, _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))


def recover(target: Path) -> None:
    """Finish what a kill interrupted between the two steps of a replacement, if it did.

    That can only be where the file system cannot exchange two names.
    """
    if not target.name or os.path.lexists(target) or not _works(target):
        return
    with contextlib.suppress(ShadowcError), only_one(target) as locked_here:
        if locked_here:
            _tidy(target)


def _tidy(target: Path) -> None:
    """Remove what dead processes left beside `target`, whose lock is held."""
    for work in _works(target):
        whole = (work / "old").is_dir() and (work / "new").is_dir()
        if whole and not os.path.lexists(target):
            (work / "new").rename(target)
        shutil.rmtree(work, ignore_errors=True)


def _works(target: Path) -> list[Path]:
    """The temporary directories of `target`."""
    target = target.absolute()
    name = re.compile(re.escape(f".{target.name}{_WRITING}") + r"[^.]{8}")
    try:
        return [path for path in target.parent.iterdir() if name.fullmatch(path.name)]
    except OSError:
        return []


def replace_text(path: Path, text: str) -> None:
    """Write a file, whole or not at all; of a directory that is `locked`.

    Raises:
        OSError: If it cannot be written.
    """
    new = path.with_name(path.name + NEW)
    write_synced(new, text)
    new.replace(path)


def write_synced(path: Path, text: str) -> None:
    """Write a new file and wait for the disk; remove it again if that fails.

    What has that name goes first, so that nothing is written through a link or into a pipe.
    """
    path.unlink(missing_ok=True)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        with open(os.open(path, flags, 0o666), "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        with contextlib.suppress(OSError):
            path.unlink()
        raise


def _cannot_write(target: Path, cause: OSError, error: type[ShadowcError]) -> ShadowcError:
    return error(
        f"cannot write {target}",
        expected="a writable place with enough free space",
        got=cause.strerror or cause,
        fix="free some space or choose another place with --output",
    )


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
