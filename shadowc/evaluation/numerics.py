"""The check that ends every compile: the lowered programs against the graph they were made from."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from shadowc.config import ModelShape
from shadowc.errors import NumericsError
from shadowc.evaluation.masks import teacher_forced, with_given_masks
from shadowc.runtime.cache import KVCache
from shadowc.runtime.session import Session
from shadowc.runtime.usage import Usage
from shadowc.stored import all_finite
from shadowc.targets import Tolerances

if TYPE_CHECKING:
    from shadowc.models import LoadedModel

#: What the check runs on, with the model's own tokenizer.
TEXT = (
    "It was late in the year, and the road to the harbour was empty. She had walked for an hour "
    "before she saw the light of the old house, and somebody at the door who seemed to wait."
)
PROMPT_TOKENS = 8


@torch.inference_mode()
def check_numerics(session: Session, loaded: LoadedModel, tolerances: Tolerances) -> dict[str, Any]:
    """Compare the programs on text, token by token where they decode.

    Args:
        session: The lowered programs.
        loaded: The original model.
        tolerances: Those of the target.

    Returns:
        `max_abs_error` (decode against masked, same masks), `mask_mismatch` (share of units),
        `original_max_abs_error` (dense program against the original model), `tolerance` (in
        logits), `greedy_tokens_equal` where the target asks for it, and what ran (see
        `Usage.to_json`).

    Raises:
        NumericsError: If a difference exceeds its tolerance; names both sides. If numbers are not
            finite; names the layer.
    """
    ids = _ids(loaded, session.max_seq_len)
    tokens = ids.shape[1]
    prompt = min(PROMPT_TOKENS, tokens - 1)

    with in_float32(loaded.model), naming_overflows(loaded.model):
        original = loaded.model(input_ids=ids).logits
    session.check_finite = True
    scale = float(original.abs().max())
    dense = session.step(ids, session.new_cache(1, tokens), program="dense")["logits"].cpu()
    dense_error = float((dense[:, -1] - original[:, -1]).abs().max())
    rounded = any(_was_rounded(session, name, value) for name, value in _matrices(loaded))
    allowed = tolerances.original if rounded else tolerances.decode
    _check("dense", "original model", dense_error, allowed, scale)

    cache = session.new_cache(1, tokens)
    decoded, keeps, usage = _decode(session, ids, prompt, cache)
    if cache.lazy is not None:  # batches decode without it
        cache = session.new_cache(1, tokens)
        cache.lazy = None
        ordinary = _decode(session, ids, prompt, cache)[0]
        error = float((decoded - ordinary).abs().max())
        _check("lazy", "decode program", error, tolerances.decode, scale)

    allowed = tolerances.decode * scale
    greedy = _greedy(session, ids[:, :prompt], tolerances.greedy, allowed)
    taught = teacher_forced(session, ids, prompt=prompt)
    mismatch = 0.0
    if "head_mask" in taught:
        heads, neurons = masks_of(keeps, session.shape, prompt)
        wrong = (heads != taught["head_mask"]).sum() + (neurons != taught["neuron_mask"]).sum()
        mismatch = float(wrong) / ((heads.numel() + neurons.numel()) * (1 - prompt / tokens))
        most = mask_tolerance(session, tolerances)
        if mismatch > most:
            raise NumericsError(
                "the decode program selects other units than the masked program",
                expected=f"at most {most:.2%} of all units",
                got=f"{mismatch:.2%}",
            )
        session = session.with_program("given_masks", with_given_masks(session.programs["masked"]))
        taught = teacher_forced(session, ids, prompt=prompt, masks=(heads, neurons))
    error = float((decoded - taught["logits"][:, prompt:]).abs().max())
    _check("decode", "masked program", error, tolerances.decode, scale)
    return {
        "max_abs_error": error,
        "mask_mismatch": mismatch,
        "original_max_abs_error": dense_error,
        "tolerance": tolerances.decode * scale,
        **greedy,
        **usage.to_json(),
    }


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Let a model of half-precision weights compute in fp32, with the weights of one layer widened.

    Args:
        model: Embeddings, and modules whose only half-precision tensors are their own parameters.
    """
    narrow: dict[nn.Module, dict[str, nn.Parameter | None]] = {}

    def widen(module: nn.Module, *_: object) -> None:
        narrow[module] = dict(module._parameters)
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(value.float(), requires_grad=False)

    def restore(module: nn.Module, *_: object) -> None:
        module._parameters.update(narrow.pop(module))

    hooks = []
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            hooks.append(module.register_forward_hook(lambda _, __, rows: rows.float()))
        elif module._parameters:
            hooks.append(module.register_forward_pre_hook(widen))
            hooks.append(module.register_forward_hook(restore))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        for module in list(narrow):
            restore(module)


@contextlib.contextmanager
def naming_overflows(model: nn.Module) -> Iterator[None]:
    """Raise NumericsError where a module of the original model gives what is not finite."""

    def look(name: str, value: object) -> None:
        if isinstance(value, Tensor) and not all_finite(value):
            raise NumericsError(
                f"the activations of {name} are not finite in the original model",
                expected="finite numbers",
                got="NaN" if bool(value.isnan().any()) else "infinity",
                fix="calibrate and compile another checkpoint",
            )

    hooks = [
        module.register_forward_hook(lambda _, __, value, name=name: look(name, value))
        for name, module in model.named_modules()
        if module._parameters
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def mask_tolerance(session: Session, tolerances: Tolerances) -> float:
    """Share of units whose mask may differ.

    A unit whose score is at its threshold may fall on either side by rounding, and what it adds
    then changes what the predictors after it read, so differences grow from tap to tap
    (smollm2-135m in bf16, a tap in each of 30 layers: 0.3%).
    """
    names = session.programs["masked"].weights
    taps = {name.split(".")[1] for name in names if name.startswith("predictor.")}
    return max(tolerances.masks, min(tolerances.masks * len(taps), 0.05))


def _greedy(session: Session, prompt: Tensor, most: int, tolerance: float) -> dict[str, int]:
    """Continue a prompt by the likeliest tokens, and ask the masked program for its own of each.

    Raises:
        NumericsError: If one differs where the masked program's choice is not a tie.
    """
    begin = prompt.shape[1]
    count = min(most, session.max_seq_len - begin)
    if count < 1:
        return {}
    cache = session.new_cache(1, begin + count)
    ids = prompt
    for _ in range(count):
        logits = session.step(ids[:, cache.length :], cache)["logits"][:, -1].cpu()
        ids = torch.cat((ids, logits.argmax(-1, keepdim=True)), 1)
    taught = teacher_forced(session, ids[:, :-1], prompt=begin)["logits"][0, begin - 1 :].cpu()
    found = ids[0, begin:]
    gap = taught.amax(-1) - taught.gather(1, found[:, None])[:, 0]
    if not bool((gap <= tolerance).all()):
        first = int((gap > tolerance).nonzero()[0])
        raise NumericsError(
            f"greedy token {first + 1} is not that of the masked program",
            expected=int(taught[first].argmax()),
            got=int(found[first]),
            fix="compile with --dtype fp32, which rounds least",
        )
    return {"greedy_tokens_equal": int((gap == 0).sum()), "greedy_tokens": count}


def _decode(
    session: Session, ids: Tensor, prompt: int, cache: KVCache
) -> tuple[Tensor, list[dict[str, Tensor]], Usage]:
    """Logits [1, T - prompt, V] and keep sets of the tokens after the prompt, and what ran."""
    usage = Usage.of(session)
    session.step(ids[:, :prompt], cache)
    logits, keeps = [], []
    for token in range(prompt, ids.shape[1]):
        results = session.step(ids[:, token : token + 1], cache)
        usage.add(results)
        logits.append(results["logits"][:, 0].cpu())
        keeps.append({name: value.cpu() for name, value in cache.keep.items()})
    return torch.stack(logits, dim=1), keeps, usage


def device_name(session: Session) -> str:
    """Where a session runs, for reports: a cross-compiled artifact is checked on a CPU."""
    if session.device.type == "cuda":
        return torch.cuda.get_device_name(session.device)
    return "cpu"


def masks_of(
    keeps: list[dict[str, Tensor]], shape: ModelShape, prompt: int
) -> tuple[Tensor, Tensor]:
    """Keep sets of decode steps as masks of the whole sequence, the prompt all ones.

    Args:
        keeps: `KVCache.keep` after each decode step, of one row.
        shape: The model's shape.
        prompt: Tokens before the first decode step.

    Returns:
        bool [1, T, L, H] and bool [1, T, L, F].
    """
    tokens = prompt + len(keeps)
    masks = []
    for kind, units in (("head", shape.heads), ("neuron", shape.ffn)):
        mask = torch.ones(1, tokens, shape.layers, units, dtype=torch.bool)
        for token, keep in enumerate(keeps, start=prompt):
            if (kept := keep.get(f"{kind}_keep")) is not None:  # a mask already: bool [L', B, N]
                mask[0, token, shape.layers - len(kept) :] = kept[:, 0]
            if f"{kind}_index" not in keep:
                continue
            index, count = keep[f"{kind}_index"], keep[f"{kind}_count"]
            first = shape.layers - index.shape[0]
            for layer in range(index.shape[0]):
                row = mask[0, token, first + layer]
                row.fill_(False)
                row[index[layer, 0, : int(count[layer, 0])].long()] = True
        masks.append(mask)
    return masks[0], masks[1]


def _ids(loaded: LoadedModel, limit: int) -> Tensor:
    ids: Tensor = loaded.tokenizer(TEXT, return_tensors="pt").input_ids
    return ids[:, : min(limit, 64)]


def _matrices(loaded: LoadedModel) -> list[tuple[str, Tensor]]:
    return [(name, p.detach()) for name, p in loaded.model.named_parameters() if p.dim() > 1]


def _was_rounded(session: Session, name: str, value: Tensor) -> bool:
    stored = session.tensors.get(name)
    if stored is None:
        stored = session.tensors.get(f"{name}_t")
        if stored is None:
            return False
        stored = stored.t()
    if torch.promote_types(stored.dtype, value.dtype) == stored.dtype:
        return False
    return not torch.equal(stored.to("cpu", value.dtype), value)


def _check(what: str, against: str, error: float, tolerance: float, scale: float) -> None:
    if not error <= tolerance * scale:  # catches NaN too
        raise NumericsError(
            f"the {what} program does not agree with the {against}",
            expected=f"logits within {tolerance * scale:.3g} (of {scale:.3g})",
            got=f"{error:.3g}",
        )
