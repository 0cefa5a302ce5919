"""Text that appears while it is generated, and how long each token took."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import TextStreamer

from shadowc.runtime.model import ShadowcForCausalLM


class TimedStreamer(TextStreamer):  # type: ignore[misc]
    """Hands text on as soon as a word is whole, and notes when each token came.

    Args:
        tokenizer: Decodes the tokens.
        show: Called with each piece of text; None keeps silent.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], object] | None) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show = show
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        """Take the prompt, then token after token."""
        self.times.append(time.perf_counter())
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Hand on what will not change any more."""
        if self.show is not None:
            self.show(text)


def generate(
    model: ShadowcForCausalLM,
    prompt: str,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    show: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Go on from a prompt.

    Args:
        model: A loaded artifact.
        prompt: Text.
        max_new_tokens: The most tokens to generate.
        temperature: 0 takes the likeliest token, otherwise tokens are sampled.
        seed: Of the sampling.
        show: Called with the text piece by piece.

    Returns:
        `text` (without the prompt), `tokens`, `ms_per_token` (after the first new token) and
        `policy_in_effect`.

    Raises:
        LengthError: If the prompt has no tokens, or prompt and new tokens do not fit in the
            compiled length.
    """
    torch.manual_seed(seed)
    inputs = model.tokenizer(prompt, return_tensors="pt").to(model.device)
    streamer = TimedStreamer(model.tokenizer, show)
    sampling: dict[str, Any] = {"do_sample": True, "temperature": temperature}
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
    ids = model.generate(
        input_ids=inputs.input_ids,
        attention_mask=inputs.attention_mask,
        streamer=streamer,
        max_new_tokens=max_new_tokens,
        **(sampling if temperature else greedy),
    )
    new = ids[0, inputs.input_ids.shape[1] :]
    first, last = streamer.times[1], streamer.times[-1]
    return {
        "text": model.tokenizer.decode(new, skip_special_tokens=True),
        "tokens": len(new),
        "ms_per_token": 1e3 * (last - first) / max(len(new) - 1, 1),
        "policy_in_effect": model.session.policy_in_effect(1),
    }
