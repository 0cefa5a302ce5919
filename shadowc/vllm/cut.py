"""Which units run for which tokens of a batch: prompts run whole, decoded tokens their own units.

A batch of vLLM's is a list of tokens, T of them: some of prompts, some decoded. What every token's
result is does not depend on the others, but for the order of sums; how it is computed does:

    prompt tokens                  the dense op
    few decoded tokens             the native op: the union of their neurons is read once, and each
                                   token is multiplied with its own alone
    decoded tokens from            matrix products over the union of their neurons, or over all
    `break_even` on                neurons once the union is most of them; what a token does not
                                   keep becomes 0 in between

Heads are each token's own in all three; vLLM's attention itself runs every head (their keys and
values are needed anyway), and the output projection leaves out what the token does not keep.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from shadowc.kernels.linear import row_chunks
from shadowc.native import CPU_LAUNCHERS, NATIVE_ROWS, activate, keep_mask

#: The union's share of all neurons from which on gathering its rows is not worth it.
CAP = 0.75
_CHUNK = 256  # rows gathered at once

#: Ops whose last two arguments are a keep set; activations are their arguments of 3 dimensions.
SPLIT = ("sparse_qkv", "sparse_out_proj", "sparse_mlp", "sparse_gated_mlp")


class Cut:
    """Runs the ops of a program's body on the tokens of one batch after another.

    Args:
        kept: Share of the neurons that the policy keeps.

    Attributes:
        break_even: Decoded tokens from which on matrix products do better than the native ops,
            which do so for `NATIVE_ROWS` tokens that keep everything.
    """

    def __init__(self, kept: float) -> None:
        self.break_even = int(NATIVE_ROWS / max(kept, 0.05)) + 1
        self._decoded: Tensor | None = None
        self._prompt = torch.empty(0, dtype=torch.int64)

    def begin(self, decoded: Tensor) -> None:
        """Say which tokens of the batch are decoded ones: bool [T]."""
        self._decoded = None if bool(decoded.all()) else decoded.nonzero()[:, 0]
        self._prompt = (~decoded).nonzero()[:, 0]

    def rows(self, value: Tensor) -> Tensor:
        """The decoded tokens' rows of a tensor [T, ...]."""
        return value if self._decoded is None else value[self._decoded]

    def op(self, name: str) -> Callable[..., Any]:
        """An op of `SPLIT` on the whole batch; its keep set is that of the decoded tokens."""
        whole, kept = CPU_LAUNCHERS[name], self._for_kept(name)

        def run(*arguments: Any) -> Any:
            *given, index, count = arguments
            if index is None:
                return whole(*arguments)
            if self._decoded is None:
                return kept(given, index, count)
            dense = whole(*_rows(given, self._prompt), None, None)
            sparse = kept(_rows(given, self._decoded), index, count)
            if isinstance(dense, Tensor):
                return self._merge(dense, sparse)
            return tuple(self._merge(*pair) for pair in zip(dense, sparse, strict=True))

        run.__name__ = name
        return run

    def _merge(self, prompt: Tensor, decoded: Tensor) -> Tensor:
        whole = prompt.new_empty(len(prompt) + len(decoded), *prompt.shape[1:])
        whole[self._prompt] = prompt
        whole[self._decoded] = decoded
        return whole

    def _for_kept(self, name: str) -> Callable[[list[Any], Tensor, Tensor], Any]:
        native = CPU_LAUNCHERS[name]

        def run(given: list[Any], index: Tensor, count: Tensor) -> Any:
            if len(index) < self.break_even:
                return native(*given, index, count)
            if name == "sparse_qkv":  # nobody reads the queries of skipped heads
                return native(*given, None, None)
            if name == "sparse_out_proj":
                head_dim = given[-1]
                mask = keep_mask(index, count, index.shape[1])
                assert mask is not None
                own = mask.repeat_interleave(head_dim, 1)[:, None]
                return native(given[0].where(own, 0.0), *given[1:], None, None)
            if name == "sparse_mlp":
                x, w1, b1, w2t, b2, residual, activation, _ = given
                return products(x, w1, None, b1, w2t, b2, residual, activation, index, count)
            x, w1, up, w2t, residual, activation, _ = given
            return products(x, w1, up, None, w2t, None, residual, activation, index, count)

        return run


def _rows(given: list[Any], rows: Tensor) -> list[Any]:
    """Arguments of an op for some of its tokens."""
    return [a[rows] if isinstance(a, Tensor) and a.dim() == 3 else a for a in given]


def products(
    x: Tensor,
    w1: Tensor,
    up: Tensor | None,
    b1: Tensor | None,
    w2t: Tensor,
    b2: Tensor | None,
    residual: Tensor | None,
    activation: str,
    index: Tensor,
    count: Tensor,
) -> tuple[Tensor, Tensor]:
    """An MLP over kept neurons as matrix products over the union of all tokens' neurons.

    Args:
        x: float32 [n, 1, C].
        w1: [F, C]; the gate's if the MLP is gated.
        up: [F, C] if the MLP is gated.
        b1: float32 [F] or None.
        w2t: [F, C].
        b2: float32 [C] or None.
        residual: float32 [n, 1, C] or None.
        activation: As `sparse_mlp` takes it.
        index: int32 [n, F].
        count: int32 [n].

    Returns:
        float32 [n, 1, C], and neurons multiplied for each token, int32 [n].
    """
    mask = keep_mask(index, count, w1.shape[0])
    assert mask is not None
    union = mask.any(0).nonzero()[:, 0]
    parts: list[slice] | tuple[Tensor, ...] = union.split(_CHUNK)
    if len(union) > CAP * w1.shape[0]:
        parts = [part for part, _ in row_chunks(w1)]
    flat = x[:, 0]
    y = torch.zeros_like(flat) if residual is None else residual[:, 0].clone()
    for part in parts:
        bias = None if b1 is None else b1[part]
        h = activate(torch.nn.functional.linear(flat, w1[part].float(), bias), activation)
        if up is not None:
            h *= torch.nn.functional.linear(flat, up[part].float())
        y.addmm_(h.where(mask[:, part], 0.0), w2t[part].float())
    if b2 is not None:
        y += b2
    return y[:, None], count
