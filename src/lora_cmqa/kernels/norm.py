"""Root-mean-square norm that keeps its input and one number a row, and computes the rest again in the backward.

    y = x / sqrt(mean(x^2) + eps) * (offset + weight)        offset 0: Llama, Qwen      offset 1: Gemma

Sums are float32 for 16-bit input (float64 for float64). The weight is frozen and gets no gradient.
"""

from __future__ import annotations

from typing import Any

import torch


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """x [..., width] -> [..., width] of its dtype; weight [width], or [heads, width] for x [..., heads, width]."""
    return _RmsNorm.apply(x, weight, eps, offset)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float) -> torch.Tensor:
        exact = torch.promote_types(x.dtype, torch.float32)
        wide = x.to(exact)
        inverse = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        ctx.offset = offset
        return (wide * inverse).mul_(_gain(weight, offset, exact)).to(x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        x, weight, inverse = ctx.saved_tensors
        direction = x.to(inverse.dtype) * inverse
        gradient = upstream[0].to(inverse.dtype) * _gain(weight, ctx.offset, inverse.dtype)
        along = (gradient * direction).mean(-1, keepdim=True)  # growing the whole row changes nothing
        return gradient.sub_(direction.mul_(along)).mul_(inverse).to(x.dtype), None, None, None


def _gain(weight: torch.Tensor, offset: float, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) + offset if offset else weight.to(dtype)


def rms_norm_plain(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """The definition, by autograd."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * (offset + weight.to(wide.dtype))).to(x.dtype)
