"""How much of what mattered to one request its predictor kept, with the artifact alone.

In the masked program every unit's activation is multiplied by its mask. Run with masks of ones that
ask for gradients, it gives logits of the dense model and, by one backward pass, for every token t
and unit u the first-order effect of skipping u at t:

    d loss / d mask[t, u] = sum_d g[t, u, d] * a[t, u, d]

whose absolute value is `plainact`'s score of the token. Of each layer the units with the largest
effects, as many as were kept there, are held against those that were kept.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from shadowc.evaluation.masks import teacher_forced, with_given_masks
from shadowc.runtime.session import Session

MOST_TOKENS = 256  # of a request: the gradients are fp32 [T, L, F]


def probe(session: Session, ids: Tensor, prompt: int) -> dict[str, float] | None:
    """Probe one request.

    Args:
        session: An artifact.
        ids: int64 [1, T], prompt and answer; of more than 256 tokens the last ones, as if they
            were all.
        prompt: Tokens of the prompt, at least 1, which run dense.

    Returns:
        `tokens` that were probed, `recall_heads` and `recall_neurons`, shares of the most important
        units that were kept, `recall`, their mean, and `agreement`, the share of the tokens whose
        likeliest successor is that of the dense model. None if nothing is skipped or no decoded
        token has a successor.
    """
    cut = max(ids.shape[1] - MOST_TOKENS, 0)
    ids, prompt = ids[:, cut:].cpu(), max(prompt - cut, 1)
    if not session.skips_units or ids.shape[1] - prompt < 2:
        return None
    ran = teacher_forced(session, ids, prompt=prompt)
    logits, effects = _effects(session, ids, ran["head_mask"], ran["neuron_mask"])
    decoded = slice(prompt, -1)
    found = {"tokens": float(ids.shape[1] - 1 - prompt)}
    for kind, effect in zip(("head", "neuron"), effects, strict=True):
        kept = ran[f"{kind}_mask"][0, decoded]
        first = 1 if kind == "head" else 0  # layer 0's heads always run
        found[f"recall_{kind}s"] = _recall(kept[:, first:], effect[0, decoded, first:])
    found["recall"] = (found["recall_heads"] + found["recall_neurons"]) / 2
    same = ran["logits"][:, decoded].argmax(-1) == logits[:, decoded].argmax(-1)
    return found | {"agreement": float(same.float().mean())}


def _effects(session: Session, ids: Tensor, *like: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Dense logits [1, T, V], and the effects of heads [1, T, L, H] and neurons [1, T, L, F]."""
    session = session.with_program("given_masks", with_given_masks(session.programs["masked"]))
    tokens = ids.shape[1]
    causal = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril()
    with torch.inference_mode(False), torch.enable_grad():
        ids = ids.clone()
        masks = [torch.ones(mask.shape, requires_grad=True, device=mask.device) for mask in like]
        inputs = (ids, torch.arange(tokens)[None], causal, *masks)
        logits = session.run("given_masks", *inputs)["logits"]
        loss = nn.functional.cross_entropy(logits[0, :-1], ids[0, 1:].to(logits.device))
        effects = torch.autograd.grad(loss, masks, allow_unused=True)
    found = [
        (torch.zeros_like(mask) if effect is None else effect).abs().cpu()
        for mask, effect in zip(masks, effects, strict=True)
    ]
    return logits.detach().cpu(), found


def _recall(kept: Tensor, effect: Tensor) -> float:
    """Share of the units with the largest effects, as many as were kept, that were kept.

    Args:
        kept: bool [T, L, N].
        effect: fp32 [T, L, N]; units of no effect are not wanted.
    """
    count = kept.sum(-1, keepdim=True)
    rank = effect.argsort(-1, descending=True).argsort(-1)
    best = (rank < count) & (effect > 0)
    return float((kept & best).sum() / best.sum().clamp(min=1))
