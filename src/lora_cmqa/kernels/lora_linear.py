"""Several projections of one input, each with its LoRA, as one product with a frozen joined weight.

    x [tokens, in]      weight [q + k + v, in]          y = [ q | k | v ]
                        A      [r_q + r_k + r_v, in]    h = s x A' in one product
                        B_q, B_k, B_v                   each adds h_i B_i' to its own columns of y

Kept for the backward: x and the r-wide h. The frozen weight gets no gradient, x only where it needs one.
A quantised weight (quantized.py) is written out for each product, part by part, and not kept.
With dropout each projection drops from x on its own, as PEFT's layers do; the mask is drawn again in the backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .quantized import Frozen, product, product_back, written_out


class LowRank(NamedTuple):
    """One adapter of one projection: adds scale * dropout(x) @ a.T @ b.T to columns [start, stop)."""

    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [stop - start, r]
    scale: float
    start: int
    stop: int
    dropout: float = 0.0


def lora_linear(
    x: torch.Tensor, weight: Frozen, bias: torch.Tensor | None, adapters: Sequence[LowRank]
) -> torch.Tensor:
    """x [tokens, in], frozen weight [out, in] and bias [out] -> [tokens, out] of x's dtype.

    A and B are cast to x's dtype; their gradients come in their own (float32 over a 16-bit base).
    """
    if not adapters and isinstance(weight, torch.Tensor):
        return F.linear(x, weight, bias)
    tensors = [t for adapter in adapters for t in adapter[:2]]
    return _LoraLinear.apply(x, weight, bias, [adapter._replace(a=None, b=None) for adapter in adapters], *tensors)


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: Frozen,
        bias: torch.Tensor | None,
        adapters: list[LowRank],
        *tensors: torch.Tensor,
    ) -> torch.Tensor:
        y = product(x, weight, bias)
        groups, kept = _groups(adapters), []
        for members, seed in groups:
            seen = _dropped(x, adapters[members[0]].dropout, seed)
            a = torch.cat([tensors[2 * i] * adapters[i].scale for i in members]).to(x.dtype)
            h = seen @ a.t()
            for i, low in zip(members, h.split([len(tensors[2 * i]) for i in members], 1), strict=True):
                y[:, adapters[i].start : adapters[i].stop].addmm_(low, tensors[2 * i + 1].to(x.dtype).t())
            kept += [a, h]
        ctx.save_for_backward(x if adapters else None, *tensors, *kept)
        ctx.weight, ctx.adapters, ctx.groups = weight, adapters, groups  # frozen, and not always one tensor
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        count = 2 * len(ctx.adapters)
        tensors, kept = others[:count], others[count:]
        dy, gradients = upstream[0], [None] * count
        dx = product_back(dy, ctx.weight) if ctx.needs_input_grad[0] else None
        for g, (members, seed) in enumerate(ctx.groups):
            a, h = kept[2 * g : 2 * g + 2]
            ranks = [len(tensors[2 * i]) for i in members]
            dh = torch.empty_like(h)
            for i, low, dlow in zip(members, h.split(ranks, 1), dh.split(ranks, 1), strict=True):
                own = dy[:, ctx.adapters[i].start : ctx.adapters[i].stop]
                b = tensors[2 * i + 1]
                torch.mm(own, b.to(x.dtype), out=dlow)
                gradients[2 * i + 1] = (own.t() @ low).to(b.dtype)
            p = ctx.adapters[members[0]].dropout
            da = (dh.t() @ _dropped(x, p, seed)).split(ranks)
            for i, part in zip(members, da, strict=True):
                gradients[2 * i] = part.to(tensors[2 * i].dtype) * ctx.adapters[i].scale
            if dx is not None:
                dx = dx.addmm_(dh, a) if not p else dx.add_(_dropped(dh @ a, p, seed))
        return dx, None, None, None, *gradients


def _groups(adapters: list[LowRank]) -> list[tuple[list[int], int]]:
    """(adapters that read the same input, seed of its dropout): all at once without dropout, else one by one.

    The seed is drawn from torch's own generator, so a run that puts its random state back draws the same masks.
    """
    if not any(adapter.dropout for adapter in adapters):
        return [(list(range(len(adapters))), 0)] if adapters else []
    seeds = torch.randint(2**62, (len(adapters),)).tolist()
    return [([i], seed) for i, seed in enumerate(seeds)]


def _dropped(x: torch.Tensor, p: float, seed: int) -> torch.Tensor:
    """x with each value set to 0 with probability p and the others divided by 1 - p; one seed, one mask."""
    if not p:
        return x
    generator = torch.Generator(device=x.device).manual_seed(seed)
    keep = torch.empty(x.shape, dtype=x.dtype, device=x.device).bernoulli_(1 - p, generator=generator)
    return keep.mul_(x).div_(1 - p)


def lora_linear_plain(
    x: torch.Tensor, weight: Frozen, bias: torch.Tensor | None, adapters: Sequence[LowRank]
) -> torch.Tensor:
    """The definition, by autograd: PEFT's arithmetic, projection by projection, in the adapters' own dtype."""
    y = F.linear(x, written_out(weight, x.dtype), bias)
    for a, b, scale, start, stop, dropout in adapters:
        change = F.dropout(x, dropout).to(a.dtype) @ a.t() @ b.t() * scale
        y = y + F.pad(change, (start, len(weight) - stop))
    return y.to(x.dtype)
