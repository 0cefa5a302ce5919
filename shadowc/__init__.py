"""shadowc: compile OPT and Llama checkpoints to run with contextual sparsity."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shadowc.auto import register_when_imported

if TYPE_CHECKING:
    from shadowc.errors import ShadowcError
    from shadowc.runtime.loading import load

__version__ = "0.1.0"
__all__ = ["ShadowcError", "__version__", "load"]

register_when_imported()


def __getattr__(name: str) -> Any:
    """Import on first use: `import shadowc` and `shadowc --help` stay quick."""
    if name == "load":
        from shadowc.runtime.loading import load

        return load
    if name == "ShadowcError":
        from shadowc.errors import ShadowcError

        return ShadowcError
    raise AttributeError(f"module 'shadowc' has no attribute {name!r}")
