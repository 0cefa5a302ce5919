"""Norm and query, key and value projections in one go, with the queries of kept heads only.

    q[b, t, h*D + d] = (norm(x) wq^T + bq)[b, t, h*D + d]          for kept heads h; else undefined
    k, v: the same with wk, wv, always for every head: a head that returns later finds its past

scaled, stats, norm, eps and, for each of the three matrices, weight, gain and shift as in
`norm_linear`; index int32 [B, H] ascending, of which the first count[b] (int32 [B]) count; both
None = all heads. -> q [B, 1, H*D], k and v [B, 1, G*D] in the type of scaled. `decode_attention`
reads the queries of kept heads alone, so nobody writes the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from shadowc.kernels.norm_linear import norm_linear_reference
from shadowc.native import check_keep, check_layout, check_one_token, keep_mask, register


@dataclass(frozen=True)
class NormQkv:
    """The op's arguments, in order."""

    scaled: Tensor
    stats: Tensor
    norm: str
    eps: float
    wq: Tensor
    gq: Tensor | None
    sq: Tensor | None
    wk: Tensor
    gk: Tensor | None
    sk: Tensor | None
    wv: Tensor
    gv: Tensor | None
    sv: Tensor | None
    head_dim: int
    index: Tensor | None
    count: Tensor | None

    @property
    def matrices(self) -> tuple[tuple[Tensor, Tensor | None, Tensor | None], ...]:
        """Weight, gain and shift of queries, keys and values."""
        return (
            (self.wq, self.gq, self.sq),
            (self.wk, self.gk, self.sk),
            (self.wv, self.gv, self.sv),
        )

    def check(self) -> None:
        """Raise KernelError unless they fit together."""
        check_one_token("scaled", self.scaled, self.wq.shape[1])
        heads = self.wq.shape[0] // self.head_dim
        check_keep(self.index, self.count, self.scaled.shape[0], heads, check_layout)


def norm_qkv_reference(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch; queries of skipped heads are 0."""
    a = NormQkv(*arguments)
    q, k, v = (
        norm_linear_reference(a.scaled, a.stats, a.norm, a.eps, *matrix).to(a.scaled.dtype)
        for matrix in a.matrices
    )
    mask = keep_mask(a.index, a.count, a.wq.shape[0] // a.head_dim)
    if mask is not None:
        q = q.where(mask.repeat_interleave(a.head_dim, 1)[:, None], 0.0)
    return q, k, v


def _norm_qkv(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    NormQkv(*arguments).check()
    return norm_qkv_reference(*arguments)


def _norm_qkv_cuda(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    from shadowc.kernels.cuda.batch import project_rows
    from shadowc.kernels.cuda.project import qkv

    a = NormQkv(*arguments)
    a.check()
    q, k, v = _norm_qkv_fake(*arguments)
    if len(a.scaled) == 1:
        qkv(a, q, k, v)
    else:  # rows keep different heads: their union is soon all of them
        for matrix, out in zip(a.matrices, (q, k, v), strict=True):
            project_rows(a.scaled[:, 0], a.stats, a.norm, a.eps, *matrix, out[:, 0])
    return q, k, v


def _norm_qkv_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    a = NormQkv(*arguments)
    b, t = a.scaled.shape[:2]
    q, k, v = (a.scaled.new_empty((b, t, w.shape[0])) for w in (a.wq, a.wk, a.wv))
    return q, k, v


register(
    "norm_qkv(Tensor scaled, Tensor stats, str norm, float eps, Tensor wq, Tensor? gq, Tensor? sq, "
    "Tensor wk, Tensor? gk, Tensor? sk, Tensor wv, Tensor? gv, Tensor? sv, int head_dim, "
    "Tensor? index, Tensor? count) -> (Tensor q, Tensor k, Tensor v)",
    _norm_qkv,
    _norm_qkv_fake,
    cuda=_norm_qkv_cuda,
)
