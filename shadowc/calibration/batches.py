"""Which examples go through the model together, and how many fit in the memory there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from shadowc.calibration.data import Example
from shadowc.config import ModelShape
from shadowc.errors import DataError

_HELD_OUT_EVERY = 8
_TOKENS = 4096  # more make no product of matrices faster
_CPU_BYTES = 2 << 30  # for a batch; whatever is free, so that a machine always gives the same
_SPARE = 0.85  # of the free memory: the allocator needs some for itself


class Group(NamedTuple):
    """A batch of examples.

    Attributes:
        first: Index of its first example.
        start: Positions that count before it.
        examples: Consecutive examples.
    """

    first: int
    start: int
    examples: list[Example]


class Plan(NamedTuple):
    """How to go through the data.

    Attributes:
        tokens: Padded tokens of a batch, about.
        keep: Of the last so many layers the graph is kept; the others run once more.
    """

    tokens: int
    keep: int

    def smaller(self, longest: int) -> Plan | None:
        """The next to try where memory did not suffice; None after one example and no graph."""
        if self.keep:
            return self._replace(keep=0)
        return self._replace(tokens=self.tokens // 2) if self.tokens > longest else None


def split(examples: Sequence[Example]) -> tuple[list[Example], list[Example]]:
    """Training examples, and every eighth that is held out (the last, if there are fewer).

    Raises:
        DataError: If there are fewer than two, or nothing in them can be scored.
    """
    usable = [example for example in examples if any(example.scored[2:])]
    if len(usable) < 2:
        raise DataError(
            "too few examples to calibrate on",
            expected="at least two of three tokens or more, one to fit and one to measure",
            got=len(usable),
            fix="a larger --examples or more text",
        )
    last = min(_HELD_OUT_EVERY, len(usable)) - 1
    parts: tuple[list[Example], list[Example]] = ([], [])
    for index, example in enumerate(usable):
        parts[index % _HELD_OUT_EVERY == last].append(example)
    return parts


def counting(example: Example) -> int:
    """Positions that count: all but the first, up to the last after which something is scored."""
    last = max((i for i, scored in enumerate(example.scored) if scored), default=0)
    return max(0, last - 1)


def groups(examples: Sequence[Example], tokens: int, first: int = 0) -> Iterator[Group]:
    """Consecutive examples from `first` on, about `tokens` padded tokens at a time."""
    start = sum(counting(example) for example in examples[:first])
    group: list[Example] = []
    for index, example in enumerate([*examples[first:], None], first):
        if group:
            longest = 0 if example is None else max(len(one.ids) for one in [*group, example])
            if example is None or longest * (len(group) + 1) > tokens:
                yield Group(index - len(group), start, group)
                start += sum(counting(one) for one in group)
                group = []
        if example is not None:
            group.append(example)


def plan(
    shape: ModelShape, dtype: torch.dtype, device: torch.device, sums: int, tokens: int | None
) -> Plan:
    """Batches and graphs for the memory that is free.

    Args:
        shape: The model's shape.
        dtype: Of its activations.
        device: Where the model is.
        sums: Bytes that will be taken besides.
        tokens: Asked for; None: to be found.
    """
    kept, working = _bytes_a_token(shape, dtype.itemsize)
    if device.type == "cpu":
        fits = _CPU_BYTES // (working + shape.layers * kept)
        return Plan(tokens or min(_TOKENS, 1 << max(0, fits.bit_length() - 1)), shape.layers)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    free = int((torch.cuda.mem_get_info(device)[0] + unused) * _SPARE) - sums
    most = tokens or _TOKENS
    for smaller in dict.fromkeys((most, tokens or most // 2)):
        if free > smaller * (working + shape.layers * kept):
            return Plan(smaller, shape.layers)
    keep = (free // most - working) // kept
    if keep >= 0 or tokens:
        return Plan(most, max(0, keep))
    return Plan(max(1, free // working), 0)


def _bytes_a_token(shape: ModelShape, itemsize: int) -> tuple[int, int]:
    """What a token's graph takes in a layer, and what it takes besides, at most in one layer."""
    heads = 2 * (shape.heads + shape.kv_heads) * shape.head_dim
    hidden = shape.ffn * (5 if shape.gated else 1)
    kept = itemsize * (6 * shape.hidden + heads + hidden)
    logits = 4 * shape.vocab  # of a quarter of the tokens, four times
    return kept, kept + itemsize * shape.layers * shape.hidden + 40 * shape.ffn + logits
