"""One forward and one backward per batch: activations and gradients at every unit.

Hooks read the inputs of the output projections (`out_proj` or `o_proj`, `fc2` or `down_proj`). The
parameters are frozen, so the graph begins at the embeddings and only activation gradients exist.

Which positions count: a token's mask matters only if some later token's loss depends on it, and the
first token of a sequence always belongs to the prompt, which runs dense. So position t counts if
t >= 1 and a token after t is scored. Leaving the first token out matters: as an attention sink its
gradients are orders of magnitude larger than all others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shadowc.calibration.data import Example
from shadowc.config import ModelShape
from shadowc.errors import CalibrationError, UnsupportedModelError

# architecture -> output projections of attention and MLP, the norm between them, and what reads the
# norms before the MLP and before attention
_SITES = {
    "opt": ("self_attn.out_proj", "fc2", "final_layer_norm", "fc1", "self_attn.q_proj"),
    "llama": (
        "self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm", "mlp.up_proj",
        "self_attn.q_proj",
    ),
}  # fmt: skip
_FP16_SCALE = 2.0**10


class _Reached(Exception):
    """The forward pass has come as far as it is needed."""


@dataclass(frozen=True)
class Batch:
    """What one forward and backward gave.

    Attributes:
        features: For each tap fp32 [B, T, C], what its predictor reads (H*D wide for `context`).
        counts: bool [B, T], the positions that count.
        heads: For each layer (a, g), fp32 [B, T, H, D].
        neurons: For each layer (a, g), fp32 [B, T, F, 1].
        loss: Mean cross-entropy of the scored tokens.
    """

    features: list[Tensor]
    counts: Tensor
    heads: list[tuple[Tensor, Tensor]]
    neurons: list[tuple[Tensor, Tensor]]
    loss: float


class Collector:
    """Reads features, activations and gradients out of a Hugging Face model.

    Args:
        model: OPT or Llama, in eval mode.
        shape: Its shape.
        feature: `residual` (the stream after a layer's attention, which enters the norm before its
            MLP), `normed` (what leaves that norm), `entry` (what the layer's attention reads) or
            `context` (the attention's context before its projection).
        taps: The layers that it is read in.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: ModelShape,
        feature: str,
        taps: Sequence[int] = (0,),
    ) -> None:
        """Find the modules to read.

        Raises:
            UnsupportedModelError: If the model is not built as its architecture says.
        """
        self.model, self.shape = model, shape
        try:
            attention, mlp, norm, first, query = _SITES[shape.architecture]
            layers = list(model.get_decoder().layers)
            self.heads = [layer.get_submodule(attention) for layer in layers]
            self.neurons = [layer.get_submodule(mlp) for layer in layers]
            sites = {"residual": norm, "normed": first, "entry": query, "context": attention}
            site = sites[feature]
            self.taps = [layers[tap].get_submodule(site) for tap in taps]
        except (KeyError, AttributeError) as error:
            raise UnsupportedModelError(
                f"cannot calibrate a {type(model).__name__}",
                expected="decoder layers of " + ", ".join(_SITES),
                got=error,
            ) from error

    def features(self, examples: Sequence[Example]) -> tuple[list[Tensor], Tensor]:
        """The features alone, without running more than it takes.

        Returns:
            For each tap fp32 [B, T, C], and counts bool [B, T].
        """
        ids, attention, scored = self._pad(examples)
        seen: list[Tensor] = []

        def stop(_: nn.Module, args: tuple[Any, ...]) -> None:
            seen.append(args[0].reshape(*ids.shape, -1).float())
            if len(seen) == len(self.taps):
                raise _Reached

        handles = [tap.register_forward_pre_hook(stop) for tap in self.taps]
        try:
            with torch.no_grad():
                self.model(input_ids=ids, attention_mask=attention, use_cache=False)
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return seen, _counting(scored)

    def run(self, examples: Sequence[Example]) -> Batch:
        """Forward and backward over a batch of examples, padded on the right.

        Raises:
            CalibrationError: If the gradients are not finite.
        """
        ids, attention, scored = self._pad(examples)
        sites = [*self.heads, *self.neurons]
        with torch.inference_mode(False), torch.enable_grad(), self._reading(sites) as seen:
            logits = self.model(input_ids=ids, attention_mask=attention, use_cache=False).logits
            losses = nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            ).view(len(examples), -1)
            scored_next = scored[:, 1:]
            # Each example's own mean, so that a gradient does not depend on its batch.
            loss = (losses * scored_next / scored_next.sum(1, keepdim=True).clamp(min=1)).sum()
            scale = _FP16_SCALE * ids.shape[1] if logits.dtype == torch.float16 else 1.0
            gradients = torch.autograd.grad(loss * scale, [seen[site] for site in sites])
        if not torch.isfinite(gradients[0]).all():
            raise CalibrationError(
                "the gradients overflow",
                expected="finite gradients",
                fix="load the model in float32 or bfloat16",
            )

        def values(index: int, units: int) -> tuple[Tensor, Tensor]:
            a, g = seen[sites[index]].detach(), gradients[index]
            view = (*ids.shape, units, -1)
            g = g.float() if scale == 1.0 else g.float() / scale
            return a.float().reshape(view), g.reshape(view)

        layers = range(self.shape.layers)
        return Batch(
            features=[seen[tap].detach().float().reshape(*ids.shape, -1) for tap in self.taps],
            counts=_counting(scored),
            heads=[values(i, self.shape.heads) for i in layers],
            neurons=[values(len(layers) + i, self.shape.ffn) for i in layers],
            loss=float(losses.detach()[scored_next].mean()),
        )

    @contextmanager
    def _reading(self, sites: list[nn.Module]) -> Iterator[dict[nn.Module, Tensor]]:
        """Record the inputs of modules, and let the autograd graph begin at the embeddings."""
        seen: dict[nn.Module, Tensor] = {}

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen[module] = args[0]

        def require(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            return output.detach().requires_grad_()

        embeddings = self.model.get_input_embeddings()
        handles = [embeddings.register_forward_hook(require)]
        handles += [site.register_forward_pre_hook(record) for site in {*sites, *self.taps}]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    def _pad(self, examples: Sequence[Example]) -> tuple[Tensor, Tensor | None, Tensor]:
        """Ids [B, T], the attention mask (None where nothing is padded) and what is scored."""
        lengths = [len(example.ids) for example in examples]
        ids = torch.zeros(len(examples), max(lengths), dtype=torch.int64)
        scored = torch.zeros_like(ids, dtype=torch.bool)
        attention = torch.zeros_like(ids)
        for row, example in enumerate(examples):
            ids[row, : lengths[row]] = torch.tensor(example.ids)
            scored[row, : lengths[row]] = torch.tensor(example.scored)
            attention[row, : lengths[row]] = 1
        device = self.model.device
        padded = min(lengths) < max(lengths)
        return ids.to(device), attention.to(device) if padded else None, scored.to(device)


def _counting(scored: Tensor) -> Tensor:
    """Positions t >= 1 after which something is scored: bool [B, T]."""
    later = scored.long().flip(1).cumsum(1).flip(1) - scored.long()
    counts = later > 0
    counts[:, 0] = False
    return counts
