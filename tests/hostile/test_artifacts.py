"""Thousands of damaged artifacts: each refused by name, or sound. `make fuzz` has more of them."""

from __future__ import annotations

import pytest

KINDS = ("flip", "truncate", "manifest", "json", "headers", "index", "paths", "hugging-face",
         "report", "programs", "tensors")  # fmt: skip


def test_no_kind_is_left_out(fuzz):
    assert KINDS == tuple(fuzz.KINDS)
    native = 3000  # calls in test_native.py
    assert sum(short for *_, short, _ in fuzz.KINDS.values()) + native >= 20_000


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_artifacts(fuzz, sound, kind):
    cases = fuzz.KINDS[kind][2]
    found = fuzz.run(sound, kind, cases)
    assert not found.failures, "\n".join(found.failures[:3])
    assert found.cases == cases and found.refused > cases // 5


def test_the_fuzzer_sees_what_goes_wrong(fuzz, sound, monkeypatch):
    """A crash, a hang, a read outside, a plain error and lost memory are all noticed."""
    import ctypes
    import faulthandler

    def wrong(artifact):
        number, wrong.number = wrong.number, wrong.number + 1
        if wrong.number == 1:
            return  # the sound one
        if number == 1:
            (artifact.path.parent / "outside").read_bytes()
        elif number == 2:
            raise KeyError("x")
        elif number == 3:
            while True:
                pass
        elif number == 4:
            wrong.kept = b"x" * (fuzz.BASE + (1 << 26))
        else:
            faulthandler.disable()  # pytest's traceback would look like a failure
            ctypes.string_at(0)

    def nothing(sample, rng, number):
        return False

    wrong.number = 0
    monkeypatch.setitem(fuzz.KINDS, "wrong", (nothing, wrong, 5, 5))
    found = fuzz.run(sound, "wrong", 4, workers=1)
    texts = "\n".join(found.failures)
    for sign in ("reached ['open", "KeyError", "hangs", "bytes more"):
        assert sign in texts, texts
    (crash,) = fuzz.run(sound, "wrong", 5, workers=1).failures
    assert "a crash" in crash
