"""What really ran: units by layer and bytes of weights, counted from decode steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shadowc.config import ModelShape
from shadowc.runtime.session import KEEP_PREFIXES, Session


@dataclass
class Usage:
    """Counts over decoded tokens.

    Attributes:
        shape: The model's shape.
        element_size: Bytes of one stored weight.
        predictor_bytes: Bytes of predictor weights that one token reads, on average.
        rows_share: Whether rows of a batch read what any of them needs once, together.
        tokens: Tokens counted (rows of a batch count one each).
        heads: float64 [L], heads run.
        neurons: float64 [L], neurons run.
        rows: float64 [L], rows of the second projection read.
        keys: float64 [L], key/value heads whose rows were read.
    """

    shape: ModelShape
    element_size: int
    predictor_bytes: float = 0.0
    rows_share: bool = False

    def __post_init__(self) -> None:
        """Start at zero."""
        self.tokens = 0
        self.heads = torch.zeros(self.shape.layers, dtype=torch.float64)
        self.neurons = torch.zeros_like(self.heads)
        self.rows = torch.zeros_like(self.heads)
        self.keys = torch.zeros_like(self.heads)
        self._elements, self._neurons_read, self._reads = 0.0, 0.0, 0

    @classmethod
    def of(cls, session: Session) -> Usage:
        """Empty counts for an artifact."""
        sizes = [t.element_size() for n, t in session.tensors.items() if n.endswith("_t")]
        shared = session.device.type == "cuda"
        return cls(session.shape, sizes[0], session.predictor_bytes, shared)

    def add(self, results: Mapping[str, Tensor]) -> None:
        """Count one decode step.

        Args:
            results: What `Session.step` returned.
        """
        shape = self.shape
        batch = results["logits"].shape[0]
        self.tokens += batch
        results = {name: value.cpu() for name, value in results.items() if name != "logits"}
        if not any(name.startswith(KEEP_PREFIXES) for name in results):
            self.predictor_bytes = 0.0  # every unit ran: nothing was predicted
        heads = torch.full((shape.layers,), float(shape.heads * batch), dtype=torch.float64)
        for kind in ("head", "neuron"):  # masks, of runtimes that give those
            if (kept := results.get(f"{kind}_keep")) is not None:
                results[f"{kind}_count"] = kept.sum(-1)
        if "head_count" in results:
            heads[1:] = results["head_count"].sum(dim=1, dtype=torch.float64)
        self.heads += heads
        neurons = torch.full_like(heads, float(shape.ffn * batch))
        if "neuron_count" in results:
            neurons = results["neuron_count"].sum(dim=1, dtype=torch.float64)
        self.neurons += neurons
        every = torch.tensor(shape.ffn * batch)  # a program that does not say reads them all
        rows = (results.get(f"rows_{i}", every).sum() for i in range(shape.layers))
        read = torch.stack(list(rows)).double()
        self.rows += read
        reads = batch
        if self.rows_share and batch > 1:  # all heads, and the union of the neurons
            reads = 1
            heads = torch.full_like(heads, float(shape.heads))
            neurons = read = _union(results, shape)
        whole = torch.ones(reads, shape.kv_heads)  # lazy programs say what they computed
        computed = (results.get(f"computed_{i}", whole) for i in range(shape.layers))
        keys = torch.stack([(tokens > 0).sum() for tokens in computed]).double()
        self.keys += keys
        keys_values = 2 * float(keys.sum()) * shape.head_dim
        first = (2 if shape.gated else 1) * float(neurons.sum())
        units = float(heads.sum()) * 2 * shape.head_dim + keys_values + first + float(read.sum())
        self._elements += shape.hidden * units
        self._neurons_read += float(neurons.sum())
        self._reads += reads

    @property
    def head_sparsity(self) -> float:
        """Fraction of all heads that did not run."""
        return self._skipped(self.heads, self.shape.heads)

    @property
    def neuron_sparsity(self) -> float:
        """Fraction of all neurons that did not run."""
        return self._skipped(self.neurons, self.shape.ffn)

    @property
    def dense_bytes(self) -> int:
        """Bytes of the decoder layers' matrices, all read by a dense token."""
        return self.shape.layers * self.shape.layer_elements * self.element_size

    @property
    def layer_bytes(self) -> float:
        """Bytes of the decoder layers' matrices that a token read, on average; a step, if shared.

        Of a shared read it is not known which rows of exact zeros it left out: all are counted.
        """
        return self._elements / max(self._reads, 1) * self.element_size

    @property
    def neurons_read_share(self) -> float:
        """Fraction of the neurons whose weights a token read; a step, if shared: the union's."""
        units = self.shape.ffn * self.shape.layers
        return self._neurons_read / max(self._reads * units, 1)

    @property
    def weight_bytes_skipped(self) -> float:
        """Fraction of the layers' bytes not read, the predictor's own bytes counted against it."""
        return 1.0 - (self.layer_bytes + self.predictor_bytes) / self.dense_bytes

    @property
    def zero_rows_skipped(self) -> float:
        """The part of `weight_bytes_skipped` that exact zeros of kept neurons give."""
        rows = float((self.neurons - self.rows).sum()) / max(self.tokens, 1)
        return rows * self.shape.hidden * self.element_size / self.dense_bytes

    def _skipped(self, ran: Tensor, units: int) -> float:
        return 1.0 - float(ran.sum()) / max(self.tokens * units * self.shape.layers, 1)

    def to_json(self) -> dict[str, Any]:
        """The counts as plain JSON values."""
        n = max(self.tokens, 1)
        return {
            "tokens": self.tokens,
            "head_sparsity": self.head_sparsity,
            "neuron_sparsity": self.neuron_sparsity,
            "neurons_read_share": self.neurons_read_share,
            "weight_bytes_skipped": self.weight_bytes_skipped,
            "zero_rows_skipped": self.zero_rows_skipped,
            "dense_layer_bytes": self.dense_bytes,
            "layer_bytes": round(self.layer_bytes),
            "predictor_bytes": round(self.predictor_bytes),
            "heads_by_layer": [round(float(v) / n, 2) for v in self.heads],
            "neurons_by_layer": [round(float(v) / n, 1) for v in self.neurons],
            "rows_by_layer": [round(float(v) / n, 1) for v in self.rows],
            "kv_heads_by_layer": [round(float(v) / max(self._reads, 1), 2) for v in self.keys],
        }


def _union(results: Mapping[str, Tensor], shape: ModelShape) -> Tensor:
    """Neurons of each layer that any row of a batch keeps, fp64 [L]."""
    if "neuron_count" not in results:
        return torch.full((shape.layers,), float(shape.ffn), dtype=torch.float64)
    index, count = results["neuron_index"].long(), results["neuron_count"]
    kept = torch.arange(shape.ffn) < count[..., None]
    mask = torch.zeros(index.shape, dtype=torch.bool).scatter(2, index, kept)
    return mask.any(1).sum(1, dtype=torch.float64)
