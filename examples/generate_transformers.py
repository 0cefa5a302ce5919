"""An artifact in transformers: auto classes, a pipeline, streaming, a padded batch, what ran.

python examples/generate_transformers.py artifacts/opt-books-15m-plainact-s50-cpu "It was"
"""

import sys

from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer, pipeline

import shadowc  # noqa: F401  (makes the auto classes know artifacts)


def main(path: str, prompt: str, max_new_tokens: int = 48) -> None:
    """Go on from the prompt, then from two at once."""
    model = AutoModelForCausalLM.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
    options = {"max_new_tokens": max_new_tokens, "do_sample": False}

    inputs = tokenizer(prompt, return_tensors="pt")
    model.generate(**inputs, **options, streamer=TextStreamer(tokenizer))

    write = pipeline("text-generation", model=model, tokenizer=tokenizer)
    for (answer,) in write([prompt, "The captain looked at her and"], batch_size=2, **options):
        print(answer["generated_text"])

    ran = model.counters()
    share = ran["neurons"] / ran["neurons_dense"]
    print(f"{ran['tokens']} tokens, {share:.0%} of the neurons", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:3])
