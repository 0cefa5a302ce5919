"""Two artifacts of a tiny model."""

import pytest

from shadowc.artifact import write_artifact
from shadowc.compiler import compile_model
from shadowc.config import Policy
from shadowc.stored import Stored

POLICY = Policy(0.4, 0.5, min_neurons=2)


@pytest.fixture(scope="session")
def made(tiny_opt, tmp_path_factory):
    """A directory with two artifacts, `one` and `two`, with other weights."""
    folder = tmp_path_factory.mktemp("made")
    first = compile_model(
        tiny_opt.loaded, tiny_opt.calibration, POLICY, folder / "one",
        max_seq_len=32, extra={"name": "one"},
    )  # fmt: skip
    weights = {name: Stored.of(value * 1.5) if name.endswith("_t") else Stored.of(value)
               for name, value in first.tensors().items()}  # fmt: skip
    write_artifact(
        folder / "two", manifest=first.manifest | {"name": "two"}, tensors=weights,
        programs=first.programs(), report=first.report(),
        pretrained=(tiny_opt.loaded.model.config,),
    )  # fmt: skip
    return folder
