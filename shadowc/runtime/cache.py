"""The static KV cache: memory sized once, that decode steps write in place."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from shadowc.config import ModelShape
from shadowc.errors import LengthError
from shadowc.runtime.lazy import LazyState


class KVCache:
    """Keys, values and everything else that a batch of sequences carries from step to step.

    Keys and values of every head are written at every token, whatever the masks, so that a head
    that returns later finds its past; or they wait, see `lazy`.

    Attributes:
        length: Slots filled so far, the same in all rows (shorter prompts are padded on the left).
        capacity: S, slots there are.
        start: int64 [B], first slot of each row that is not padding.
        keep: The keep sets that the last step ran with, by the names that programs give them.
        steps: Tokens decoded since the prompt.
        lazy: What lazy programs remember, if the artifact has any for this batch.
    """

    is_compileable = False  # transformers asks: this is not one of its own static caches

    def __init__(self, shape: ModelShape, batch: int, capacity: int) -> None:
        size = (batch, shape.kv_heads, capacity, shape.head_dim)
        # numpy's zeros are pages that take no memory before they are written; torch's are written.
        self.tensors = [
            torch.from_numpy(np.zeros(size, np.float32)) for _ in range(2 * shape.layers)
        ]
        self.batch, self.capacity = batch, capacity
        self.length, self.steps = 0, 0
        self.start = torch.zeros(batch, dtype=torch.int64)
        self.keep: dict[str, Tensor] = {}
        self.lazy: LazyState | None = None

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Slots filled, as transformers asks for it."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """Slots there are, as transformers asks for it."""
        return self.capacity

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Give row i the past of row `beam_idx[i]`, as beam search asks for it."""
        self.tensors = [t.index_select(0, beam_idx) for t in self.tensors]
        self.start = self.start.index_select(0, beam_idx)
        self.keep = {name: t.index_select(1, beam_idx) for name, t in self.keep.items()}

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens: their slots are written again by the next ones."""
        self.length -= tokens
        self.steps = max(self.steps - tokens, 0)

    def crop(self, tokens_to_remove: int) -> None:
        """`take_back` as transformers asks for it where this model drafts: a number below 0."""
        self.take_back(abs(tokens_to_remove))

    def settle(self) -> None:
        """Bring keys and values to where `tensors` says they are; here they always are."""

    def check_room(self, tokens: int) -> None:
        """Raise LengthError unless `tokens` more fit."""
        if self.length + tokens > self.capacity:
            raise LengthError(
                "the sequence does not fit in the cache",
                expected=f"at most {self.capacity} tokens, prompt and generation together",
                got=f"{self.length} + {tokens}",
                fix="generate fewer tokens, or compile with a larger --max-seq-len",
            )
