"""Model -> ExportedProgram: the Hugging Face model as it is, with nothing rewritten yet."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import torch
from torch.export import Dim, ExportedProgram

from shadowc.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

#: The inputs of a traced model, in this order.
INPUTS = ("input_ids", "position_ids", "attention_mask")


def trace(model: PreTrainedModel) -> ExportedProgram:
    """Export the stateless, whole-sequence forward pass of a causal language model.

    The cache is left out on purpose: what the model means does not depend on it, and the lowering
    brings it in where the target wants it.

    Args:
        model: An OPT or Llama `...ForCausalLM` with `sdpa` attention, in eval mode.

    Returns:
        A program of `input_ids` int64 [B, T], `position_ids` int64 [B, T] and `attention_mask` bool
        [B, 1, T, T] (True = may attend), to logits [B, T, V]; B and T are dynamic.

    Raises:
        ModelError: If torch.export cannot trace the model.
    """
    tokens = 8
    device = model.device
    ids = torch.zeros(2, tokens, dtype=torch.int64, device=device)
    positions = torch.arange(tokens, device=device).expand(2, tokens).contiguous()
    causal = torch.ones(tokens, tokens, dtype=torch.bool, device=device).tril()
    causal = causal.expand(2, 1, -1, -1).contiguous()
    batch, length = Dim("B", min=1, max=1024), Dim("T", min=2, max=_longest(model))
    grid = {0: batch, 1: length}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.export(
                model,
                args=(),
                kwargs={
                    **dict(zip(INPUTS, (ids, positions, causal), strict=True)),
                    "use_cache": False,
                },
                dynamic_shapes={
                    "input_ids": grid,
                    "position_ids": grid,
                    "attention_mask": {0: batch, 2: length, 3: length},
                    "use_cache": None,
                },
                strict=False,
                # What cannot be proved of all B and T (by torch 2.11: of grouped queries) becomes
                # a check in the graph, not an error; canonicalize removes it.
                prefer_deferred_runtime_asserts_over_guards=True,
            )
    except Exception as error:
        raise ModelError(
            f"torch.export cannot trace {type(model).__name__}",
            got=f"{type(error).__name__}: {error}",
            fix="report it with the versions of torch and transformers",
        ) from error


def _longest(model: PreTrainedModel) -> int:
    return int(getattr(model.config, "max_position_embeddings", 2048))
