"""One forward and one backward per batch, layer by layer: activations and gradients at every unit.

Hooks read the inputs of the output projections (`out_proj` or `o_proj`, `fc2` or `down_proj`). The
parameters are frozen, so only activation gradients exist, and each layer's graph is its own: it
begins at the layer's input and is gone once the layer's units were handed out, from the last layer
to the first. Nothing is kept of a layer but its input where memory is scarce (`keep`); it then runs
once more. Criteria that say so get more: gradients at the first projections, or a second backward.

Which positions count: a token's mask matters only if some later token's loss depends on it, and the
first token of a sequence always belongs to the prompt, which runs dense. So position t counts if
t >= 1 and a token after t is scored. Leaving the first token out matters: as an attention sink its
gradients are orders of magnitude larger than all others.

Source: layers that run once more in the backward: Chen 2016 (arXiv 1604.06174).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import PreTrainedModel

from shadowc.calibration.criteria import Units, WeightGradient
from shadowc.calibration.data import Example
from shadowc.calibration.products import OneDnn
from shadowc.config import ModelShape
from shadowc.errors import CalibrationError, UnsupportedModelError
from shadowc.stored import all_finite

# architecture -> output projections of attention and MLP, the norm between them, what reads the
# norms before the MLP and before attention, and the norm after the last layer
_SITES = {
    "opt": (
        "self_attn.out_proj", "fc2", "final_layer_norm", "fc1", "self_attn.q_proj",
        "final_layer_norm",
    ),
    "llama": (
        "self_attn.o_proj", "mlp.down_proj", "post_attention_layernorm", "mlp.up_proj",
        "self_attn.q_proj", "norm",
    ),
}  # fmt: skip
_FIRST = {"opt": ("fc1",), "llama": ("mlp.gate_proj", "mlp.up_proj")}
_FP16_SCALE = 2.0**10
_LOGITS = 1024  # tokens whose logits are alive at once

_Make = Callable[..., Iterator[Units]]


class _Reached(Exception):
    """The forward pass has come as far as it is needed."""


class _Passed(NamedTuple):
    """A layer that a batch has gone through.

    Attributes:
        x: [B, T, C], its input; a leaf if there is a graph.
        out: [B, T, C], its output.
        inputs: What hooked modules read.
        outputs: What the first projections made.
        gates: On the sites' units, if the curvature is needed.
    """

    x: Tensor
    out: Tensor
    inputs: dict[nn.Module, Tensor]
    outputs: dict[nn.Module, Tensor]
    gates: dict[nn.Module, Tensor]


class Batch:
    """What one forward and backward gives: iterate, once, to get each layer's units.

    Attributes:
        counts: bool [B, T], the positions that count.
        following: int64 [B, T], each position's next token (0 at the end).
        loss: Mean cross-entropy of the scored tokens.
    """

    def __init__(
        self,
        counts: Tensor,
        following: Tensor,
        loss: float,
        features: Sequence[Tensor],
        units: Iterator[Units],
    ) -> None:
        """Take what `Collector.run` made."""
        self.counts, self.following, self.loss = counts, following, loss
        self._features, self._units = features, units

    def feature(self, tap: int) -> Tensor:
        """What a tap's predictor reads, fp32 [B, T, C] (H*D wide for `context`)."""
        return self._features[tap].float()

    def __iter__(self) -> Iterator[Units]:
        """From the last layer to the first: its neurons, then its heads.

        Raises:
            CalibrationError: If the gradients are not finite; after all units were given.
        """
        return self._units


def check_weights(model: nn.Module) -> None:
    """Raise CalibrationError if a weight is NaN or infinite, and name it."""
    for name, value in model.named_parameters():
        if not all_finite(value):
            raise CalibrationError(
                f"the weights of {name} are not finite",
                expected="numbers",
                got="NaN" if value.isnan().any() else "infinity",
                fix="fetch the checkpoint again",
            )


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
        keep: The last so many layers keep their graphs until the backward, the others run once more
            in it; None: all keep theirs.
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
        keep: int | None = None,
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
        self.keep = shape.layers if keep is None else keep
        try:
            attention, mlp, norm, first, query, final = _SITES[shape.architecture]
            decoder = model.get_decoder()
            layers = self.layers = list(decoder.layers)
            self.norm, self.head = decoder.get_submodule(final), model.get_output_embeddings()
            self.heads = [layer.get_submodule(attention) for layer in layers]
            self.neurons = [layer.get_submodule(mlp) for layer in layers]
            names = _FIRST[shape.architecture] if "first" in needs else ()
            self.first = [[layer.get_submodule(name) for name in names] for layer in layers]
            sites = {"residual": norm, "normed": first, "entry": query, "context": attention}
            site = sites[feature]
            self.taps = {tap: layers[tap].get_submodule(site) for tap in taps}
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
            seen.append(self._feature(args[0], ids).float())
            if len(seen) == len(self.taps):
                raise _Reached

        handles = [tap.register_forward_pre_hook(stop) for tap in self.taps.values()]
        try:
            with torch.no_grad(), suppress(_Reached), self._linear():
                self.model(input_ids=ids, attention_mask=attention, use_cache=False)
        finally:
            for handle in handles:
                handle.remove()
        return seen, _counting(scored)

    def _linear(self) -> AbstractContextManager[object]:
        """Faster products, which cannot be differentiated twice."""
        return nullcontext() if "curvature" in self.needs else OneDnn()

    def device(self, layer: int) -> torch.device:
        """Where a layer's values are."""
        device: torch.device = self.heads[layer].get_parameter("weight").device
        return device

    def run(self, examples: Sequence[Example], seed: int = 0) -> Batch:
        """Forward over a batch of examples, padded on the right; the backward comes with the units.

        Args:
            examples: Of any lengths.
            seed: Of what criteria draw for this batch.
        """
        whole = "curvature" in self.needs
        # Only the plain implementation of attention can be differentiated twice.
        backend = sdpa_kernel(SDPBackend.MATH) if whole else nullcontext()
        with torch.inference_mode(False), backend:
            ids, attention, scored = self._pad(examples)
            counts, following = _counting(scored), nn.functional.pad(ids[:, 1:], (0, 1))
            hidden, common = self._embed(ids, attention)
            scale = _FP16_SCALE * ids.shape[1] if hidden.dtype == torch.float16 else 1.0
            units = partial(self._units, counts, following, scale, seed)
            passed: list[_Passed | Tensor] = []
            features: dict[int, Tensor] = {}
            for layer in range(self.shape.layers):
                graph = whole or layer >= self.shape.layers - self.keep
                if not (whole and passed):  # there one graph goes through all layers
                    hidden = hidden.detach().requires_grad_(graph)
                one = self._through(layer, hidden, common, graph=graph)
                passed.append(one if graph else one.x)
                if layer in self.taps:
                    features[layer] = one.inputs[self.taps[layer]].detach()
                hidden = one.out
            if whole:
                losses = self._losses(hidden, ids)
                objective = _objective(losses, scored[:, 1:])
                found = self._curved(cast(list[_Passed], passed), objective, counts, units)
            else:
                losses, gradient = self._end(hidden, ids, scored[:, 1:], scale)
                found = self._layers(passed, common, gradient, units)
            loss = float(losses.detach()[scored[:, 1:]].mean())
        if not math.isfinite(loss):
            raise self._not_finite(ids, attention)
        read = [self._feature(features[layer], ids) for layer in self.taps]
        return Batch(counts, following, loss, read, found)

    def _not_finite(self, ids: Tensor, attention: Tensor | None) -> CalibrationError:
        """What makes the loss of a batch something that is not finite."""
        check_weights(self.model)
        where = "the output"
        with torch.no_grad():
            x, common = self._embed(ids, attention)
            for layer, module in enumerate(self.layers):
                x = module(x, **common)
                if not x.isfinite().all():
                    where = f"layer {layer}"
                    break
        return CalibrationError(
            f"the activations of {where} overflow",
            expected="finite numbers",
            got=f"NaN or infinity in {self.model.dtype}",
            fix="load the model in float32 or bfloat16",
        )

    def _embed(self, ids: Tensor, attention: Tensor | None) -> tuple[Tensor, dict[str, Any]]:
        """What enters the first layer [B, T, C], and what every layer gets beside it."""
        entered: list[tuple[Tensor, dict[str, Any]]] = []

        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            entered.append((args[0], kwargs))
            raise _Reached

        handle = self.layers[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            with torch.no_grad(), suppress(_Reached):
                self.model(input_ids=ids, attention_mask=attention, use_cache=False)
        finally:
            handle.remove()
        return entered[0]

    def _through(self, layer: int, x: Tensor, common: dict[str, Any], *, graph: bool) -> _Passed:
        """Run one layer."""
        with torch.set_grad_enabled(graph), self._linear(), self._reading(layer) as seen:
            return _Passed(x, self.layers[layer](x, **common), *seen)

    def _losses(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Cross-entropy of each next token, fp32 [B, T - 1], of what leaves the last layer."""
        with self._linear():
            logits = self.head(self.norm(hidden))[:, :-1].float().flatten(0, 1)
        following = ids[:, 1:].to(logits.device)
        losses = nn.functional.cross_entropy(logits, following.flatten(), reduction="none")
        return losses.view(following.shape)

    def _end(
        self, hidden: Tensor, ids: Tensor, scored: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The losses, and the gradient at the last layer's output, some examples at a time."""
        rows = max(1, _LOGITS // ids.shape[1])
        found = []
        for x, tokens, own in zip(*(v.split(rows) for v in (hidden, ids, scored)), strict=True):
            leaf = x.detach().requires_grad_()
            with torch.enable_grad():
                losses = self._losses(leaf, tokens)
                objective = _objective(losses, own) * scale
            found.append((losses.detach(), *torch.autograd.grad(objective, leaf)))
        losses, gradient = (torch.cat(parts) for parts in zip(*found, strict=True))
        return losses, gradient

    def _layers(
        self,
        passed: list[_Passed | Tensor],
        common: dict[str, Any],
        gradient: Tensor,
        units: _Make,
    ) -> Iterator[Units]:
        """The backward, a layer at a time."""
        for layer in reversed(range(self.shape.layers)):
            with torch.inference_mode(False):
                one = passed.pop()
                if isinstance(one, Tensor):
                    one = self._through(layer, one.requires_grad_(), common, graph=True)
                wanted = [one.x, *self._values(layer, one)]
                gradient, *own = torch.autograd.grad(one.out, wanted, gradient.to(one.out.device))
            yield from units(layer, one, own)
            del one, own, wanted
        if not torch.isfinite(gradient).all():
            raise CalibrationError(
                "the gradients overflow",
                expected="finite gradients",
                fix="load the model in float32 or bfloat16",
            )

    def _curved(
        self, passed: list[_Passed], objective: Tensor, counts: Tensor, units: _Make
    ) -> Iterator[Units]:
        """The backward and a second one, through one graph of all layers."""
        values = [self._values(layer, one) for layer, one in enumerate(passed)]
        gates = [
            one.gates[site]
            for layer, one in enumerate(passed)
            for site in (self.heads[layer], self.neurons[layer])
        ]
        count = len(gates)
        flat = [value for own in values for value in own]
        with torch.enable_grad():
            gradients = torch.autograd.grad(objective, [*flat, *gates], create_graph=True)
            curvature = _curvature(gates, gradients[-count:], counts)
        own = iter(gradients[:-count])
        return iter([
            unit
            for layer, one in enumerate(passed)
            for unit in units(
                layer, one, [next(own).detach() for _ in values[layer]],
                curvature[2 * layer : 2 * layer + 2],
            )
        ])  # fmt: skip

    def _values(self, layer: int, one: _Passed) -> list[Tensor]:
        """What gradients are taken at: the sites, and the first projections where needed."""
        sites = [one.inputs[module] for module in (self.heads[layer], self.neurons[layer])]
        return sites + [one.outputs[module] for module in self.first[layer]]

    def _units(
        self,
        counts: Tensor,
        following: Tensor,
        scale: float,
        seed: int,
        layer: int,
        one: _Passed,
        gradients: Sequence[Tensor],
        curvature: Sequence[Tensor] = (),
    ) -> Iterator[Units]:
        """A layer's neurons and heads, as criteria see them."""

        def unscaled(gradient: Tensor) -> Tensor:
            gradient = gradient.float().view(*counts.shape, -1)
            return gradient if scale == 1.0 else gradient / scale

        first = tuple(
            WeightGradient(
                module.get_parameter("weight"),
                one.inputs[module].detach().float().view(*counts.shape, -1),
                unscaled(g),
            )
            for module, g in zip(self.first[layer], gradients[2:], strict=True)
        )
        kinds = ("heads", self.heads, self.shape.heads), ("neurons", self.neurons, self.shape.ffn)
        # Neurons first: a tap scores a layer's neurons and the next layer's heads.
        for index, (kind, modules, count) in reversed(list(enumerate(kinds))):
            module = modules[layer]
            a = one.inputs[module].detach()
            yield Units(
                kind=kind,
                layer=layer,
                a=a.float().view(*counts.shape, count, -1),
                g=unscaled(gradients[index]).unflatten(-1, (count, -1)),
                seed=hash((seed, layer, index)),
                counts=counts.to(a.device),
                following=following.to(a.device),
                weight=module.get_parameter("weight"),
                curvature=curvature[index] if curvature else None,
                first=first if kind == "neurons" else (),
            )

    def _feature(self, x: Tensor, ids: Tensor) -> Tensor:
        """What a predictor reads, [B, T, C]."""
        feature = x.reshape(*ids.shape, -1)
        if not self.pooled:
            return feature
        so_far = torch.arange(1, ids.shape[1] + 1, device=x.device)
        return feature.float().cumsum(dim=1) / so_far[:, None]

    @contextmanager
    def _reading(self, layer: int) -> Iterator[tuple[dict[nn.Module, Tensor], ...]]:
        """Record what a layer's modules see: inputs, outputs of the first, gates."""
        inputs: dict[nn.Module, Tensor] = {}
        outputs: dict[nn.Module, Tensor] = {}
        gates: dict[nn.Module, Tensor] = {}
        units = {self.heads[layer]: self.shape.heads, self.neurons[layer]: self.shape.ffn}

        def record(module: nn.Module, args: tuple[Any, ...]) -> None:
            inputs[module] = args[0]

        def gated(module: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            a = args[0].unflatten(-1, (units[module], -1))
            gate = gates[module] = a.new_ones(a.shape[:-1]).requires_grad_()
            return ((a * gate[..., None]).flatten(-2),)

        def record_output(module: nn.Module, _: tuple[Any, ...], output: Tensor) -> None:
            outputs[module] = output

        handles = []
        if "curvature" in self.needs:
            handles += [site.register_forward_pre_hook(gated) for site in units]
        taps = [self.taps[layer]] if layer in self.taps else []
        recorded = dict.fromkeys([*units, *taps, *self.first[layer]])
        handles += [module.register_forward_pre_hook(record) for module in recorded]
        handles += [module.register_forward_hook(record_output) for module in self.first[layer]]
        try:
            yield inputs, outputs, gates
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


def _objective(losses: Tensor, scored: Tensor) -> Tensor:
    """Sum of each example's own mean loss, so that a gradient does not depend on its batch."""
    scored = scored.to(losses.device)
    return (losses * scored / scored.sum(1, keepdim=True).clamp(min=1)).sum()


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
