"""As `norm_qkv`, but keys and values of a skipped head wait until the head comes back.

    window[p % W], moments[p % W], turns[:, p % W] = scaled; mean, 1/std; cos, sin  of token p
    q = (norm(x) wq^T + bq) of kept heads h, else undefined
    first = min(filled[p & 1, g], p),  due = p + 1 - first  tokens that head g still lacks
    g is needed if one of its query heads is kept, or if due = W: the window forgets one then
    cache[g, first .. p] = rotary(norm(x) wk^T + bk), norm(x) wv^T + bv of these tokens  if needed
    filled[(p + 1) & 1, g] = p + 1 if needed, else first
    computed[0, g] = due if needed, else 0

A norm is linear but for mean and std (see `norm_linear`), so that what a layer's projections read
of a token is `scaled` and two numbers; W = 16 of them are kept. What a head's keys and values come
to does not depend on when they are computed, so nothing is lost, and each row of wk and wv is read
once for all the tokens that its head lacks. There are two copies of `filled`, by the parity of the
position: one is read while the other one is written, and a step may be repeated.

scaled [1, 1, C], stats, norm, eps, the matrices, head_dim, index and count as in `norm_qkv`, for
one row; position int64 [1], the slot p of the token; cos and sin float32 [1, 1, D] or None; window
[W, C] in the type of scaled; moments float32 [W, 2]; filled int32 [2, G]; turns float32 [2, W, D],
or None without rotary (layers may share it); caches as in `decode_attention`, whose row 0 is
written. -> q [1, 1, H*D] in the type of scaled, computed int32 [1, G].

`catch_up` computes what all heads lack up to token `position`, the last one in the window, and
leaves `filled` to its caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shadowc.errors import KernelError
from shadowc.kernels.norm_linear import norm_linear_reference, product
from shadowc.kernels.norm_qkv import NormQkv
from shadowc.native import check_layout, keep_mask, register

WINDOW = 16
"""W: tokens whose inputs are kept; as many as tensor cores multiply at once."""

_NORM_QKV = 16  # arguments that are those of norm_qkv


Matrix = tuple[Tensor, Tensor | None, Tensor | None]
"""Weight, gain and shift."""


@dataclass(frozen=True)
class Lazy:
    """What waits and where it goes: arguments that both ops have, in order."""

    position: Tensor
    window: Tensor
    moments: Tensor
    filled: Tensor
    turns: Tensor | None
    k_cache: Tensor
    v_cache: Tensor

    @property
    def groups(self) -> int:
        """G."""
        return self.k_cache.shape[1]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.k_cache.shape[3]

    def check(self, wk: Tensor, wv: Tensor) -> None:
        """Raise KernelError unless they fit together and the matrices of keys and values."""
        rows, width = self.groups * self.head_dim, wk.shape[1]
        check_layout("wk", wk, self.window.dtype, rows, width)
        check_layout("wv", wv, self.window.dtype, rows, width)
        check_layout("window", self.window, wk.dtype, WINDOW, width)
        check_layout("moments", self.moments, torch.float32, WINDOW, 2)
        check_layout("filled", self.filled, torch.int32, 2, self.groups)
        check_layout("position", self.position, torch.int64, 1)
        check_layout("v_cache", self.v_cache, self.k_cache.dtype, *self.k_cache.shape)
        if self.turns is not None:
            check_layout("turns", self.turns, torch.float32, 2, WINDOW, self.head_dim)


@dataclass(frozen=True)
class LazyQkv(NormQkv):
    """The arguments of `lazy_qkv`: those of norm_qkv, then the token's and what waits."""

    cos: Tensor | None
    sin: Tensor | None
    lazy: Lazy

    @staticmethod
    def of(arguments: Sequence[Any]) -> LazyQkv:
        """From the op's arguments, in order."""
        position, cos, sin, *rest = arguments[_NORM_QKV:]
        return LazyQkv(*(*arguments[:_NORM_QKV], cos, sin, Lazy(position, *rest)))

    def check(self) -> None:
        """Raise KernelError unless they fit together."""
        super().check()
        if len(self.scaled) != 1:
            raise KernelError(
                "lazy_qkv is for one row", expected="scaled [1, 1, C]", got=list(self.scaled.shape)
            )
        if len({turn is None for turn in (self.cos, self.sin, self.lazy.turns)}) > 1:
            raise KernelError("rotary is cos, sin and turns together", expected="all or none")
        self.lazy.check(self.wk, self.wv)

    def new_results(self) -> tuple[Tensor, Tensor]:
        """q and computed, not yet written."""
        q = self.scaled.new_empty(1, 1, self.wq.shape[0])
        return q, self.lazy.filled.new_empty(1, self.lazy.groups)


def lazy_qkv_reference(*arguments: Any) -> tuple[Tensor, Tensor]:
    """The op in plain torch; queries of skipped heads are 0."""
    a = LazyQkv.of(arguments)
    lazy, heads = a.lazy, a.wq.shape[0] // a.head_dim
    position = int(lazy.position)
    _remember(a, position % WINDOW)
    query = norm_linear_reference(a.scaled, a.stats, a.norm, a.eps, a.wq, a.gq, a.sq)
    q = query.to(a.scaled.dtype)
    kept = keep_mask(a.index, a.count, heads)
    if kept is not None:
        q = q.where(kept.repeat_interleave(a.head_dim, 1)[:, None], 0.0)
    computed = torch.zeros_like(lazy.filled[:1])
    for group in range(lazy.groups):
        first = min(int(lazy.filled[position & 1, group]), position)
        due = position + 1 - first
        own = slice(group * heads // lazy.groups, (group + 1) * heads // lazy.groups)
        needed = kept is None or bool(kept[0, own].any()) or due >= WINDOW
        if needed:
            _fill(lazy, a.matrices[1:], group, first, position)
            computed[0, group] = due
        lazy.filled[(position + 1) & 1, group] = position + 1 if needed else first
    return q, computed


def catch_up_reference(*arguments: Any) -> None:
    """The op in plain torch."""
    matrices, lazy = _parts(arguments)
    position = int(lazy.position)
    for group in range(lazy.groups):
        first = min(int(lazy.filled[(position + 1) & 1, group]), position + 1)
        _fill(lazy, matrices, group, first, position)


def _remember(a: LazyQkv, slot: int) -> None:
    """Put a token where others will find it."""
    a.lazy.window[slot] = a.scaled[0, 0]
    total, square = a.stats[0].sum(0) / a.wq.shape[1]
    mean = total if a.norm == "layer" else torch.zeros_like(total)
    a.lazy.moments[slot, 0] = mean
    a.lazy.moments[slot, 1] = torch.rsqrt(square - mean * mean + a.eps)
    if a.lazy.turns is not None and a.cos is not None and a.sin is not None:
        a.lazy.turns[0, slot], a.lazy.turns[1, slot] = a.cos[0, 0], a.sin[0, 0]


def _fill(
    lazy: Lazy,
    matrices: Sequence[Matrix],
    group: int,
    first: int,
    last: int,
) -> None:
    """Keys and values of one head for tokens first to last, all in the window."""
    tokens = torch.arange(first, last + 1, device=lazy.window.device)
    slots, d = tokens % WINDOW, lazy.head_dim
    mean, scale = lazy.moments[slots].unbind(1)
    rows = slice(group * d, (group + 1) * d)
    made = []
    for weight, gain, shift in matrices:
        y = product(lazy.window[slots], weight[rows])
        if gain is not None:
            y = y - mean[:, None] * gain[rows]
        y = y * scale[:, None]
        y = y if shift is None else y + shift[rows].float()
        made.append(y.to(weight.dtype).float())
    key, value = made
    if lazy.turns is not None:
        cos, sin = lazy.turns[:, slots]
        half, other = key.chunk(2, 1)
        key = key * cos + torch.cat((-other, half), 1) * sin
    lazy.k_cache[0, group, first : last + 1] = key.to(lazy.k_cache.dtype)
    lazy.v_cache[0, group, first : last + 1] = value.to(lazy.v_cache.dtype)


def _parts(arguments: Sequence[Any]) -> tuple[tuple[Matrix, Matrix], Lazy]:
    """Matrices of keys and values, and what waits, of the arguments of `catch_up`."""
    wk, gk, sk, wv, gv, sv, *rest = arguments
    return ((wk, gk, sk), (wv, gv, sv)), Lazy(*rest)


def _lazy_qkv(*arguments: Any) -> tuple[Tensor, Tensor]:
    LazyQkv.of(arguments).check()
    return lazy_qkv_reference(*arguments)


def _lazy_qkv_cuda(*arguments: Any) -> tuple[Tensor, Tensor]:
    from shadowc.kernels.cuda.lazy_qkv import lazy_qkv

    a = LazyQkv.of(arguments)
    a.check()
    q, computed = a.new_results()
    lazy_qkv(a, q, computed)
    return q, computed


def _lazy_qkv_fake(*arguments: Any) -> tuple[Tensor, Tensor]:
    return LazyQkv.of(arguments).new_results()


def _catch_up(*arguments: Any) -> None:
    matrices, lazy = _parts(arguments)
    lazy.check(matrices[0][0], matrices[1][0])
    catch_up_reference(*arguments)


def _catch_up_cuda(*arguments: Any) -> None:
    from shadowc.kernels.cuda.lazy_qkv import catch_up

    matrices, lazy = _parts(arguments)
    lazy.check(matrices[0][0], matrices[1][0])
    catch_up(matrices, lazy)


def _catch_up_fake(*arguments: Any) -> None:
    return None


register(
    "lazy_qkv(Tensor scaled, Tensor stats, str norm, float eps, Tensor wq, Tensor? gq, Tensor? sq, "
    "Tensor wk, Tensor? gk, Tensor? sk, Tensor wv, Tensor? gv, Tensor? sv, int head_dim, "
    "Tensor? index, Tensor? count, Tensor position, Tensor? cos, Tensor? sin, "
    "Tensor(a!) window, Tensor(b!) moments, Tensor(c!) filled, Tensor(d!)? turns, "
    "Tensor(e!) k_cache, Tensor(f!) v_cache) -> (Tensor q, Tensor computed)",
    _lazy_qkv,
    _lazy_qkv_fake,
    cuda=_lazy_qkv_cuda,
)
register(
    "catch_up(Tensor wk, Tensor? gk, Tensor? sk, Tensor wv, Tensor? gv, Tensor? sv, "
    "Tensor position, Tensor window, Tensor moments, Tensor filled, Tensor? turns, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache) -> ()",
    _catch_up,
    _catch_up_fake,
    cuda=_catch_up_cuda,
)
