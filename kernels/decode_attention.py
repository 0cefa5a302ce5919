"""Attention of the new tokens over a static key/value cache, for kept heads only.

    q', k' = rotary(q), rotary(k)         x' = x * cos + rotate_half(x) * sin; none without cos, sin
    cache[b, g, position + t] = k'[b, t, g], v[b, t, g]           for every head g, kept or not
    ctx[b, t, h] = sum_s softmax_s(scale * q'[b, t, h] . k_cache[b, g, s]) v_cache[b, g, s]
                   over slots start[b] <= s <= position + t, g = h // (H / G), kept heads h, else 0

q [B, T, H*D], k and v [B, T, G*D] or both None (the cache has them already: see `lazy_qkv`), cos
and sin [B, T, D] float32 or None; k_cache, v_cache [B', G, S, D] with B' >= B, updated in place;
start int64 [B], the row's first valid slot (left padding); position int64 [1]; index int32 [B, H]
ascending, of which the first count[b] (int32 [B]) count; both None = all heads. Caches are float32
on a CPU and have the type of q on CUDA. D is a multiple of 8, up to 256. -> ctx [B, T, H*D] in the
type of q, zeros also for tokens before their row's start. One token runs in a kernel of ours; a
prompt, and on a CPU a token without k and v, runs as torch's own attention.

Source: Su et al. 2021, "RoFormer" (rotary, in the rotate-half form of Llama).
"""

from __future__ import annotations

import torch
from torch import Tensor

from shadowc.errors import KernelError
from shadowc.native import (
    check,
    check_keep,
    check_optional,
    check_rank,
    function,
    keep_mask,
    pointer,
    register,
)

_native = function("attention", "12P 7q f i")


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotary position embedding of x [B, T, heads, D]."""
    if cos is None or sin is None:
        return x
    first, second = x.chunk(2, -1)
    turned = x * cos[:, :, None] + torch.cat((-second, first), -1) * sin[:, :, None]
    return turned.to(x.dtype)


def decode_attention_reference(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    position: Tensor,
    scale: float,
    index: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    """The op in plain torch; updates the caches as the op does."""
    batch, tokens, _ = q.shape
    groups, head_dim = k_cache.shape[1], k_cache.shape[3]
    first = int(position)
    end = first + tokens
    query = rotate(q.view(batch, tokens, -1, head_dim), cos, sin).transpose(1, 2)
    if k is not None and v is not None:
        key = rotate(k.view(batch, tokens, groups, head_dim), cos, sin).transpose(1, 2)
        k_cache[:batch, :, first:end] = key
        v_cache[:batch, :, first:end] = v.view(batch, tokens, groups, head_dim).transpose(1, 2)
    slots = torch.arange(end, device=q.device)
    causal = slots <= torch.arange(first, end, device=q.device)[:, None]  # [T, slots]
    allowed = causal & (slots >= start[:, None, None])  # [B, T, slots]
    # A slot that no token may see can hold anything: it must not meet a weight of 0.
    unseen = ~allowed.any(1)[:, None, :, None]
    context = torch.nn.functional.scaled_dot_product_attention(
        query,
        k_cache[:batch, :, :end].masked_fill(unseen, 0.0),
        v_cache[:batch, :, :end].masked_fill(unseen, 0.0),
        attn_mask=allowed[:, None],
        scale=scale,
        enable_gqa=True,
    )
    live = allowed.any(2)[:, None, :, None]
    mask = keep_mask(index, count, query.shape[1])
    if mask is not None:
        live = live & mask[:, :, None, None]
    return context.where(live, 0.0).transpose(1, 2).reshape(q.shape)


def _decode_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    position: Tensor,
    scale: float,
    index: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    check_rank("q", q, 3)
    check_rank("k_cache", k_cache, 4)
    batch, tokens, width = q.shape
    rows, groups, slots, head_dim = k_cache.shape
    if not (8 <= head_dim <= 256) or head_dim % 8:
        raise KernelError(
            "argument 'k_cache' does not fit",
            expected="a head dim (last dimension) that is a multiple of 8, up to 256",
            got=list(k_cache.shape),
        )
    if groups == 0 or width % (groups * head_dim) or rows < batch:
        raise KernelError(
            "argument 'q' does not fit the cache",
            expected=f"at most {rows} rows, of a multiple of {groups * head_dim} values",
            got=list(q.shape),
        )
    if (cos is None) != (sin is None):
        raise KernelError("rotary is cos and sin together", expected="both or neither")
    if (k is None) != (v is None):
        raise KernelError("new keys and values come together", expected="both or neither")
    heads = width // head_dim
    if q.dtype in (torch.float16, torch.bfloat16):
        return _decode_attention(
            q.float(), None if k is None else k.float(), None if v is None else v.float(), cos, sin,
            k_cache, v_cache, start, position, scale, index, count,
        ).to(q.dtype)  # fmt: skip
    check("q", q, torch.float32, batch, tokens, width)
    check_optional("k", k, torch.float32, batch, tokens, groups * head_dim)
    check_optional("v", v, torch.float32, batch, tokens, groups * head_dim)
    check_optional("cos", cos, torch.float32, batch, tokens, head_dim)
    check_optional("sin", sin, torch.float32, batch, tokens, head_dim)
    check("k_cache", k_cache, torch.float32, rows, groups, slots, head_dim)
    check("v_cache", v_cache, torch.float32, rows, groups, slots, head_dim)
    check("start", start, torch.int64, batch)
    check("position", position, torch.int64, 1)
    check_keep(index, count, batch, heads)
    native = tokens == 1 and k is not None and v is not None
    if native:
        ctx = torch.empty_like(q)
        outside = _native(
            q.data_ptr(),
            pointer(k),
            pointer(v),
            pointer(cos),
            pointer(sin),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            start.data_ptr(),
            position.data_ptr(),
            ctx.data_ptr(),
            pointer(index),
            pointer(count),
            heads,
            head_dim,
            batch,
            heads,
            groups,
            head_dim,
            slots,
            scale,
            torch.get_num_threads(),
        )
    else:
        outside = not 0 <= int(position) <= slots - tokens
    if outside:
        raise KernelError(
            "argument 'position' does not fit the cache",
            expected=f"room for {tokens} tokens in {slots} slots, rows that start in them",
            got=int(position),
        )
    if native:
        return ctx
    return decode_attention_reference(
        q, k, v, cos, sin, k_cache, v_cache, start, position, scale, index, count
    )


def _decode_attention_cuda(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    position: Tensor,
    scale: float,
    index: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    if q.shape[1] > 1:
        return decode_attention_reference(
            q, k, v, cos, sin, k_cache, v_cache, start, position, scale, index, count
        )
    from shadowc.kernels.cuda.attention import attention

    return attention(
        q[:, 0], None if k is None else k[:, 0], None if v is None else v[:, 0],
        None if cos is None else cos[:, 0], None if sin is None else sin[:, 0],
        k_cache, v_cache, start, position, scale, index, count,
    )[:, None]  # fmt: skip


def _decode_attention_fake(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    start: Tensor,
    position: Tensor,
    scale: float,
    index: Tensor | None,
    count: Tensor | None,
) -> Tensor:
    return torch.empty_like(q)


register(
    "decode_attention(Tensor q, Tensor? k, Tensor? v, Tensor? cos, Tensor? sin, "
    "Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor start, Tensor position, float scale, "
    "Tensor? index, Tensor? count) -> Tensor",
    _decode_attention,
    _decode_attention_fake,
    cuda=_decode_attention_cuda,
)
