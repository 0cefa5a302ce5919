"""Load an artifact and generate with transformers, streamed.

python examples/generate.py artifacts/opt-books-15m-plainact-s50-cpu "It was"
"""

import sys

from transformers import TextStreamer

import shadowc


def main(path: str, prompt: str, max_new_tokens: int = 48) -> None:
    """Print the prompt and what follows."""
    model = shadowc.load(path)
    inputs = model.tokenizer(prompt, return_tensors="pt")
    streamer = TextStreamer(model.tokenizer)
    model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
