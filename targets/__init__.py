"""The targets, one family a file: `requires`, `lower`, and what the numbers in tables call it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING

from shadowc.errors import OptionError

if TYPE_CHECKING:
    from torch import fx

#: Target name -> the module that lowers for it. Modules are imported when they are asked for.
TARGETS = {"cpu": "shadowc.targets.cpu"}


@dataclass(frozen=True)
class Dialects:
    """A graph in the forms that a target lowers; each call gives a fresh copy.

    Attributes:
        plain: Blocks found, nothing masked.
        scored: Blocks, scores, and masks that nothing uses.
        masked: Blocks, scores, and masks applied: the semantics.
    """

    plain: Callable[[], fx.GraphModule]
    scored: Callable[[], fx.GraphModule]
    masked: Callable[[], fx.GraphModule]


def load_target(name: str) -> ModuleType:
    """The module of a target.

    Raises:
        OptionError: If there is no such target.
    """
    if name not in TARGETS:
        raise OptionError(f"unknown target {name!r}", expected=", ".join(TARGETS), got=name)
    return importlib.import_module(TARGETS[name])
