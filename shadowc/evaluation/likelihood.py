"""Log-likelihoods of text under an artifact's own masks, for tasks and word perplexity.

A request is a context and a continuation, both as token ids. With a mask that is refreshed, every
token but the first runs masked; with one mask for each prompt, the context is the prompt. Either
way the mask of a token depends on no later token.

Word perplexity is that of lm-evaluation-harness: exp(- sum of log-likelihoods / number of words),
over documents each on its own, after BOS, in windows that predict every token once. Words are what
whitespace separates, so models with different tokenizers can be compared; perplexity per token
cannot do that. BOS is never scored; the harness's own `hf` model (0.4.13) scores one that the
tokenizer adds, after another, unless it is told `add_bos_token=False`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shadowc.evaluation.masks import teacher_forced
from shadowc.models import LoadedModel
from shadowc.runtime.session import Session

#: Token ids of a context, not empty, and of what follows it.
Request = tuple[list[int], list[int]]

BATCH_LOGITS = 1 << 21


@torch.inference_mode()
def log_likelihoods(
    session: Session,
    requests: Sequence[Request],
    *,
    dense: bool = False,
    rows: int | None = None,
    track: Any = iter,
) -> list[tuple[float, bool]]:
    """Score continuations, each after its context.

    Args:
        session: The artifact.
        requests: Contexts and continuations.
        dense: Run every unit instead.
        rows: Requests to run at once; None: as many as keep the logits small. With one mask for
            each prompt they run one by one.
        track: Wraps the batches to show progress.

    Returns:
        For each request the continuation's log-likelihood in nats, and whether it is what greedy
        decoding gives.
    """
    found: dict[int, tuple[float, bool]] = {}
    one = not dense and session.policy.refresh == 0
    for group in track(list(_groups(requests, 1 if one else rows, session.shape.vocab))):
        texts = [[*requests[index][0], *requests[index][1]][:-1] for index in group]
        longest = max(map(len, texts))
        # Padding on the right: nothing in front of it sees it.
        ids = torch.tensor([text + [0] * (longest - len(text)) for text in texts])
        decodes = len(requests[group[0]][0]) if one else 1
        results = teacher_forced(session, ids, prompt=longest if dense else decodes)
        for row, index in enumerate(group):
            context, continuation = requests[index]
            start = len(context) - 1
            logits = results["logits"][row, start : start + len(continuation)]
            found[index] = _score(logits, torch.tensor(continuation))
    return [found[index] for index in range(len(requests))]


def _score(logits: Tensor, ids: Tensor) -> tuple[float, bool]:
    """Sum of the log-probabilities of `ids` [T] in [T, V], and whether all are the likeliest."""
    chosen = logits.log_softmax(-1).gather(1, ids[:, None])
    return float(chosen.sum(dtype=torch.float64)), bool((logits.argmax(-1) == ids).all())


def _groups(requests: Sequence[Request], rows: int | None, vocab: int) -> Iterator[list[int]]:
    """Indices of requests that run together: the longest first, so that padding is short."""
    lengths = [len(context) + len(continuation) for context, continuation in requests]
    order = sorted(range(len(requests)), key=lambda index: -lengths[index])
    while order:
        most = rows or max(1, BATCH_LOGITS // (lengths[order[0]] * vocab))
        yield order[:most]
        order = order[most:]


def rolling_windows(ids: Sequence[int], prefix: int, length: int) -> list[Request]:
    """Requests that predict every token once, in inputs of at most `length` tokens.

    As in lm-evaluation-harness: the first input begins with `prefix`; every other one begins with
    the last token that was predicted, but for the last one, which takes as much context as fits.
    """
    first = list(ids[:length])
    found = [([prefix], first)] if first else []
    for start in range(length, len(ids), length):
        end = min(start + length, len(ids))
        found.append((list(ids[end - length - 1 : start]), list(ids[start:end])))
    return found


def prefix_token(loaded: LoadedModel) -> int:
    """What a text without context is conditioned on: BOS, or EOS where there is none."""
    bos, eos = loaded.tokenizer.bos_token_id, loaded.tokenizer.eos_token_id
    return int(eos if bos is None else bos)


def word_perplexity(
    session: Session,
    loaded: LoadedModel,
    documents: Iterable[str],
    length: int,
    *,
    dense: bool = False,
    track: Any = iter,
) -> float:
    """Perplexity per word of documents, by lm-evaluation-harness's protocol.

    Args:
        session: The artifact.
        loaded: Its tokenizer, as `as_loaded` gives it.
        documents: Texts.
        length: The longest input of a window, in tokens.
        dense: Run every unit instead.
        track: Wraps the batches to show progress.
    """
    requests: list[Request] = []
    words = 0
    for text in documents:
        ids = loaded.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        requests += rolling_windows(ids, prefix_token(loaded), length)
        words += len(re.split(r"\s+", text))
    found = log_likelihoods(session, requests, dense=dense, track=track)
    return math.exp(min(-math.fsum(value for value, _ in found) / words, 700.0))
