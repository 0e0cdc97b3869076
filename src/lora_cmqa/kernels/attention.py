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
    rows, width, heads = len(lengths), max(lengths), q.shape[1]
    even = all(n == width for n in lengths)
    place = None  # of each real token in the padded grid
    if not even:
        place = torch.cat([torch.arange(n, device=q.device) + r * width for r, n in enumerate(lengths)])

    def grid(x: torch.Tensor) -> torch.Tensor:  # [tokens, heads, dim] -> [rows, heads, width, dim]
        if place is not None:
            x = _Spread.apply(x, place, rows * width)
        return x.view(rows, width, *x.shape[1:]).transpose(1, 2)

    mask = None
    if window is not None and window < width:  # shorter rows need none: causal sees less than the window
        mask = _causal_mask(width, window, q.device)
    out = F.scaled_dot_product_attention(
        grid(q),
        _repeat_heads(grid(k), heads),
        _repeat_heads(grid(v), heads),
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
    )
    flat = out.transpose(1, 2).reshape(rows * width, *q.shape[1:])
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
