"""What the tests of interpreted kernels share."""

import inspect
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    from triton.runtime import interpreter

    _BUILTINS: dict[object, list[str]] = {}

    def _builtins(package):
        """What the interpreter replaces: it searches all members at each call, half of its time."""
        is_builtin = interpreter.tl.core.is_builtin
        if package not in _BUILTINS:
            _BUILTINS[package] = [n for n, one in inspect.getmembers(package) if is_builtin(one)]
        return [(name, getattr(package, name)) for name in _BUILTINS[package]]

    interpreter.inspect = SimpleNamespace(**{**vars(inspect), "getmembers": _builtins})


@pytest.fixture
def interpreted_alone(request) -> Callable[[], None]:
    """Runs the file of the test in a process of its own, where Triton interprets kernels."""

    def run() -> None:
        clean = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", request.path]
        done = subprocess.run(
            command, env=clean | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout

    return run
