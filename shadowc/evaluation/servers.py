"""Servers that speak OpenAI's API, started and timed as a client sees them."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any


@contextmanager
def served(
    module: str, *arguments: object, environment: Mapping[str, str]
) -> Iterator[Callable[[Mapping[str, Any]], list[float]]]:
    """A server in a process of its own, from its first answer on.

    Args:
        module: What Python runs as `-m module ARGUMENTS --port PORT`.
        arguments: Its arguments, without a port.
        environment: Variables beside those of this process.

    Yields:
        What takes the fields of a completion, and gives the moment at which each chunk of its
        stream came, in seconds of `time.perf_counter`.

    Raises:
        OSError: If the server ends before it answers.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = (sys.executable, "-m", module, *map(str, arguments), "--port", str(port))
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, env=os.environ | environment, stdout=quiet, stderr=quiet)

    def ask(body: Mapping[str, Any]) -> list[float]:
        request = urllib.request.Request(
            f"{url}/v1/completions",
            json.dumps({**body, "stream": True}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return [time.perf_counter() for line in answer if b'"text":' in line]

    try:
        while True:
            try:
                urllib.request.urlopen(f"{url}/health").read()
                break
            except OSError:
                if server.poll() is not None:
                    raise
                time.sleep(0.2)
        yield ask
    finally:
        server.terminate()
        server.wait()
