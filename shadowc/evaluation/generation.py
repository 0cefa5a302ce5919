"""Free-running generation: how far an artifact's own text stays with that of the dense model.

Teacher-forced figures hide what an error does to the tokens after it. Here both go on greedily
from the same prompts, each reading what it wrote itself. The end of the text does not stop them,
so that all continuations are of one length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shadowc.errors import LengthError
from shadowc.evaluation.likelihood import log_likelihoods
from shadowc.runtime.session import Session

PROMPTS = 8


def compare_with_dense(
    session: Session, windows: Sequence[Sequence[int]], new_tokens: int, *, track: Any = iter
) -> dict[str, Any]:
    """Continue the first halves of up to `PROMPTS` windows, sparse and dense.

    Args:
        session: The artifact.
        windows: Token ids of held-out text.
        new_tokens: N, tokens of each continuation.
        track: Wraps the prompts to show progress.

    Returns:
        `prompts`, `prompt_tokens` (of the longest prompt), `new_tokens`;
        `first_divergence`: mean number of tokens before the first that differs, at most N;
        `equal_tokens`: share of the N positions with the same token;
        `perplexity`, `dense_perplexity`: of the artifact's and of the dense continuations, both
        under the dense model.

    Raises:
        LengthError: If no prompt fits before `new_tokens` in the compiled length.
    """
    room = session.max_seq_len - new_tokens
    if room < 1:
        raise LengthError(
            "the new tokens do not fit in the compiled length",
            expected=f"at most {session.max_seq_len - 1} after a prompt of one",
            got=new_tokens,
            fix="a smaller --generate, or compile with a larger --max-seq-len",
        )
    prompts = [list(window[: max(1, min(len(window) // 2, room))]) for window in windows[:PROMPTS]]
    pairs = []
    for prompt in track(prompts):
        pairs.append(
            [continue_greedily(session, prompt, new_tokens, dense=dense) for dense in (False, True)]
        )
    equal = torch.tensor([[a == b for a, b in zip(*pair, strict=True)] for pair in pairs])
    perplexities = []
    for texts in zip(*pairs, strict=True):
        found = log_likelihoods(session, list(zip(prompts, texts, strict=True)), dense=True)
        perplexities.append(math.exp(-sum(value for value, _ in found) / equal.numel()))
    return {
        "prompts": len(prompts),
        "prompt_tokens": max(map(len, prompts)),
        "new_tokens": new_tokens,
        "first_divergence": float(equal.cumprod(dim=1).sum(dim=1).double().mean()),
        "equal_tokens": float(equal.double().mean()),
        "perplexity": perplexities[0],
        "dense_perplexity": perplexities[1],
    }


def continue_greedily(
    session: Session,
    prompt: Sequence[int],
    new_tokens: int,
    *,
    dense: bool = False,
    stop: Callable[[list[int]], bool] = lambda found: False,
) -> list[int]:
    """The likeliest next tokens, one after the other, each fed back.

    Args:
        session: The artifact.
        prompt: Token ids, at least one.
        new_tokens: The most to generate, at least one.
        dense: Run every unit instead.
        stop: Says of the tokens found so far whether they are enough.
    """
    cache = session.new_cache(1, len(prompt) + new_tokens)
    ids = torch.tensor([list(prompt)])
    found: list[int] = []
    while True:
        logits = session.step(ids, cache, program="dense" if dense else None)["logits"]
        found.append(int(logits[0, -1].argmax()))
        if len(found) == new_tokens or stop(found):
            return found
        ids = torch.tensor([found[-1:]])
