"""Generate with onnxruntime and numpy alone: no torch, no shadowc.

python examples/onnx_plain.py ARTIFACT 51,91,20 [LIBRARY]: token ids on plain ONNX operators, or the
same on shadowc's kernels; shadowc.onnx.library_path() says where LIBRARY is.
"""

import sys
import time

import numpy as np
import onnxruntime


def main(path: str, prompt: str, library: str = "", new_tokens: int = 32) -> None:
    """Print the new token ids, and how long one took."""
    options = onnxruntime.SessionOptions()
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(f"{path}/model.onnx", options)
    past = [i for i in session.get_inputs() if i.name.startswith("past_key_values")]
    cache = {i.name: np.zeros((1, i.shape[1], 0, i.shape[3]), np.float32) for i in past}
    present = [name.replace("past_key_values", "present") for name in cache]
    ids, found, times = np.array([prompt.split(",")], np.int64), [], []
    for _ in range(new_tokens):
        began = time.perf_counter()
        length = next(iter(cache.values())).shape[2] + ids.shape[1]
        positions = np.arange(length - ids.shape[1], length)[None]
        inputs = {"input_ids": ids, "position_ids": positions}
        inputs["attention_mask"] = np.ones((1, length), np.int64)
        logits, *new = session.run(["logits", *present], inputs | cache)
        cache = dict(zip(cache, new, strict=True))
        ids = logits[:, -1:].argmax(-1)
        found.append(int(ids[0, 0]))
        times.append(time.perf_counter() - began)
    print(*found, sep=",")
    print(f"{1e3 * np.median(times[1:]):.2f} ms a token", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
