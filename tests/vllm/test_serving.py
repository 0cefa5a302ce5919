"""The real vLLM, in processes of its own: what it says, what it counts, what it refuses.

Run by `make vllm`, in an environment of its own; skipped where vLLM is not installed.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shadowc.foreign import seal

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed here: see `make vllm`"
)
ROOT = Path(__file__).parents[2]
PROMPTS = (
    "It was",
    "She said that the old house",
    "The captain",
    "When the morning came, they went down to the river, " * 8,  # prefilled in several batches
)
TOKENS, LIMIT, BLOCK = 120, 256, 32


def run(*arguments, cwd, **variables):
    """Run Python on something in a process of its own."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment(**variables),
    )


def environment(**variables):
    return {
        **os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUTF8": "1",
        **variables,
    }  # fmt: skip


@pytest.fixture(scope="session")
def artifact(tmp_path_factory) -> Path:
    """Half of all units of opt-books-15m."""
    home = tmp_path_factory.mktemp("vllm")
    sizes = ("--examples", 8, "--seq-len", 64)
    made = run("-m", "shadowc", "calibrate", "opt-books-15m", *sizes, cwd=home)
    assert made.returncode == 0, made.stderr
    made = run("-m", "shadowc", "compile", "--sparsity", 0.5, "--json", cwd=home)
    assert made.returncode == 0, made.stderr
    return home / json.loads(made.stdout)["output"]


SAY = """
import sys
from shadowc.cli import app
path, new, *prompts = sys.argv[1:]
for prompt in prompts:
    arguments = ["run", path, "--prompt", prompt, "--max-new-tokens", new, "--json"]
    app(arguments, standalone_mode=False)
"""


@pytest.fixture(scope="session")
def greedy(artifact) -> dict[str, str]:
    """Prompt -> what `shadowc run` makes of it."""
    said = run("-c", SAY, artifact, TOKENS, *PROMPTS, cwd=artifact.parent)
    lines = said.stdout.splitlines()
    return {p: json.loads(line)["text"] for p, line in zip(PROMPTS, lines, strict=True)}


class Server:
    """vLLM's server of an artifact."""

    def __init__(self, artifact, log: Path, *options, **variables) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = log
        command = [
            sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(artifact),
            "--served-model-name", "artifact", "--host", "127.0.0.1", "--port", str(self.port),
            *map(str, options),
        ]  # fmt: skip
        with log.open("w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=file, cwd=log.parent, env=environment(**variables)
            )

    def wait(self, seconds: float = 900) -> bool:
        """Whether it came up; False once it has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            try:
                self.get("/health")
                return True
            except OSError:
                time.sleep(0.5)
        return False

    def get(self, path: str, body: dict | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=900) as answer:
            return answer.read().decode()

    def complete(self, prompt, tokens: int = TOKENS, **more) -> dict:
        body = {"model": "artifact", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
        return json.loads(self.get("/v1/completions", body | more))

    def counters(self) -> dict[str, float]:
        """What `/metrics` says, labels left out."""
        lines = (line for line in self.get("/metrics").splitlines() if line[:1] != "#")
        pairs = (line.rsplit(" ", 1) for line in lines)
        return {name.partition("{")[0]: float(value) for name, value in pairs}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(60)


@pytest.fixture(scope="session")
def server(artifact, beside, tmp_path_factory):
    """Room for two answers of four, so that vLLM preempts; prompts come in parts of 64 tokens."""
    home = tmp_path_factory.mktemp("server")
    (home / "metrics").mkdir()
    block = BLOCK * 10 * 2 * 320 * 4  # bytes: layers, keys and values, width, float32
    options = ("--max-model-len", LIMIT, "--block-size", BLOCK, "--kv-cache-memory-bytes",
               12 * block, "--max-num-batched-tokens", 64)  # fmt: skip
    started = Server(
        artifact,
        home / "log",
        *options,
        PROMETHEUS_MULTIPROC_DIR=str(home / "metrics"),
        VLLM_SERVER_DEV_MODE="1",
    )
    assert started.wait(), started.log.read_text()[-4000:]
    yield started
    started.stop()


@pytest.fixture(scope="session")
def answers(server):
    """Four streams at a time: prompt -> text, and what was counted for them."""
    before = server.counters()
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        found = list(pool.map(server.complete, PROMPTS))
    after = server.counters()
    counted = {name: value - before.get(name, 0) for name, value in after.items()}
    return dict(zip(PROMPTS, found, strict=True)), counted


def test_same_tokens_as_shadowc_run(answers, greedy):
    assert {prompt: said["choices"][0]["text"] for prompt, said in answers[0].items()} == greedy


def test_requests_were_preempted(answers):
    assert answers[1]["vllm:num_preemptions_total"] > 0


def test_one_request_alone(server, greedy):
    said = server.complete(PROMPTS[1])
    assert said["choices"][0]["text"] == greedy[PROMPTS[1]]


def test_stream(server, greedy):
    body = {"model": "artifact", "prompt": PROMPTS[0], "max_tokens": TOKENS, "temperature": 0}
    lines = server.get("/v1/completions", body | {"stream": True}).splitlines()
    parts = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert len(parts) > TOKENS // 2
    assert "".join(part["choices"][0]["text"] for part in parts) == greedy[PROMPTS[0]]


def test_counters(server, answers):
    found = answers[1]
    kept = found["shadowc_neurons_total"] / found["shadowc_neurons_dense_total"]
    assert 0.3 < kept < 0.9 and found["shadowc_heads_total"] < found["shadowc_heads_dense_total"]
    usage = [said["usage"] for said in answers[0].values()]
    # The last token of an answer is never fed; what was preempted was fed once more.
    assert found["shadowc_tokens_total"] > sum(use["completion_tokens"] - 1 for use in usage)
    assert found["shadowc_prompt_tokens_total"] > sum(use["prompt_tokens"] for use in usage)
    said = json.loads(server.get("/collective_rpc", {"method": "shadowc_counters"}))
    assert said["results"][0]["tokens"] == server.counters()["shadowc_tokens_total"]


def test_proof_line(server, artifact):
    log = server.log.read_text()
    assert log.count(f"{artifact.name} in vLLM: opt-books-15m, target cpu") == 1
    assert "skips 50% of heads and 50% of neurons, units by layerwise" in log


def test_logprobs_of_the_prompt(server):
    said = server.complete(PROMPTS[1], 1, echo=True, logprobs=1)["choices"][0]["logprobs"]
    found = said["token_logprobs"][1:]
    assert len(found) > 4 and all(-20 < value < 0 for value in found)


@pytest.mark.parametrize(
    "request_",
    [{"prompt": PROMPTS[0], "tokens": LIMIT + 1}, {"prompt": [5] * (LIMIT + 1), "tokens": 1}],
    ids=["answer", "prompt"],
)
def test_too_long_is_a_400_and_the_server_goes_on(server, request_):
    with pytest.raises(urllib.error.HTTPError) as caught:
        server.complete(request_["prompt"], request_["tokens"])
    assert caught.value.code == 400
    error = json.loads(caught.value.read())["error"]
    assert error["code"] == 400 and str(LIMIT) in error["message"]
    assert server.complete(PROMPTS[0], 3)["usage"]["completion_tokens"] == 3


def test_an_answer_ends_at_the_limit(server):
    said = server.complete([5] * (LIMIT - 6), 20, ignore_eos=True)
    assert said["usage"]["total_tokens"] == LIMIT
    assert said["choices"][0]["finish_reason"] == "length"


REFUSED = {
    "tensor parallel": ({"tensor_parallel_size": 2}, "--tensor-parallel-size"),
    "pipeline": ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size"),
    "lora": ({"enable_lora": True}, "--enable-lora"),
    "speculation": (
        {"speculative_config": {"method": "ngram", "num_speculative_tokens": 2}},
        "--speculative-config",
    ),
    "cache type": ({"kv_cache_dtype": "fp8_e5m2"}, "--kv-cache-dtype"),
    "longer": (
        {"max_model_len": 4096, "environment": {"VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1"}},
        "compiled length",
    ),
    "target": ({"model": "h100"}, "vLLM runs artifacts of one target"),
    "onnx": ({"model": "onnx"}, "vLLM runs artifacts of one target"),
    "refresh": ({"model": "refresh"}, "--refresh token"),
    "no artifact": ({"model": "empty"}, "is not an artifact"),
    "runner": ({"environment": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}, "model runner V2"),
    "version": ({"version": "0.31.1"}, "does not fit this version of vLLM"),
}
REFUSE = """
import json, os, sys
import vllm
from vllm.engine.arg_utils import EngineArgs
from shadowc.vllm.plugin import register
artifact, cases = sys.argv[1], json.loads(sys.argv[2])
config = EngineArgs(model=artifact).create_engine_config()
print(json.dumps([config.cache_config.enable_prefix_caching, str(config.model_config.dtype)]))
for options in cases:
    changed = options.pop("environment", {})
    os.environ |= changed
    if "version" in options:
        vllm.__version__ = options.pop("version")
        register()
    try:
        EngineArgs(**{"model": artifact, **options}).create_engine_config()
        print(json.dumps(["nothing", ""]))
    except Exception as error:
        print(json.dumps([[base.__name__ for base in type(error).__mro__], str(error)]))
    for name in changed:
        del os.environ[name]
"""


def like(artifact: Path, copy: Path, manifest=None, config=None) -> str:
    """A copy that says something else of itself."""
    shutil.copytree(artifact, copy)
    for name, change in (("manifest.json", manifest), ("config.json", config)):
        if change is not None:
            value = json.loads((copy / name).read_text())
            change(value)
            if name == "manifest.json":
                value["checksum"] = seal(value)
            (copy / name).write_text(json.dumps(value))
    return str(copy)


@pytest.fixture(scope="session")
def beside(artifact, tmp_path_factory):
    """What needs no server of ours, run while one starts and answers: by name, to be waited for."""
    home = tmp_path_factory.mktemp("beside")
    pool = ThreadPoolExecutor(1)
    yield {name: pool.submit(do, artifact, home) for name, do in BESIDE.items()}
    pool.shutdown()


def refuse(artifact: Path, home: Path):
    """What vLLM's configuration says to each case, in one process."""
    models = {
        "h100": like(artifact, home / "h100", lambda m: m.update(target="h100")),
        "refresh": like(artifact, home / "refresh", lambda m: m["policy"].update(refresh=8)),
        "onnx": like(
            artifact,
            home / "onnx",
            lambda m: m.update(target="onnx-cpu"),
            lambda c: c.update(model_type="opt", architectures=["ShadowcOnnx"]),
        ),
        "empty": like(artifact, home / "empty"),
    }
    (home / "empty" / "manifest.json").unlink()
    cases = [dict(options) for options, _ in REFUSED.values()]
    for options in cases:
        if "model" in options:
            options["model"] = models[options["model"]]
    done = run("-c", REFUSE, artifact, json.dumps(cases), cwd=home)
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    assert len(lines) == len(cases) + 1, done.stderr
    return lines[0], dict(zip(REFUSED, lines[1:], strict=True))


def tamper(artifact: Path, home: Path) -> tuple[bool, int | None, str]:
    """Whether a server of an edited artifact came up, its exit status, and what it said."""
    copy = Path(like(artifact, home / "tampered"))
    file = copy / "predictor.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    server = Server(copy, home / "log", "--kv-cache-memory-bytes", 1 << 26)
    up = server.wait()
    if up:
        server.stop()
    return up, server.process.returncode, server.log.read_text()


def example(artifact: Path, home: Path) -> subprocess.CompletedProcess:
    """The example, for two prompts."""
    return run(ROOT / "examples" / "serve_vllm.py", artifact, PROMPTS[0], PROMPTS[2], cwd=home)


BESIDE = {"refused": refuse, "tampered": tamper, "example": example}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(beside, case):
    kinds, message = beside["refused"].result()[1][case]
    assert "ValueError" in kinds, message
    assert REFUSED[case][1] in message


def test_what_is_set(beside):
    prefix_caching, dtype = beside["refused"].result()[0]
    assert prefix_caching is False and dtype == "torch.float32"


def test_tampered_file_is_refused(beside):
    up, status, log = beside["tampered"].result()
    assert not up and status != 0
    assert "ArtifactError" in log and "predictor.safetensors is damaged" in log


def test_example(beside, greedy):
    done = beside["example"].result()
    assert done.returncode == 0, done.stdout + done.stderr
    for prompt in (PROMPTS[0], PROMPTS[2]):
        assert prompt + greedy[prompt][:60] in done.stdout
    assert "shadowc_neurons_total" in done.stdout
