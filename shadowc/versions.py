"""Versions of what a result depends on."""

from __future__ import annotations

import contextlib
import platform
from importlib import metadata


def versions() -> dict[str, str]:
    """Names and versions for manifests and reports."""
    found = {"python": platform.python_version()}
    for package in ("shadowc", "torch", "transformers", "safetensors"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # an uninstalled checkout
            found[package] = "not installed"
    for package in ("triton", "onnx", "onnxruntime", "onnxruntime-gpu"):  # some targets need them
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
    return found
