"""The head and the loss on supervised rows only, without ever holding all logits.

    hidden [rows, width] -> by chunks: logits [chunk, vocabulary] -> loss of each row, gradient to hidden -> forgotten

The gradient is made in the forward, while a chunk's logits are at hand; the backward only scales it.
The head's weight is frozen, but for single rows that may be trained; trained whole, the plain twin gives its gradient.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .tiles import rows_per_tile

CHUNK = 512  # rows of logits held at once; with fewer, a CPU packs the weight anew for too few products


class TrainedRows(NamedTuple):
    """What stands in place of the rows `ids` [n] of a head's weight: `values` [n, width], in any dtype."""

    ids: torch.Tensor
    values: torch.Tensor


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    chunk: int = CHUNK,
    softcap: float | None = None,
    scale: float = 1.0,
    rows: TrainedRows | None = None,
) -> torch.Tensor:
    """-log softmax(hidden @ weight.T)[targets] -> losses [rows], float32 (float64 for float64 input), in nats.

    hidden [rows, width], weight [vocabulary, width] of the same dtype, targets [rows] int64.
    scale multiplies the logits (Cohere's logit_scale), then softcap * tanh(logits / softcap) (Gemma 2).
    rows stand in for some of weight's; their values get a gradient, weight is not copied.
    """
    if weight.requires_grad:
        return linear_cross_entropy_plain(hidden, weight, targets, softcap=softcap, scale=scale, rows=rows)
    ids, values = rows if rows is not None else (None, None)
    return _LinearCrossEntropy.apply(hidden, weight, targets, chunk, softcap, scale, ids, values)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        softcap: float | None,
        scale: float,
        ids: torch.Tensor | None,
        values: torch.Tensor | None,
    ) -> torch.Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)  # bf16 would lose the tail of the softmax
        rows, wants_grad = len(hidden), ctx.needs_input_grad[0] or ctx.needs_input_grad[7]
        own = values.to(hidden.dtype) if values is not None else None
        slopes = hidden.new_empty(rows, len(own)) if own is not None and wants_grad else None  # d loss / d their logits
        losses = torch.empty(rows, dtype=exact, device=hidden.device)
        gradient = torch.empty_like(hidden) if wants_grad else None
        tile = rows_per_tile(hidden.device, len(weight) * exact.itemsize) or chunk  # of the softmax
        # Both buffers are made once: asking for megabytes anew for each tile costs more than the softmax itself.
        buffer = hidden.new_empty(min(chunk, rows), len(weight))
        scratch = None if exact == hidden.dtype else hidden.new_empty(min(tile, chunk, rows), len(weight), dtype=exact)
        for start in range(0, rows, chunk):
            part = slice(start, min(start + chunk, rows))
            logits = torch.mm(hidden[part], weight.t(), out=buffer[: part.stop - start])
            if own is not None:
                logits[:, ids] = hidden[part] @ own.t()
            for first in range(0, len(logits), tile):
                some = logits[first : first + tile]
                here = slice(start + first, start + first + len(some))
                z = some if scratch is None else scratch[: len(some)].copy_(some)
                losses[here] = _losses_in_place(z, targets[here], softcap, scale, wants_grad)
                if scratch is not None and wants_grad:
                    some.copy_(z)
            if gradient is None:
                continue
            if own is None or slopes is None:
                torch.mm(logits, weight, out=gradient[part])
            else:
                slopes[part] = logits[:, ids]
                logits[:, ids] = 0
                torch.mm(logits, weight, out=gradient[part]).addmm_(slopes[part], own)
        ctx.save_for_backward(gradient, slopes, hidden if slopes is not None else None)
        ctx.values_dtype = values.dtype if values is not None else None
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, slopes, hidden = ctx.saved_tensors
        each = upstream[0].to(gradient.dtype)[:, None]
        of_rows = ((slopes * each).t() @ hidden).to(ctx.values_dtype) if slopes is not None else None
        return gradient * each, None, None, None, None, None, None, of_rows


def _losses_in_place(
    z: torch.Tensor, targets: torch.Tensor, softcap: float | None, scale: float, wants_grad: bool
) -> torch.Tensor:
    """Losses [rows] of the raw logits z [rows, vocabulary], which are overwritten: with wants_grad by
    d loss / d z = (softmax - onehot) * scale * (1 - tanh^2), else by nothing of use."""
    if scale != 1:
        z.mul_(scale)
    slope = None
    if softcap is not None:
        z.div_(softcap).tanh_()
        slope = 1 - z.square() if wants_grad else None
        z.mul_(softcap)
    at = targets[:, None]
    largest = z.amax(1, keepdim=True)
    chosen = z.gather(1, at)
    total = z.sub_(largest).exp_().sum(1, keepdim=True)
    losses = (total.log() + largest - chosen)[:, 0]
    if wants_grad:
        z.div_(total).scatter_add_(1, at, torch.full_like(chosen, -1))
        if slope is not None:
            z.mul_(slope)
        if scale != 1:
            z.mul_(scale)
    return losses


def linear_cross_entropy_plain(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    rows: TrainedRows | None = None,
) -> torch.Tensor:
    """The definition: the weight with its rows, all logits at once, torch's cross_entropy."""
    if rows is not None:
        weight = weight.index_copy(0, rows.ids, rows.values.to(weight.dtype))
    logits = F.linear(hidden, weight).to(torch.promote_types(hidden.dtype, torch.float32))
    return F.cross_entropy(shaped_logits(logits, scale, softcap), targets, reduction="none")


def shaped_logits(logits: torch.Tensor, scale: float, softcap: float | None) -> torch.Tensor:
    """scale x logits, then softcap x tanh(logits / softcap), each where a family has it."""
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap
