"""transformers loads an artifact by its own means, in a process of its own, and says the same."""

from __future__ import annotations

import contextlib
import json
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

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

AUTO = """
import json, sys
{imports}
path, prompts = sys.argv[1], sys.argv[2:]
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
inputs = tokenizer(prompts, return_tensors="pt", padding=True)
ids = model.generate(**inputs, max_new_tokens=48, do_sample=False)
batch = tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1]:], skip_special_tokens=True)
write = pipeline("text-generation", path)
options = dict(max_new_tokens=48, do_sample=False, return_full_text=False)
print(json.dumps([type(model).__name__, batch, write(prompts[0], **options)[0]["generated_text"]]))
"""
NAMES = "from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline"


@pytest.mark.parametrize(
    "imports", ["import shadowc\n" + NAMES, NAMES + "\nimport shadowc"], ids=["before", "after"]
)
def test_auto_classes_and_pipeline(artifact, greedy, python, imports, tmp_path):
    done = python("-c", AUTO.format(imports=imports), artifact, *greedy, cwd=tmp_path)
    name, batch, piped = json.loads(done.stdout)
    assert name == "ShadowcForCausalLM"
    assert batch == [*greedy.values()]
    assert piped == greedy["It was"]
    proof = [line for line in done.stderr.splitlines() if line.startswith("shadowc: ")]
    assert len(proof) == 2, "one line for each load"
    assert "target cpu" in proof[0] and "50% of heads and 50% of neurons" in proof[0]


def test_without_the_package_it_is_refused(artifact, python, tmp_path):
    """And not loaded as the dense model with weights in the wrong places."""
    done = python("-c", AUTO.format(imports=NAMES), artifact, "It was", cwd=tmp_path, check=False)
    assert done.returncode == 1 and "`shadowc`" in done.stderr


def test_a_tampered_file_is_a_value_error(artifact, python, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    with (copy / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\x55")
    done = python("-c", AUTO.format(imports="import shadowc\n" + NAMES), copy, "It was",
               cwd=tmp_path, check=False)  # fmt: skip
    assert done.returncode == 1 and "ArtifactError" in done.stderr
    assert "model.safetensors is damaged" in done.stderr


def test_the_transformers_example(artifact, python, greedy):
    out = python(EXAMPLES / "generate_transformers.py", artifact, "It was",
              cwd=artifact).stdout  # fmt: skip
    assert out.count(greedy["It was"].strip()) == 2, "streamed, and of the pipeline"


def test_the_lm_eval_example(artifact, python, tmp_path):
    pytest.importorskip("lm_eval")
    rows = [
        {"goal": f"Day {i}", "sol1": "the sea", "sol2": "an old dog", "label": i % 2}
        for i in range(4)
    ]
    (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = python(EXAMPLES / "evaluate_lm_eval.py", artifact, "piqa_file", EXAMPLES,
              cwd=tmp_path).stdout  # fmt: skip
    lines = [line for line in out.splitlines() if line.startswith("piqa_file ")]
    assert [line.split()[1] for line in lines] == ["artifact", "dense"]
    assert all("acc,none=0." in line for line in lines)


class Server:
    """`shadowc serve` in a process of its own."""

    def __init__(self, artifact, log, *options):
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        command = (sys.executable, "-m", "shadowc", "serve", str(artifact), *options)
        self.log = log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [*command, "--port", str(self.port)], stdout=file, stderr=file
            )

    def wait(self):
        for _ in range(300):
            with contextlib.suppress(OSError):
                return self.get("/health")
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.2)
        raise TimeoutError(self.log.read_text())

    def get(self, path):
        with urllib.request.urlopen(f"http://localhost:{self.port}{path}", timeout=60) as answer:
            return json.loads(answer.read())

    def post(self, **body):
        """Status and text of a completion."""
        request = urllib.request.Request(
            f"http://localhost:{self.port}/v1/completions",
            json.dumps({"temperature": 0, **body}).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()


@pytest.fixture
def server(artifact, tmp_path):
    pytest.importorskip("fastapi")
    options = ("--probe-every", "2", "--probe-alarm", "0.99")
    running = Server(artifact, tmp_path / "log", *options)
    try:
        running.wait()
        yield running
    finally:
        running.process.terminate()
        running.process.wait(20)


def test_the_server_streams_refuses_and_goes_on(server, greedy):
    def stream(prompt):
        status, body = server.post(prompt=prompt, max_tokens=48, stream=True)
        lines = [line.removeprefix("data: ") for line in body.splitlines() if line]
        assert status == 200
        return "".join(json.loads(line)["choices"][0]["text"] for line in lines)

    with ThreadPoolExecutor(4) as clients:
        assert list(clients.map(stream, greedy)) == [*greedy.values()]
    for streaming in (False, True):
        status, body = server.post(prompt="It was", max_tokens=5000, stream=streaming)
        assert status == 400 and "at most 1024 tokens" in json.loads(body)["error"]["message"]
    status, body = server.post(prompt="It was", max_tokens=48)
    assert status == 200 and json.loads(body)["choices"][0]["text"] == greedy["It was"]
    (counters,) = server.get("/counters").values()
    assert counters["requests"] == 5 and counters["tokens"] == 5 * 47
    assert 0 < counters["heads"] < counters["heads_dense"]
    assert 0 < counters["probe_recall"] < 1
    log = server.log.read_text()
    assert "probe of request 4" in log and "below 0.99" in log


@pytest.mark.parametrize("options, message", [
    (("--continuous-batching",), "one request at a time"),
    (("--probe-alarm", "2"), "probe-alarm"),
    (("--no-such-option",), "No such option"),
])  # fmt: skip
def test_options_that_do_not_fit(artifact, python, options, message, tmp_path):
    pytest.importorskip("fastapi")
    done = python("-m", "shadowc", "serve", artifact, *options, cwd=tmp_path, check=False)
    assert done.returncode == 2 and message in done.stderr
