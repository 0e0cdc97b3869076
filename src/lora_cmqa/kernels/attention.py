"""Causal attention over rows that lie end to end, where no row sees another.

    row_lengths (3, 2)         packed_attention_plain          packed_attention
                               one dense mask                  rows of like length side by side
        q k v of 5 tokens      1 . . . .                       1 . .    1 . -
                               1 1 . . .                       1 1 .    1 1 -
                               1 1 1 . .                       1 1 1    - - -
                               . . . 1 .
                               . . . 1 1

Padding stands on the right of a shorter row only inside a group, so under a causal mask no real token sees it.

A part may continue an earlier one (parents): its tokens see those before them in it, and all of its ancestors.

    lengths (2, 2, 1)          1 . . . .       part 0: a question           queries of part 1, keys 0 1 | 2 3
    parents (-1, 0, 0)         1 1 . . .                                                        1 1   1 .
                               1 1 1 . .       part 1: an answer                                1 1   1 1
                               1 1 1 1 .
                               1 1 . . 1       part 2: another answer
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

# Rows of one group differ in length by at most this share of the longest: beyond it padding costs more than calls.
_GROUP_SLACK = 0.125
# Longest row (padded) of the way by products, which keeps width weights a head and token.
_PRODUCTS_WIDTH = 512
_WIDEST_HEAD = 256  # of FlashAttention


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
    parents: Sequence[int] = (),
) -> torch.Tensor:
    """q [tokens, heads, dim], k and v [tokens, kv_heads, dim] -> [tokens, heads, dim], same dtype.

    parents  of each part the part it continues, or -1; empty: every part is a row by itself
    window   a token sees itself and the window - 1 tokens before it (Gemma 3, Mistral); None: the whole row
    softcap  scores become softcap * tanh(scores / softcap) (Gemma 2); takes the plain way
    """
    if softcap is not None or dropout > 0:
        return packed_attention_plain(
            q, k, v, row_lengths, scale=scale, window=window, softcap=softcap, dropout=dropout, parents=parents
        )
    if parents:
        return _tree_attention(q, k, v, row_lengths, parents, scale, window)
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


def packed_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    row_lengths: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    **others: Any,
) -> torch.Tensor:
    """`packed_attention` by torch's own FlashAttention over rows of any lengths (torch.nn.attention.varlen, GPU, 16
    bits): nothing is padded or grouped. What it has no word for (wide heads, and all `others`: trees, softcap,
    dropout) goes the other way."""
    if any(others.values()) or q.shape[-1] > _WIDEST_HEAD or q.shape[-1] % 8:
        return packed_attention(q, k, v, row_lengths, scale=scale, window=window, **others)
    from torch.nn.attention.varlen import varlen_attn

    ends, longest = _ends(tuple(row_lengths), q.device), max(row_lengths)
    seen = (-1 if window is None else window - 1, 0)  # tokens before and after one's own
    out: torch.Tensor = varlen_attn(
        q, k, v, ends, ends, longest, longest, scale=scale, window_size=seen, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out


@functools.lru_cache(maxsize=4)  # every layer of a pack asks again
def _ends(row_lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """int32 [rows + 1]: where each row begins, and where the last ends."""
    return torch.tensor(list(itertools.accumulate(row_lengths, initial=0)), dtype=torch.int32, device=device)


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
    seen = _causal_mask(width, window, q.device)[None]
    flat = _attend(grid(q), grid(k), grid(v), seen, scale, causal=window is None).reshape(rows * width, *q.shape[1:])
    return flat if place is None else _Gather.apply(flat, place)


def _tree_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: Sequence[int],
    parents: Sequence[int],
    scale: float,
    window: int | None,
) -> torch.Tensor:
    """Parts of like length with ancestors of like length side by side: their own tokens are the queries, keys are
    ancestors' tokens (right-aligned) and their own (left-aligned), so distances within the grid are the real ones.

    All groups' grids are filled at once: filled one by one, each would add a gradient of the whole pack's size."""
    layout = _tree_layout(tuple(lengths), tuple(parents), window, q.device)
    asked = [rows * width for rows, width, _ in (seen.shape for seen in layout.seen)]
    read = [rows * reach for rows, _, reach in (seen.shape for seen in layout.seen)]
    queries = _Spread.apply(q, layout.place, sum(asked)).split(asked)
    keys, values = (x.index_select(0, layout.keys).split(read) for x in (k, v))
    outputs = []
    for some_q, some_k, some_v, seen in zip(queries, keys, values, layout.seen, strict=True):
        some_q, some_k, some_v = (x.view(len(seen), -1, *x.shape[1:]) for x in (some_q, some_k, some_v))
        outputs.append(_attend(some_q, some_k, some_v, seen, scale, causal=False).reshape(-1, *q.shape[1:]))
    return _Gather.apply(torch.cat(outputs), layout.place)


class _TreeLayout(NamedTuple):
    """The grids of all groups, end to end."""

    place: torch.Tensor  # [tokens]: where each token stands as a query
    keys: torch.Tensor  # [keys]: the token that stands at each place; 0, never looked at, where a grid is padded
    seen: tuple[torch.Tensor, ...]  # of each group bool [rows, width, reach]


@functools.lru_cache(maxsize=4)  # every layer of a pack asks again, some with a window
@torch.inference_mode(mode=False)  # a training step may follow an evaluation of the same pack
def _tree_layout(
    lengths: tuple[int, ...], parents: tuple[int, ...], window: int | None, device: torch.device
) -> _TreeLayout:
    starts = list(itertools.accumulate(lengths, initial=0))
    own = [list(range(starts[i], starts[i + 1])) for i in range(len(lengths))]
    before: list[list[int]] = []  # places of all ancestors' tokens
    for parent in parents:
        before.append([*before[parent], *own[parent]] if parent >= 0 else [])
    order = sorted(range(len(lengths)), key=lambda i: (len(before[i]), lengths[i]), reverse=True)
    keys, place, asked, masks = list[int](), [0] * starts[-1], 0, []
    for part in _alike(order, lambda i: (len(before[i]), lengths[i])):
        ahead, width = max(len(before[i]) for i in part), max(lengths[i] for i in part)
        for i in part:
            place[starts[i] : starts[i + 1]] = range(asked, asked + lengths[i])
            asked += width
            keys += [0] * (ahead - len(before[i])) + before[i] + own[i] + [0] * (width - lengths[i])
        first = torch.tensor([ahead - len(before[i]) for i in part], device=device)
        at = torch.arange(ahead + width, device=device)
        distance = torch.arange(ahead, ahead + width, device=device)[:, None] - at
        masks.append((distance >= 0) & (distance < (window or ahead + width)) & (at >= first[:, None, None]))
    return _TreeLayout(torch.tensor(place, device=device), torch.tensor(keys, device=device), tuple(masks))


def _alike(order: Sequence[int], sizes: Callable[[int], tuple[int, ...]]) -> list[list[int]]:
    """Neighbours of `order` whose sizes all differ by at most the slack."""
    groups: list[list[int]] = []
    for i in order:
        if groups and all(
            max(many) - min(many) <= _GROUP_SLACK * max(many)
            for many in zip(*(sizes(j) for j in (*groups[-1], i)), strict=True)
        ):
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float, *, causal: bool
) -> torch.Tensor:
    """q [rows, asked, heads, dim], k and v [rows, width, kv, dim], seen bool [rows or 1, asked, width] -> like q."""
    if q.device.type == "cpu" and k.shape[1] <= _PRODUCTS_WIDTH:
        return _Products.apply(q, k, v, seen, scale)
    heads = q.shape[2]
    q, k, v = (_repeat_heads(x.transpose(1, 2), heads) for x in (q, k, v))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=None if causal else seen[:, None], is_causal=causal, scale=scale
    )
    return out.transpose(1, 2)


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


class _Gather(torch.autograd.Function):
    """The inverse of _Spread: x [count, ...] at `place`, each place once."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(place)
        ctx.count = len(x)
        return x.index_select(0, place)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        out = upstream[0].new_zeros(ctx.count, *upstream[0].shape[1:])
        return out.index_copy_(0, ctx.saved_tensors[0], upstream[0]), None


class _Products(torch.autograd.Function):
    """Attention on short rows by plain batched products, all heads of one kv head in one: on a CPU about twice as fast
    as torch's fused attention forward, and several times backward. The weights are kept, [width] a head and token.

        q [rows, asked, heads, dim] -> [rows * kv, asked * group, dim]      group = heads / kv
    """

    @staticmethod
    def forward(
        ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float
    ) -> torch.Tensor:
        ctx.shape, ctx.scale = q.shape, scale
        rows, asked, _, _ = q.shape
        q, k, v = (_by_kv_head(x, k.shape[2]) for x in (q, k, v))
        scores = _scores(q, k).mul_(scale)
        width = k.shape[1]
        scores.view(rows, -1, asked, q.shape[1] // asked, width).masked_fill_(~seen[:, None, :, None], float("-inf"))
        weights = scores.softmax(-1).to(q.dtype)
        ctx.save_for_backward(q, k, v, weights)
        return _by_row(torch.bmm(weights, v), ctx.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, weights = ctx.saved_tensors
        rows, _, _, dim = ctx.shape
        kv = len(k) // rows
        upward = _by_kv_head(upstream[0], kv)
        to_v = torch.bmm(weights.transpose(1, 2), upward)
        exact = torch.promote_types(q.dtype, torch.float32)
        wide, slope = weights.to(exact), torch.bmm(upward, v.transpose(1, 2)).to(exact)
        mean = torch.linalg.vecdot(slope, wide)[..., None]
        to_scores = slope.sub_(mean).mul_(wide).mul_(ctx.scale).to(q.dtype)
        to_q, to_k = torch.bmm(to_scores, k), torch.bmm(to_scores.transpose(1, 2), q)
        narrow = (rows, k.shape[1], kv, dim)
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
    parents: Sequence[int] = (),
) -> torch.Tensor:
    """The definition: one dense [tokens, tokens] mask, scores and softmax written out. Same shapes as the fast way."""
    heads = q.shape[1]
    seen = _dense_mask(row_lengths, parents or [-1] * len(row_lengths), window).to(q.device)
    keys = k.repeat_interleave(heads // k.shape[1], dim=1)
    values = v.repeat_interleave(heads // v.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(q.dtype)
    return torch.einsum("hqk,khd->qhd", F.dropout(weights, dropout), values)


def _dense_mask(lengths: Sequence[int], parents: Sequence[int], window: int | None) -> torch.Tensor:
    """bool [tokens, tokens]: row t sees column s."""
    parts = len(lengths)
    related, offset = torch.eye(parts, dtype=torch.bool), torch.zeros(parts, dtype=torch.long)
    for i, parent in enumerate(parents):
        if parent >= 0:
            related[i] |= related[parent]
            offset[i] = offset[parent] + lengths[parent]
    part_of = torch.repeat_interleave(torch.arange(parts), torch.tensor(list(lengths)))
    position = torch.cat([torch.arange(n) for n in lengths]) + offset[part_of]
    distance = position[:, None] - position
    return related[part_of][:, part_of] & (distance >= 0) & (distance < (window or len(position)))
