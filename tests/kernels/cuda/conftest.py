"""What the tests of interpreted kernels share."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest


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
