"""One forward and one backward per batch: activations and gradients at every unit.

Hooks read the inputs of the output projections (`out_proj` or `o_proj`, `fc2` or `down_proj`). The
parameters are frozen, so the graph begins at the embeddings and only activation gradients exist.
Criteria that say so get more: gradients at the first projections, or a second backward.

Which positions count: a token's mask matters only if some later token's loss depends on it, and the
first token of a sequence always belongs to the prompt, which runs dense. So position t counts if
t >= 1 and a token after t is scored. Leaving the first token out matters: as an attention sink its
gradients are orders of magnitude larger than all others.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from shadowc.calibration.criteria import Site, Units, WeightGradient
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
_FIRST = {"opt": ("fc1",), "llama": ("mlp.gate_proj", "mlp.up_proj")}
_FP16_SCALE = 2.0**10


class _Reached(Exception):
    """The forward pass has come as far as it is needed."""


@dataclass(frozen=True)
class Batch:
    """What one forward and backward gave.

    Attributes:
        features: For each tap fp32 [B, T, C], what its predictor reads (H*D wide for `context`).
        counts: bool [B, T], the positions that count.
        following: int64 [B, T], each position's next token (0 at the end).
        heads: For each layer (a, g), fp32 [B, T, H, D].
        neurons: For each layer (a, g), fp32 [B, T, F, 1].
        loss: Mean cross-entropy of the scored tokens.
        weights: Of each layer's output projections, by kind.
        curvature: fp32 [B, T, U] of each site, if it was needed (see `Units`).
        first: Of each layer's first projections of the MLP, if they were needed.
    """

    features: list[Tensor]
    counts: Tensor
    following: Tensor
    heads: list[tuple[Tensor, Tensor]]
    neurons: list[tuple[Tensor, Tensor]]
    loss: float
    weights: dict[str, list[Tensor]]
    curvature: dict[Site, Tensor]
    first: list[tuple[WeightGradient, ...]]

    def units(self, generator: torch.Generator) -> Iterator[Units]:
        """Each layer's heads, then each layer's neurons, as criteria see them."""
        for kind, values in (("heads", self.heads), ("neurons", self.neurons)):
            for layer, (a, g) in enumerate(values):
                yield Units(
                    kind=kind,
                    layer=layer,
                    a=a,
                    g=g,
                    generator=generator,
                    counts=self.counts,
                    following=self.following,
                    weight=self.weights[kind][layer],
                    curvature=self.curvature.get((kind, layer)),
                    first=self.first[layer] if self.first and kind == "neurons" else (),
                )

    def sites(self) -> Iterator[tuple[Site, Tensor, Tensor]]:
        """Each layer's heads, then each layer's neurons, with a and g."""
        for kind, values in (("heads", self.heads), ("neurons", self.neurons)):
            for layer, (a, g) in enumerate(values):
                yield (kind, layer), a, g

    def ahead(self, values: Tensor, refresh: int) -> Tensor:
        """Means over the tokens that a mask made at a position would serve.

        Args:
            values: fp32 [B, T, U].
            refresh: As in `Policy`: positions t to t + refresh - 1, or, if 0, t to the end; of
                these, those that count.

        Returns:
            fp32 [B, T, U].
        """
        if refresh == 1:
            return values
        tokens = values.shape[1]
        last = torch.arange(tokens, device=values.device) + (refresh or tokens) - 1
        last = last.clamp(max=tokens - 1)
        one = self.counts[..., None].double()

        def spanned(own: Tensor) -> Tensor:
            sums = own.cumsum(dim=1)
            return sums[:, last] - sums + own

        return (spanned(values * one) / spanned(one).clamp(min=1)).float()


class _Seen(NamedTuple):
    """What hooks recorded, by module."""

    inputs: dict[nn.Module, Tensor]
    outputs: dict[nn.Module, Tensor]
    gates: dict[nn.Module, Tensor]


class Collector:
    """Reads features, activations and gradients out of a Hugging Face model.

    Args:
        model: OPT or Llama, in eval mode.
        shape: Its shape.
        feature: `residual` (the stream after a layer's attention, which enters the norm before its
            MLP), `normed` (what leaves that norm), `entry` (what the layer's attention reads) or
            `context` (the attention's context before its projection).
        taps: The layers that it is read in.
        needs: What criteria need besides a and g: `curvature`, `first`.
        pooled: Give the mean of the feature over all tokens so far instead of the token's own.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        shape: ModelShape,
        feature: str,
        taps: Sequence[int] = (0,),
        needs: Collection[str] = (),
        *,
        pooled: bool = False,
    ) -> None:
        """Find the modules to read.

        Raises:
            UnsupportedModelError: If the model is not built as its architecture says.
            CalibrationError: If the curvature is needed of a model in half precision.
        """
        # Measured on opt-books-15m: fp16 overflows whatever the loss is scaled by, and bf16 is off
        # by 1.3 times the norm.
        if "curvature" in needs and model.dtype != torch.float32:
            raise CalibrationError(
                "the second backward of grasp needs full precision",
                expected="a model in float32",
                got=model.dtype,
            )
        self.model, self.shape, self.needs, self.pooled = model, shape, needs, pooled
        try:
            attention, mlp, norm, first, query = _SITES[shape.architecture]
            layers = list(model.get_decoder().layers)
            self.heads = [layer.get_submodule(attention) for layer in layers]
            self.neurons = [layer.get_submodule(mlp) for layer in layers]
            names = _FIRST[shape.architecture] if "first" in needs else ()
            self.first = [[layer.get_submodule(name) for name in names] for layer in layers]
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
            seen.append(self._feature(args[0], ids))
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
        counts = _counting(scored)
        sites = [*self.heads, *self.neurons]
        second = "curvature" in self.needs
        # Only the plain implementation of attention can be differentiated twice.
        backend = sdpa_kernel(SDPBackend.MATH) if second else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), backend, self._reading() as seen:
            logits = self.model(input_ids=ids, attention_mask=attention, use_cache=False).logits
            losses = nn.functional.cross_entropy(
                logits[:, :-1].float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none"
            ).view(len(examples), -1)
            scored_next = scored[:, 1:]
            # Each example's own mean, so that a gradient does not depend on its batch.
            loss = (losses * scored_next / scored_next.sum(1, keepdim=True).clamp(min=1)).sum()
            scale = _FP16_SCALE * ids.shape[1] if logits.dtype == torch.float16 else 1.0
            outputs = [seen.outputs[module] for layer in self.first for module in layer]
            gates = [seen.gates[site] for site in sites] if second else []
            gradients = torch.autograd.grad(
                loss * scale,
                [*(seen.inputs[site] for site in sites), *outputs, *gates],
                create_graph=second,
            )
            curvature = _curvature(gates, gradients[-len(gates) :], counts) if second else []
        if not torch.isfinite(gradients[0]).all():
            raise CalibrationError(
                "the gradients overflow",
                expected="finite gradients",
                fix="load the model in float32 or bfloat16",
            )

        def unscaled(gradient: Tensor) -> Tensor:
            gradient = gradient.detach().float()
            return gradient if scale == 1.0 else gradient / scale

        def values(index: int, units: int) -> tuple[Tensor, Tensor]:
            a, g = seen.inputs[sites[index]].detach(), unscaled(gradients[index])
            view = (*ids.shape, units, -1)
            return a.float().reshape(view), g.reshape(view)

        def weight_gradient(module: nn.Module, gradient: Tensor) -> WeightGradient:
            x, g = seen.inputs[module].detach().float(), unscaled(gradient)
            view = (*ids.shape, -1)
            return WeightGradient(module.get_parameter("weight"), x.reshape(view), g.reshape(view))

        layers = range(self.shape.layers)
        places = [(kind, layer) for kind in ("heads", "neurons") for layer in layers]
        first = iter(gradients[len(sites) :])
        return Batch(
            features=[self._feature(seen.inputs[tap].detach(), ids) for tap in self.taps],
            counts=counts,
            following=nn.functional.pad(ids[:, 1:], (0, 1)),
            heads=[values(i, self.shape.heads) for i in layers],
            neurons=[values(len(layers) + i, self.shape.ffn) for i in layers],
            loss=float(losses.detach()[scored_next].mean()),
            weights={
                kind: [module.get_parameter("weight") for module in modules]
                for kind, modules in (("heads", self.heads), ("neurons", self.neurons))
            },
            curvature=dict(zip(places, curvature, strict=False)),
            first=[
                tuple(weight_gradient(module, next(first)) for module in modules)
                for modules in self.first
                if modules
            ],
        )

    def _feature(self, x: Tensor, ids: Tensor) -> Tensor:
        """What a predictor reads, fp32 [B, T, C]."""
        feature = x.float().reshape(*ids.shape, -1)
        if not self.pooled:
            return feature
        so_far = torch.arange(1, ids.shape[1] + 1, device=x.device)
        return feature.cumsum(dim=1) / so_far[:, None]

    @contextmanager
    def _reading(self) -> Iterator[_Seen]:
        """Record what modules see, and let the autograd graph begin at the embeddings."""
        seen = _Seen({}, {}, {})
        units = dict.fromkeys(self.heads, self.shape.heads)
        units |= dict.fromkeys(self.neurons, self.shape.ffn)
        first = [module for layer in self.first for module in layer]

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            seen.inputs[module] = args[0]

        def gated(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            a = args[0].unflatten(-1, (units[module], -1))
            gate = seen.gates[module] = a.new_ones(a.shape[:-1]).requires_grad_()
            return ((a * gate[..., None]).flatten(-2),)

        def record_output(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
            seen.outputs[module] = output

        def require(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
            return output.detach().requires_grad_()

        handles = [self.model.get_input_embeddings().register_forward_hook(require)]
        if "curvature" in self.needs:
            handles += [site.register_forward_pre_hook(gated) for site in units]
        recorded = {*units, *self.taps, *first}
        handles += [module.register_forward_pre_hook(record) for module in recorded]
        handles += [module.register_forward_hook(record_output) for module in first]
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


def _curvature(
    gates: Sequence[Tensor], gradients: Sequence[Tensor], counts: Tensor
) -> list[Tensor]:
    """Hessian times gradient, of gates that all counting positions of an example share.

    Returns:
        For each of `gates` fp32 [B, T, U]: what a position adds to its example's product.
    """
    examples, tokens = counts.shape
    shared = [
        torch.einsum("btu,bt->bu", gradient.view(examples, tokens, -1), counts.float())
        for gradient in gradients
    ]
    products = torch.autograd.grad(shared, gates, [one.detach() for one in shared])
    return [product.view(examples, tokens, -1) for product in products]
