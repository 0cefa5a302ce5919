"""ONNX: the export of an artifact's programs, and the library that makes its custom nodes fast."""

from __future__ import annotations

from pathlib import Path


def library_path() -> Path:
    """The library to register in a session, so that `shadowc` nodes run on native kernels.

    `session_options.register_custom_ops_library(str(shadowc.onnx.library_path()))`; without it the
    same model runs on plain operators.

    Raises:
        KernelError: If it is not built, or cannot be loaded on this platform.
    """
    from shadowc import native

    native.library()
    return native.library_file()
