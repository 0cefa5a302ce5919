"""The targets, one family a file: `requires`, `lower`, and what the numbers in tables call it."""

from __future__ import annotations

import importlib
from types import ModuleType

from shadowc.errors import OptionError

#: Target name -> the module that lowers for it. Modules are imported when they are asked for.
TARGETS = {"cpu": "shadowc.targets.cpu"}


def load_target(name: str) -> ModuleType:
    """The module of a target.

    Raises:
        OptionError: If there is no such target.
    """
    if name not in TARGETS:
        raise OptionError(f"unknown target {name!r}", expected=", ".join(TARGETS), got=name)
    return importlib.import_module(TARGETS[name])
