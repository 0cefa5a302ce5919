"""transformers' auto classes know artifacts once `shadowc` is imported.

`AutoModelForCausalLM.from_pretrained(artifact)`, `pipeline` and everything built on them then work.
transformers takes seconds to import, so `import shadowc` does not: it registers when the module
that holds the auto classes is imported, or at once where that has happened.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

_MODULE = "transformers.models.auto.modeling_auto"


def register() -> None:
    """Make the auto classes know artifacts."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from shadowc.runtime.config import MODEL_TYPE, ShadowcConfig
    from shadowc.runtime.model import ShadowcForCausalLM

    AutoConfig.register(MODEL_TYPE, ShadowcConfig, exist_ok=True)
    AutoModelForCausalLM.register(ShadowcConfig, ShadowcForCausalLM, exist_ok=True)


def register_when_imported() -> None:
    """Call `register` as soon as the auto classes exist."""
    if _MODULE in sys.modules:
        register()
    else:
        sys.meta_path.insert(0, _AfterImport())


class _AfterImport(MetaPathFinder):
    """Finds the one module as ever, and calls `register` after it ran."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, its loader extended; None for every other module."""
        if name != _MODULE:
            return None
        spec = PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            run = loader.exec_module

            def then_register(module: ModuleType) -> None:
                sys.meta_path.remove(self)
                run(module)
                register()

            loader.exec_module = then_register
        return spec
