"""Root-mean-square norm that keeps its input and one number a row, and computes the rest again in the backward.

    y = x / sqrt(mean(x^2) + eps) * (offset + weight)        offset 0: Llama, Qwen      offset 1: Gemma

Sums are float32 for 16-bit input (float64 for float64). The weight is frozen and gets no gradient.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from .tiles import in_tiles, row_tiles


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x [..., width] -> [..., width] of its dtype; weight [width], or [heads, width] for x [..., heads, width]."""
    if x.requires_grad and torch.is_grad_enabled():
        return _RmsNorm.apply(x, weight, eps, offset)
    exact = torch.promote_types(x.dtype, torch.float32)
    gain = _gain(weight, offset, exact)

    def piece(rows: slice) -> torch.Tensor:
        wide = x[rows].to(exact)
        return (wide * _inverse(wide, eps)).mul_(gain).to(x.dtype)

    return in_tiles(piece, x, _row_bytes(x, exact), x.shape)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        gain, out = _gain(weight, offset, exact), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        inverse = torch.empty(*x.shape[:-1], 1, dtype=exact, device=x.device)
        for rows in row_tiles(x, _row_bytes(x, exact)):
            wide = x[rows].to(exact)
            inverse[rows] = _inverse(wide, eps)
            out[rows] = (wide * inverse[rows]).mul_(gain)
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        exact = inverse.dtype
        gain, out = _gain(weight, ctx.offset, exact), torch.empty(x.shape, dtype=x.dtype, device=x.device)
        for rows in row_tiles(x, _row_bytes(x, exact)):
            direction = x[rows].to(exact) * inverse[rows]
            gradient = upstream[0][rows].to(exact) * gain
            # Growing the whole row changes nothing, so what lies along it is taken out.
            along = torch.linalg.vecdot(gradient, direction).div_(x.shape[-1])[..., None]
            out[rows] = gradient.addcmul_(direction, along, value=-1).mul_(inverse[rows])
        return out, None, None, None


def _row_bytes(x: torch.Tensor, exact: torch.dtype) -> int:
    return math.prod(x.shape[1:]) * exact.itemsize


def _inverse(wide: torch.Tensor, eps: float) -> torch.Tensor:
    """1 / sqrt(mean(x^2) + eps) of each row, [..., 1]."""
    squares = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
    return squares.div_(wide.shape[-1]).add_(eps).rsqrt_()


def _gain(weight: torch.Tensor, offset: float, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) + offset if offset else weight.to(dtype)


def rms_norm_plain(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """The definition, by autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight.to(wide.dtype))).to(x.dtype)
