"""examples/cpp as a user builds it: without Python, the tokens are those of `shadowc run`."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import shadowc
from shadowc import aot_inductor, cli
from shadowc.compiler import compile_model
from shadowc.config import Policy
from shadowc.errors import ArtifactError, KernelError, OptionError
from shadowc.targets import load_target

ROOT = Path(__file__).parents[1]
MODEL = "opt-books-15m"
HEADERS = Path("/usr/include/openssl/evp.h")

# As usual, it compiles for twice as long.
QUICKLY = torch._inductor.config.patch({"aot_inductor.compile_wrapper_opt_level": "O0"})
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
               "-DCMAKE_CXX_FLAGS_RELEASE=-O0"]  # fmt: skip
    for command in (["cmake", *source, *options], ["cmake", "--build", build, "-j", "2"]):
        done = subprocess.run([*map(str, command)], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "CMAKE_BUILD_TYPE:STRING=Release\n" in (build / "CMakeCache.txt").read_text()
    return build


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    """A directory that the command line compiled with packages."""
    work = tmp_path_factory.mktemp("work")
    calibration, output = work / "calibration", work / "artifact"
    assert main("calibrate", MODEL, "--examples", 4, "--seq-len", 64, "--rank", 16,
                "--output", calibration, "--json") == 0  # fmt: skip
    with QUICKLY:
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
def test_a_llama_whose_units_never_change(built, tiny_llama, tmp_path):
    """Rotary positions, gated neurons and grouped heads; keep sets are constants of the package."""
    static = dataclasses.replace(tiny_llama.calibration, predictor="static", weights={})
    policy = Policy(0.5, 0.5, min_neurons=2)
    with QUICKLY:
        made = compile_model(tiny_llama.loaded, static, policy, tmp_path / "artifact",
                             max_seq_len=32, aot_inductor=True)  # fmt: skip
    ids = tiny_llama.ids(1, 5)
    cache = (session := shadowc.load(made.path).session).new_cache(1)
    expected, token = [], ids
    for _ in range(20):
        token = session.step(token, cache)["logits"].argmax(-1)
        expected.append(int(token))
    done = generate(built, made.path, ids[0].tolist(), 20)
    assert done.returncode == 0, done.stderr
    assert [*map(int, done.stdout.split(","))] == expected


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
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["files"]["programs/decode.pt2"]
    (copy / "manifest.json").write_text(json.dumps(manifest, indent=2))
    done = generate(built, copy, [5], 1)
    assert (done.returncode, done.stdout) == (2, "") and "no packages" in done.stderr


RUN = """
import sys, torch
torch.ops.load_library(sys.argv[1])
results = []
for name, arguments in torch.load(sys.argv[2]):
    try:
        found = getattr(torch.ops.shadowc, name)(*arguments)
    except RuntimeError as error:
        found = str(error)
    results.append((found, arguments))
torch.save(results, sys.argv[3])
"""
B, C, F, H, G, D, S, L, R = 1, 40, 33, 4, 2, 8, 24, 3, 9


def calls():
    """(op, arguments) of every op, over types of matrices, for a token and for a prompt."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(dtype)

    def keep(units):
        index = torch.randperm(units, generator=generator)[None].sort().values
        return index.to(torch.int32), torch.tensor([units // 2], dtype=torch.int32)

    scores, threshold = some(B, L, F), some(L)
    yield "select", (scores, L * F // 2, 2, False)
    yield "select", (scores, L * F // 2, 0, True)
    yield "select_above", (scores, threshold)
    for dtype, T in itertools.product((torch.float32, torch.bfloat16, torch.float16), (1, 17)):
        x, residual = some(B, T, C), some(B, T, C)
        heads, neurons = (keep(H), keep(F)) if T == 1 else ((None, None), (None, None))
        wq, wk, wv = (some(n * D, C, dtype=dtype) for n in (H, G, G))
        w1, up, w2t = (some(F, C, dtype=dtype) for _ in range(3))
        yield "linear", (x, w1, None)
        yield "linear", (x, w1, some(F))
        yield "rms_norm", (x, some(C), 1e-5)
        yield "sparse_qkv", (x, wq, some(H * D), wk, None, wv, some(G * D), D, *heads)
        yield "sparse_out_proj", (some(B, T, H * D), wq, some(C), residual, D, *heads)
        yield "sparse_mlp", (x, w1, some(F), w2t, some(C), residual, "relu", True, *neurons)
        yield "sparse_gated_mlp", (x, w1, up, w2t, None, "silu", False, *neurons)
        for rotary in ((None, None), (some(B, T, D), some(B, T, D))):
            caches = [some(B, G, S, D) for _ in range(2)]
            yield "decode_attention", (
                some(B, T, H * D), some(B, T, G * D), some(B, T, G * D), *rotary, *caches,
                torch.tensor([2]), torch.tensor([5]), 0.3, *heads,
            )  # fmt: skip
        for kinds in (1, 2) if T == 1 else ():
            sets = [torch.zeros(*shape, dtype=torch.int32) for shape in ((5, B, F), (5, B)) * kinds]
            yield "choose_into", (
                x, some(R, C, dtype=dtype), some(R), [some(L * F, R, dtype=dtype)] * kinds,
                [some(L * F)] * kinds, [threshold] * kinds, sets, [0, 2][:kinds],
            )  # fmt: skip


def misfits():
    """Calls that must be refused: (op, arguments), words of the message."""
    x, weight = torch.zeros(1, 1, C), torch.zeros(F, C)
    q, kv, cache = torch.zeros(1, 2, H * D), torch.zeros(1, 2, G * D), torch.zeros(1, G, S, D)
    attention = (q, kv, kv, None, None, cache, cache, torch.tensor([0]))
    index, count = torch.zeros(1, F, dtype=torch.int32), torch.ones(1, dtype=torch.int32)
    mlp = (x, weight, None, weight, None, None)
    yield ("linear", (x, torch.zeros(F, C + 1), None)), "'x' does not fit"
    yield ("linear", (x, weight.long(), None)), "float32, bfloat16 or float16"
    yield ("linear", (x, weight, torch.zeros(F - 1))), "'bias' does not fit"
    yield ("decode_attention", (*attention, torch.tensor([S - 1]), 1.0, None, None)), "no room"
    yield ("decode_attention", (*attention, torch.tensor([-1]), 1.0, None, None)), "no room"
    yield ("sparse_mlp", (*mlp, "relu", True, index, None)), "index and count together"
    yield ("sparse_mlp", (*mlp, "tanh", True, index, count)), "activation tanh"
    yield ("sparse_mlp", (*mlp, "relu", True, index.long(), count)), "'index' is of another type"
    yield ("sparse_mlp", (*mlp, "relu", True, index, count + 1)), "a keep set is not ascending"
    yield ("select", (torch.zeros(1, L, F), L * F + 1, 0, False)), "'keep' does not fit"


@needs_cmake
def test_every_op_as_in_python(built, tmp_path):
    load_target("cpu")  # registers the ops
    wanted, refused = [*calls()], [*misfits()]
    files = tmp_path / "calls.pt", tmp_path / "results.pt"
    torch.save([*wanted, *(call for call, _ in refused)], files[0])
    library = built / "libshadowc_ops.so"
    done = subprocess.run([sys.executable, "-c", RUN, library, *files], text=True,
                          capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    results = torch.load(files[1])
    used = set()
    for (name, arguments), (found, after) in zip(wanted, results, strict=False):
        used.add(name)
        expected = getattr(torch.ops.shadowc, name)(*arguments)
        # Sums of up to 40 products, in another order for a prompt.
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        for ours, theirs in zip(after, arguments, strict=True):  # what is written in place
            if isinstance(ours, (list, torch.Tensor)):
                torch.testing.assert_close(ours, theirs)
    source = (ROOT / "kernels/cpu/libtorch/ops.cpp").read_text()
    assert used == set(re.findall(r'm\.impl\("(\w+)"', source)) and len(used) == 10
    for (_, words), (found, _) in zip(refused, results[len(wanted) :], strict=True):
        assert isinstance(found, str) and words in found, (words, found)


@pytest.mark.parametrize("target, policy, predicts, message", [
    ("h100", Policy(0.5, 0.5), True, "is for the cpu target"),
    ("cpu", Policy(0.5, 0.5, refresh=0), True, "refresh prompt"),
    ("cpu", Policy(0.5, 0.5, refresh=4), True, "refresh 4"),
])  # fmt: skip
def test_what_has_no_packages(target, policy, predicts, message):
    with pytest.raises(OptionError, match=message):
        aot_inductor.check_options(target, policy, predicts=predicts)


def test_the_command_refuses_before_it_writes(tmp_path, capsys):
    options = ("--model", MODEL, "--sparsity", 0, "--output", tmp_path / "artifact")
    assert main("compile", *options, "--target", "onnx-cpu", "--aot-inductor") == 2
    assert "is for the cpu target" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_no_compiler():
    missing = torch._inductor.config.patch("cpp.cxx", (None, "no-such-compiler"))
    with missing, pytest.raises(KernelError, match="need a C\\+\\+ compiler"):
        aot_inductor.check_options("cpu", Policy(0.5, 0.5), predicts=True)
