"""Causal attention over rows that lie end to end, where no row sees another.

    row_lengths (3, 2)         packed_attention_plain          packed_attention
                               one dense mask                  rows of like length side by side
        q k v of 5 tokens      1 . . . .                       1 . .    1 . -
                               1 1 . . .                       1 1 .    1 1 -
                               1 1 1 . .                       1 1 1    - - -
                               . . . 1 .
                               . . . 1 1

Padding stands on the right of a shorter row only inside a group, so under a causal mask no real token sees it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

# Rows of one group differ in length by at most this share of the longest: beyond it padding costs more than calls.
_GROUP_SLACK = 0.125
# Longest row (padded) of the way by products, which keeps width weights a head and token.
_PRODUCTS_WIDTH = 512


def packed_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """q [tokens, heads, dim], k and v [tokens, kv_heads, dim] -> [tokens, heads, dim], same dtype.

    window   a token sees itself and the window - 1 tokens before it (Gemma 3, Mistral); None: the whole row
    softcap  scores become softcap * tanh(scores / softcap) (Gemma 2); takes the plain way
    """
    if softcap is not None or dropout > 0:
        return packed_attention_plain(
            q, k, v, row_lengths, scale=scale, window=window, softcap=softcap, dropout=dropout
        )
    outputs, start = [], 0
    groups = _groups(row_lengths)
    for group in groups:
        tokens = sum(group)
        mine = tuple(x[start : start + tokens] for x in (q, k, v))
        if len(groups) > 1 and min(group) == max(group):
            mine = tuple(x.clone() for x in mine)  # a view of few rows would keep all rows' values for the backward
        outputs.append(_group_attention(mine[0], mine[1], mine[2], group, scale, window))
        start += tokens
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _groups(row_lengths: Sequence[int]) -> list[list[int]]:
    """Neighbouring rows of like length. (pack() sorts by length, so neighbours are alike.)"""
    groups: list[list[int]] = []
    for length in row_lengths:
        if groups:
            longest, shortest = max(*groups[-1], length), min(*groups[-1], length)
            if longest - shortest <= _GROUP_SLACK * longest:
                groups[-1].append(length)
                continue
        groups.append([length])
    return groups


def _group_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, lengths: list[int], scale: float, window: int | None
) -> torch.Tensor:
    rows, width = len(lengths), max(lengths)
    even = all(n == width for n in lengths)
    place = None  # of each real token in the padded grid
    if not even:
        place = torch.cat([torch.arange(n, device=q.device) + r * width for r, n in enumerate(lengths)])

    def grid(x: torch.Tensor) -> torch.Tensor:  # [tokens, heads, dim] -> [rows, width, heads, dim]
        if place is not None:
            x = _Spread.apply(x, place, rows * width)
        return x.view(rows, width, *x.shape[1:])

    if window is not None and window >= width:  # causal sees less than the window
        window = None
    attend = _Products.apply if q.device.type == "cpu" and width <= _PRODUCTS_WIDTH else _sdpa
    flat = attend(grid(q), grid(k), grid(v), scale, window).reshape(rows * width, *q.shape[1:])
    return flat if place is None else flat[place]


class _Spread(torch.autograd.Function):
    """x [tokens, ...] -> [count, ...], zeros but for x at `place`. torch's index_copy would keep x for its backward,
    and with it the whole product of q, k and v that x is a view of."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(place)
        return x.new_zeros(count, *x.shape[1:]).index_copy_(0, place, x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return upstream[0].index_select(0, ctx.saved_tensors[0]), None, None


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None) -> torch.Tensor:
    """[rows, width, heads, dim] by torch's own attention."""
    heads = q.shape[2]
    mask = None if window is None else _causal_mask(q.shape[1], window, q.device)
    q, k, v = (_repeat_heads(x.transpose(1, 2), heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, scale=scale)
    return out.transpose(1, 2)


class _Products(torch.autograd.Function):
    """Attention on short rows by plain batched products, all heads of one kv head in one: on a CPU about twice as fast
    as torch's fused attention forward, and several times backward. The weights are kept, [width] a head and token.

        q [rows, width, heads, dim] -> [rows * kv, width * group, dim]      group = heads / kv
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int | None
    ) -> torch.Tensor:
        ctx.shape, ctx.scale = q.shape, scale
        q, k, v = (_by_kv_head(x, k.shape[2]) for x in (q, k, v))
        width = k.shape[1]
        scores = _scores(q, k).view(len(q), width, -1, width).mul_(scale)
        unseen = ~_causal_mask(width, window, q.device)
        weights = scores.masked_fill_(unseen[:, None], float("-inf")).softmax(-1).to(q.dtype).view(len(q), -1, width)
        ctx.save_for_backward(q, k, v, weights)
        return _by_row(torch.bmm(weights, v), ctx.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        rows, width, _, dim = ctx.shape
        kv = len(k) // rows
        upward = _by_kv_head(upstream[0], kv)
        to_v = torch.bmm(weights.transpose(1, 2), upward)
        exact = torch.promote_types(q.dtype, torch.float32)
        wide, slope = weights.to(exact), torch.bmm(upward, v.transpose(1, 2)).to(exact)
        mean = torch.linalg.vecdot(slope, wide)[..., None]
        to_scores = slope.sub_(mean).mul_(wide).mul_(ctx.scale).to(q.dtype)
        to_q, to_k = torch.bmm(to_scores, k), torch.bmm(to_scores.transpose(1, 2), q)
        narrow = (rows, width, kv, dim)
        return _by_row(to_q, ctx.shape), _by_row(to_k, narrow), _by_row(to_v, narrow), None, None


def _scores(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q @ k' of batches, [b, m, n] in float32 also where the product's own type is narrower: rounded scores would
    move the softmax. What the first product lost in rounding, the second gives."""
    high = torch.bmm(q, k.transpose(1, 2))
    if torch.finfo(q.dtype).bits >= 32:
        return high
    return high.float().add_(torch.baddbmm(high, q, k.transpose(1, 2), beta=-1))


def _by_kv_head(x: torch.Tensor, kv: int) -> torch.Tensor:
    """[rows, width, heads, dim] -> [rows * kv, width * heads / kv, dim]; a view where kv is 1."""
    rows, width, heads, dim = x.shape
    return x.view(rows, width, kv, heads // kv, dim).transpose(1, 2).reshape(rows * kv, -1, dim)


def _by_row(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The inverse."""
    rows, width, heads, dim = shape
    kv = len(x) // rows
    return x.view(rows, kv, width, heads // kv, dim).transpose(1, 2).reshape(shape)


def _repeat_heads(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[rows, kv_heads, width, dim] -> [rows, heads, width, dim]: query head h reads kv head h // (heads / kv_heads)."""
    rows, kv, width, dim = x.shape
    if kv == heads:
        return x
    return x[:, :, None].expand(rows, kv, heads // kv, width, dim).reshape(rows, heads, width, dim)


def _causal_mask(width: int, window: int | None, device: torch.device) -> torch.Tensor:
    i = torch.arange(width, device=device)
    seen = i[None, :] <= i[:, None]
    return seen if window is None else seen & (i[:, None] - i[None, :] < window)


def packed_attention_plain(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> torch.Tensor:
    """The definition: one dense [tokens, tokens] mask, scores and softmax written out. Same shapes as the fast way."""
    tokens, heads, _ = q.shape
    row_of = torch.repeat_interleave(
        torch.arange(len(row_lengths), device=q.device), torch.tensor(list(row_lengths), device=q.device)
    )
    seen = _causal_mask(tokens, window, q.device) & (row_of[:, None] == row_of[None, :])
    keys = k.repeat_interleave(heads // k.shape[1], dim=1)
    values = v.repeat_interleave(heads // v.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("hqk,khd->qhd", F.dropout(weights, dropout), values)
