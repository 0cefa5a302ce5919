"""examples/cpp as a user builds it: without Python, the tokens are those of `shadowc run`."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shadowc
from shadowc import aot_inductor, cli
from shadowc.config import Policy
from shadowc.errors import ArtifactError, KernelError, OptionError

ROOT = Path(__file__).parents[1]
MODEL = "opt-books-15m"
HEADERS = Path("/usr/include/openssl/evp.h")

needs_cmake = pytest.mark.skipif(
    not (shutil.which("cmake") and shutil.which("c++") and HEADERS.exists()),
    reason="examples/cpp needs CMake, a C++ compiler and OpenSSL's headers (.ci/run installs them)",
)


def main(*arguments):
    """A command, in this process: its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as done:
        patch.setattr(sys, "argv", ["shadowc", *map(str, arguments)])
        cli.main()
    return done.value.code or 0


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The build directory of the example, with the kernels as an installed package has them."""
    build = tmp_path_factory.mktemp("build")
    source = ["-S", ROOT / "examples/cpp", "-B", build, f"-DSHADOWC={ROOT / 'shadowc'}"]
    options = [f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}",
               "-DCMAKE_CXX_FLAGS_RELEASE=-O1"]  # fmt: skip
    for command in (["cmake", *source, *options], ["cmake", "--build", build, "-j", "2"]):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return build


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A directory that the command line compiled with packages."""
    work = tmp_path_factory.mktemp("work")
    calibration, output = work / "calibration", work / "artifact"
    assert main("calibrate", MODEL, "--examples", 4, "--seq-len", 64, "--rank", 16,
                "--output", calibration, "--json") == 0  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:  # as usual, it compiles for twice as long
        patch.setattr(torch._inductor.config.aot_inductor, "compile_wrapper_opt_level", "O0")
        assert main("compile", calibration, "--max-seq-len", 96, "--aot-inductor",
                    "--output", output, "--json") == 0  # fmt: skip
    return output


def generate(built, artifact, ids, count):
    command = [str(built / "generate"), str(artifact), ",".join(map(str, ids)), str(count)]
    return subprocess.run(command, capture_output=True, text=True)


@needs_cmake
def test_the_same_tokens_as_python(built, artifact):
    model = shadowc.load(artifact)
    text = "It was late, and the captain looked at her for a long time before he said that"
    words = model.tokenizer(text)["input_ids"]
    for prompt in (words[:1], words):
        ids = torch.tensor([prompt])
        whole = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                               max_new_tokens=40, eos_token_id=None)  # fmt: skip
        done = generate(built, artifact, prompt, 40)
        assert done.returncode == 0, done.stderr
        assert [*map(int, done.stdout.split(","))] == whole[0, len(prompt) :].tolist()


@needs_cmake
def test_what_the_example_refuses(built, artifact, tmp_path):
    done = generate(built, artifact, [5, 6, 7], 94)
    assert (done.returncode, done.stdout) == (2, "") and "1 to 96 tokens" in done.stderr
    done = generate(built, artifact, [5, 9999], 1)
    assert (done.returncode, done.stdout) == (2, "") and "no token 9999" in done.stderr
    copy = shutil.copytree(artifact, tmp_path / "copy")
    package = copy / "programs/decode.pt2"
    content = bytearray(package.read_bytes())
    content[-1000] ^= 1
    package.write_bytes(content)
    done = generate(built, copy, [5], 1)
    assert (done.returncode, done.stdout) == (2, "") and "decode.pt2 is damaged" in done.stderr
    with pytest.raises(ArtifactError, match=r"decode.pt2 is damaged"):
        shadowc.load(copy)


@pytest.mark.parametrize("target, policy, predicts, message", [
    ("h100", Policy(0.5, 0.5), True, "is for the cpu target"),
    ("cpu", Policy(0.5, 0.5, refresh=0), True, "refresh prompt"),
    ("cpu", Policy(0.5, 0.5, refresh=4), True, "refresh 4"),
])  # fmt: skip
def test_what_has_no_packages(target, policy, predicts, message):
    with pytest.raises(OptionError, match=message):
        aot_inductor.check_options(target, policy, predicts=predicts)


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(torch._inductor.config.cpp, "cxx", (None, "no-such-compiler"))
    with pytest.raises(KernelError, match="need a C\\+\\+ compiler"):
        aot_inductor.check_options("cpu", Policy(0.5, 0.5), predicts=True)
