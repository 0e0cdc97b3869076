"""The head and the loss on supervised rows only, without ever holding all logits.

    hidden [rows, width] -> by chunks: logits [chunk, vocabulary] -> loss of each row, gradient to hidden -> forgotten

The gradient is made in the forward, while a chunk's logits are at hand; the backward only scales it.
The head's weight is frozen: where it is trained, the plain twin gives its gradient.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

CHUNK = 256  # rows of logits held at once
_TILE = 8  # rows of the softmax worked on at once: float32 tiles that stay in the cache


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk: int = CHUNK,
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """-log softmax(hidden @ weight.T)[targets] -> losses [rows], float32 (float64 for float64 input), in nats.

    hidden [rows, width], weight [vocabulary, width] of the same dtype, targets [rows] int64.
    scale multiplies the logits (Cohere's logit_scale), then softcap * tanh(logits / softcap) (Gemma 2).
    """
    if weight.requires_grad or softcap is not None:
        return linear_cross_entropy_plain(hidden, weight, targets, softcap=softcap, scale=scale)
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk, scale)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int, scale: float
    ) -> torch.Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)  # bf16 would lose the tail of the softmax
        rows, wants_grad = len(hidden), ctx.needs_input_grad[0]
        losses = torch.empty(rows, dtype=exact, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_grad else None
        buffer = torch.empty(min(chunk, rows), len(weight), dtype=hidden.dtype, device=hidden.device)
        tile = _TILE if hidden.device.type == "cpu" else chunk
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            logits = torch.mm(hidden[part], weight.t(), out=buffer[: part.stop - start])
            for t in range(0, len(logits), tile):
                some = logits[t : t + tile]
                losses[start + t : start + t + len(some)] = _loss_and_gradient(
                    some, targets[start + t : start + t + len(some)], scale, exact, wants_grad
                )
            if gradient is not None:
                torch.mm(logits, weight, out=gradient[part])
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        by_row = upstream[0].to(gradient.dtype)[:, None]
        return gradient * by_row, None, None, None, None


def _loss_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, scale: float, exact: torch.dtype, wants_grad: bool
) -> torch.Tensor:
    """Losses [rows] of a tile; with wants_grad it is overwritten by d loss / d logits = scale (softmax - onehot)."""
    z = logits.to(exact)
    if scale != 1:
        z = z * scale
    elif z is logits:
        z = z.clone()
    at = targets[:, None]
    largest = z.amax(1, keepdim=True)
    chosen = z.gather(1, at)
    total = z.sub_(largest).exp_().sum(1, keepdim=True)
    losses = (total.log() + largest - chosen)[:, 0]
    if wants_grad:
        z.div_(total).scatter_add_(1, at, torch.full_like(chosen, -1))
        logits.copy_(z if scale == 1 else z.mul_(scale))
    return losses


def linear_cross_entropy_plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
) -> torch.Tensor:
    """The definition: all logits at once, torch's cross_entropy."""
    logits = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32)) * scale
    if softcap is not None:
        logits = torch.tanh(logits / softcap) * softcap
    return F.cross_entropy(logits, targets, reduction="none")
