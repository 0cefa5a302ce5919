"""Generation that keeps a GPU busy: the next step is launched before this token is looked at.

transformers' own loop waits for every token before it prepares the next step, which costs a third
of a millisecond a token. Here a token is copied to the host while the step after it already runs.
If generation stops at that token, the step was for nothing and is taken back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from shadowc.runtime.cache import KVCache
from shadowc.runtime.session import Session


def sample_ahead(
    session: Session,
    ids: Tensor,
    cache: KVCache,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    streamer: Any = None,
) -> Tensor:
    """Greedy search or sampling, token for token what transformers' loop does.

    Args:
        session: Runs the steps.
        ids: int64 [B, T], the prompt and what the cache already holds of it; on the session's
            device, or everything but the steps runs where it is.
        cache: Of the batch, with room for `config.max_length` tokens.
        processors: Change the scores of the next token.
        criteria: Say which rows stop.
        config: `do_sample`, `max_length` and the padding token.
        streamer: Gets every token as soon as it is on the host.

    Returns:
        int64 [B, T + new tokens].
    """
    batch, length = ids.shape
    found = ids.new_zeros(batch, config.max_length)
    found[:, :length] = ids
    going = torch.ones(batch, dtype=torch.bool, device=ids.device)
    pads = any(hasattr(one, "eos_token_id") for one in criteria)
    host = _Host(batch, ids.device)

    def step(tokens: Tensor) -> Tensor:
        logits: Tensor = session.step(tokens, cache)["logits"][:, -1]
        return logits.to(copy=True, device=ids.device)  # a graph writes its own over

    logits = step(ids[:, cache.length :])
    while True:
        scores = processors(found[:, :length], logits)
        if config.do_sample:
            token = torch.multinomial(scores.softmax(-1), num_samples=1)[:, 0]
        else:
            token = scores.argmax(-1)
        if pads:
            token = token.where(going, config._pad_token_tensor.to(ids.device))
        found[:, length] = token
        length += 1
        going = going & ~criteria(found[:, :length], None)
        host.send(token, going)
        last = length == config.max_length
        if not last:
            logits = step(token[:, None])
        token_here, any_going = host.receive()
        if streamer is not None:
            streamer.put(token_here)
        if last or not any_going:
            break
    if not last:
        cache.take_back(1)
    if streamer is not None:
        streamer.end()
    return found[:, :length]


class _Host:
    """A token and whether anything goes on, copied to the host without holding up the device."""

    def __init__(self, batch: int, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        self.token = torch.zeros(batch, dtype=torch.int64, pin_memory=self.cuda)
        self.going = torch.zeros(batch, dtype=torch.bool, pin_memory=self.cuda)
        self.done = torch.cuda.Event() if self.cuda else None

    def send(self, token: Tensor, going: Tensor) -> None:
        """Start the copies."""
        self.token.copy_(token, non_blocking=True)
        self.going.copy_(going, non_blocking=True)
        if self.done is not None:
            self.done.record()

    def receive(self) -> tuple[Tensor, bool]:
        """Wait for the copies, not for what was launched after them."""
        if self.done is not None:
            self.done.synchronize()
        return self.token.clone(), bool(self.going.any())
