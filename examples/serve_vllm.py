"""vLLM serves an artifact: its server, OpenAI's client, and several streams at once.

pip install 'shadowc[vllm]', then
python examples/serve_vllm.py artifacts/opt-books-15m-plainact-s50-cpu "It was" "The captain"
"""

import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

from openai import APIConnectionError, OpenAI

PORT = 8017


def main(path: str, *prompts: str) -> None:
    """Start the server, let each prompt go on in a stream of its own, say what ran."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", path]
    command += ["--port", str(PORT), "--kv-cache-memory-bytes", "256M"]
    client = OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key="none", max_retries=0)

    def complete(prompt: str) -> str:
        stream = client.completions.create(
            model=path, prompt=prompt, max_tokens=48, temperature=0, stream=True
        )
        return prompt + "".join(part.choices[0].text for part in stream)

    with tempfile.TemporaryDirectory() as counters:  # where vLLM's processes share theirs
        environment = os.environ | {"PROMETHEUS_MULTIPROC_DIR": counters}
        server = subprocess.Popen(command, env=environment, stdout=sys.stderr)
        try:
            wait(server, client)
            with ThreadPoolExecutor(len(prompts)) as pool:
                for answer in pool.map(complete, prompts):
                    print(answer)
            metrics = client.get("../metrics", cast_to=str).splitlines()
            print(*(line for line in metrics if line.startswith("shadowc_")), sep="\n")
        finally:
            server.terminate()
            server.wait()


def wait(server: subprocess.Popen, client: OpenAI) -> None:
    """Until the server answers; its messages go to stderr."""
    while server.poll() is None:
        try:
            client.models.list()
            return
        except APIConnectionError:
            time.sleep(1)
    sys.exit("vLLM did not start")


if __name__ == "__main__":
    main(*sys.argv[1:])
