"""The small sound artifact that hostile ones are made of."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_fuzz() -> ModuleType:
    """The module fuzz.py, which is also a program."""
    if "hostile_fuzz" not in sys.modules:
        path = Path(__file__).with_name("fuzz.py")
        spec = importlib.util.spec_from_file_location("hostile_fuzz", path)
        assert spec is not None and spec.loader is not None
        sys.modules["hostile_fuzz"] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    return sys.modules["hostile_fuzz"]


@pytest.fixture(scope="session")
def fuzz() -> ModuleType:
    return load_fuzz()


@pytest.fixture(scope="session")
def sound(fuzz, tmp_path_factory) -> Path:
    """An artifact of 100 KB, which no test changes."""
    return fuzz.make_artifact(tmp_path_factory.mktemp("sound") / "artifact")


@pytest.fixture
def sample(fuzz, sound, tmp_path):
    """A copy to damage."""
    (tmp_path / "outside").write_bytes(b"secret")
    return fuzz.Sample.copy(sound, tmp_path / "artifact")
