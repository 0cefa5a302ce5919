"""The errors a user can meet. Each says what was expected, what was found and what to do.

Those that other runtimes would raise as ValueError are ValueErrors too: their servers know how to
answer one.
"""

from __future__ import annotations


class ShadowcError(Exception):
    """Base of every error that shadowc raises on purpose.

    Args:
        problem: One sentence that names what is wrong.
        expected: What would have been right.
        got: What was found instead.
        fix: What the user can do now.
    """

    exit_code = 2

    def __init__(
        self, problem: str, *, expected: object = None, got: object = None, fix: str | None = None
    ) -> None:
        parts = (("expected", expected), ("got", got), ("to fix", fix))
        lines = [problem, *(f"  {label}: {value}" for label, value in parts if value is not None)]
        super().__init__("\n".join(lines))
        self.problem = problem


class OptionError(ShadowcError, ValueError):
    """An option or argument is unknown or out of range."""


class ModelError(ShadowcError):
    """A model cannot be found, read or understood."""


class UnsupportedModelError(ModelError):
    """The architecture is not one that shadowc rewrites."""


class DataError(ShadowcError):
    """Text to calibrate or evaluate with is missing, empty or too short."""


class CalibrationError(ShadowcError):
    """A calibration directory is unreadable or belongs to another model."""


class PassError(ShadowcError):
    """A graph pass did not find the structure it rewrites."""


class NumericsError(ShadowcError):
    """A compiled graph does not agree with the graph it was made from."""


class ArtifactError(ShadowcError, ValueError):
    """An artifact is missing, truncated, edited or of another schema."""


class KernelError(ShadowcError):
    """A kernel was called with arguments it cannot take, or is not available here."""


class LengthError(ShadowcError, ValueError):
    """A prompt or generation does not fit in the compiled length."""


def out_of_memory(error: BaseException) -> bool:
    """Whether an error of Python, numpy, torch or the system says that memory does not suffice."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error)
    # The last is oneDNN's word for no memory for code or scratch; where it has no such product it
    # says which one.
    said = "can't allocate memory" in text or "annot allocate memory" in text
    return said or text == "could not create a primitive"
