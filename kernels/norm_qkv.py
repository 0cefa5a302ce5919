"""Norm and query, key and value projections in one go, with the queries of kept heads only.

    q[b, t, h*D + d] = (norm(x) wq^T + bq)[b, t, h*D + d]          for kept heads h; else undefined
    k, v: the same with wk, wv, always for every head: a head that returns later finds its past

scaled, stats, norm, eps and, for each of the three matrices, weight, gain and shift as in
`norm_linear`; index int32 [B, H] ascending, of which the first count[b] (int32 [B]) count; both
None = all heads. -> q [B, 1, H*D], k and v [B, 1, G*D] in the type of scaled. `decode_attention`
reads the queries of kept heads alone, so nobody writes the others.
"""

from __future__ import annotations

from torch import Tensor

from shadowc.kernels.norm_linear import norm_linear_reference
from shadowc.native import check_keep, check_one_token, keep_mask, register


def norm_qkv_reference(
    scaled: Tensor,
    stats: Tensor,
    norm: str,
    eps: float,
    wq: Tensor,
    gq: Tensor | None,
    sq: Tensor | None,
    wk: Tensor,
    gk: Tensor | None,
    sk: Tensor | None,
    wv: Tensor,
    gv: Tensor | None,
    sv: Tensor | None,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The op in plain torch; queries of skipped heads are 0."""
    q, k, v = (
        norm_linear_reference(scaled, stats, norm, eps, *matrix).to(scaled.dtype)
        for matrix in ((wq, gq, sq), (wk, gk, sk), (wv, gv, sv))
    )
    mask = keep_mask(index, count, wq.shape[0] // head_dim)
    if mask is not None:
        q = q.where(mask.repeat_interleave(head_dim, 1)[:, None], 0.0)
    return q, k, v


def _norm_qkv(
    scaled: Tensor,
    stats: Tensor,
    norm: str,
    eps: float,
    wq: Tensor,
    gq: Tensor | None,
    sq: Tensor | None,
    wk: Tensor,
    gk: Tensor | None,
    sk: Tensor | None,
    wv: Tensor,
    gv: Tensor | None,
    sv: Tensor | None,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    check_one_token("scaled", scaled, wq.shape[1])
    check_keep(index, count, scaled.shape[0], wq.shape[0] // head_dim)
    return norm_qkv_reference(
        scaled, stats, norm, eps, wq, gq, sq, wk, gk, sk, wv, gv, sv, head_dim, index, count
    )


def _norm_qkv_cuda(
    scaled: Tensor,
    stats: Tensor,
    norm: str,
    eps: float,
    wq: Tensor,
    gq: Tensor | None,
    sq: Tensor | None,
    wk: Tensor,
    gk: Tensor | None,
    sk: Tensor | None,
    wv: Tensor,
    gv: Tensor | None,
    sv: Tensor | None,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    from shadowc.kernels.cuda.batch import project_rows
    from shadowc.kernels.cuda.project import qkv

    batch = scaled.shape[0]
    check_one_token("scaled", scaled, wq.shape[1])
    check_keep(index, count, batch, wq.shape[0] // head_dim)
    matrices = ((wq, gq, sq), (wk, gk, sk), (wv, gv, sv))
    if batch == 1:
        q, k, v = qkv(scaled[0, 0], stats, norm, eps, matrices, head_dim, index, count)
        return q[None, None], k[None, None], v[None, None]
    # Rows keep different heads: their union is soon all of them.
    made = []
    for weight, gain, shift in matrices:
        out = scaled.new_empty(batch, 1, weight.shape[0])
        project_rows(scaled[:, 0], stats, norm, eps, weight, gain, shift, out[:, 0])
        made.append(out)
    return made[0], made[1], made[2]


def _norm_qkv_fake(
    scaled: Tensor,
    stats: Tensor,
    norm: str,
    eps: float,
    wq: Tensor,
    gq: Tensor | None,
    sq: Tensor | None,
    wk: Tensor,
    gk: Tensor | None,
    sk: Tensor | None,
    wv: Tensor,
    gv: Tensor | None,
    sv: Tensor | None,
    head_dim: int,
    index: Tensor | None,
    count: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    b, t = scaled.shape[:2]
    q, k, v = (scaled.new_empty((b, t, w.shape[0])) for w in (wq, wk, wv))
    return q, k, v


register(
    "norm_qkv(Tensor scaled, Tensor stats, str norm, float eps, Tensor wq, Tensor? gq, Tensor? sq, "
    "Tensor wk, Tensor? gk, Tensor? sk, Tensor wv, Tensor? gv, Tensor? sv, int head_dim, "
    "Tensor? index, Tensor? count) -> (Tensor q, Tensor k, Tensor v)",
    _norm_qkv,
    _norm_qkv_fake,
    cuda=_norm_qkv_cuda,
)
