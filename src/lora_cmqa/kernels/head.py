"""The head and the loss on supervised rows only, without ever holding all logits.

    hidden [rows, width] -> by pieces: logits [some rows, some of the vocabulary] -> loss, gradient to hidden

The gradient is made in the forward, while a piece's logits are at hand; the backward only scales it.
The head's weight is frozen, but for single rows that may be trained; trained whole, the plain twin gives its gradient.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from .tiles import rows_per_tile

CHUNK = 512  # rows of logits held at once; with fewer, a CPU packs the weight anew for too few products
_COLUMNS = 8192  # of the vocabulary at a time on a CPU: logits and their part of the weight stay in the third cache
_LOG2_E = math.log2(math.e)


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
        wants_grad = ctx.needs_input_grad[0] or ctx.needs_input_grad[7]
        own = values.to(hidden.dtype) if values is not None else hidden.new_empty(0, hidden.shape[1])
        pieces = _Pieces(weight, ids if ids is not None else targets[:0], own, softcap, scale, wants_grad)
        parts = [pieces.of(h, t) for h, t in zip(hidden.split(chunk), targets.split(chunk), strict=True)]
        losses, gradient, slopes = (torch.cat(made) for made in zip(*parts, strict=True))
        ctx.save_for_backward(gradient, *((slopes, hidden) if values is not None else ()))
        ctx.values_dtype = values.dtype if values is not None else None
        return losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradient, *of_values = ctx.saved_tensors
        each = upstream[0].to(gradient.dtype)[:, None]
        of_rows = None
        if of_values:
            slopes, hidden = of_values
            of_rows = ((slopes * each).t() @ hidden).to(ctx.values_dtype)
        return gradient * each, None, None, None, None, None, None, of_rows


class _Pieces:
    """Logits of some rows and some of the vocabulary at a time, each a small softmax of its own; they are put together
    by their shares of the whole (as in online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867):

        whole = softmax over all            piece = softmax over some, its normaliser n = log sum exp
        N = log sum exp of all n            whole = piece * exp(n - N)

    The target's own column is left out of the pieces' products: softmax - 1 would be rounded where it is near 0.
    """

    def __init__(
        self,
        weight: torch.Tensor,
        ids: torch.Tensor,
        own: torch.Tensor,
        softcap: float | None,
        scale: float,
        wants_grad: bool,
    ) -> None:
        self.weight, self.ids, self.own = weight, ids, own
        self.softcap, self.scale, self.wants_grad = softcap, scale, wants_grad
        self.exact = torch.promote_types(weight.dtype, torch.float32)  # bf16 would lose the tail of the softmax
        self.columns = min(_COLUMNS, len(weight)) if weight.device.type == "cpu" else len(weight)
        # Buffers are made once: asking for megabytes anew for each piece costs more than its softmax.
        self.buffer, self.scratch = weight.new_empty(0), weight.new_empty(0, dtype=self.exact)

    def of(self, hidden: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of rows [n]: losses [n], d loss / d hidden [n, width], d loss / d logits of the rows `ids` [n, ids]."""
        n, own = len(hidden), self.own
        normaliser = hidden.new_full((n, 1), float("-inf"), dtype=self.exact)
        chosen, at = torch.empty_like(normaliser), targets[:, None]
        gradient = torch.zeros(hidden.shape if self.wants_grad else (n, 0), dtype=self.exact, device=hidden.device)
        slopes, every_row = gradient.new_zeros(n, len(own)), torch.arange(n, device=hidden.device)
        self.buffer.resize_(n * self.columns)
        for start in range(0, len(self.weight), self.columns):
            weight = self.weight[start : start + self.columns]
            mine = ((self.ids >= start) & (self.ids < start + len(weight))).nonzero()[:, 0] if len(own) else self.ids
            logits = torch.mm(hidden, weight.t(), out=self.buffer[: n * len(weight)].view(n, len(weight)))
            if len(mine):
                logits[:, self.ids[mine] - start] = hidden @ own[mine].t()
            here, place = (at >= start) & (at < start + len(weight)), (at - start).clamp(0, len(weight) - 1)
            chosen = torch.where(here, logits.gather(1, place).to(self.exact), chosen)
            some = self._softmax_in_place(logits)
            whole = torch.logaddexp(normaliser, some)
            if self.wants_grad:
                logits[every_row, place[:, 0]] = logits.gather(1, place).masked_fill_(here, 0)[:, 0]
                before, share = (normaliser - whole).exp_(), (some - whole).exp_()
                if len(own):
                    slopes.mul_(before)
                if len(mine):
                    slopes[:, mine] = logits[:, self.ids[mine] - start].to(self.exact) * share
                    logits[:, self.ids[mine] - start] = 0
                gradient.mul_(before).addcmul_((logits @ weight).to(self.exact), share)
            normaliser = whole
        losses = normaliser - shaped_logits(chosen, self.scale, self.softcap)
        if self.wants_grad:
            at_target = (torch.exp(-losses) - 1) * self._slope(chosen)  # d loss / d logit
            is_own = at == self.ids
            slopes += is_own * at_target
            at_target = at_target.masked_fill(is_own.any(1, keepdim=True), 0)
            gradient.addcmul_(self.weight[targets].to(self.exact), at_target).addmm_(slopes, own.to(self.exact))
        return losses[:, 0], gradient.to(hidden.dtype), slopes.to(hidden.dtype)

    def _softmax_in_place(self, logits: torch.Tensor) -> torch.Tensor:
        """Raw logits [n, columns] -> log sum exp of each row [n, 1]; with wants_grad they are overwritten by
        softmax * d shaped / d raw, else by nothing of use. In tiles of rows that stay in the cache."""
        n, columns = logits.shape
        tile = rows_per_tile(logits.device, columns * self.exact.itemsize) or n
        normaliser = logits.new_empty(n, 1, dtype=self.exact)
        scratch = self.scratch.resize_(min(tile, n) * columns) if logits.dtype != self.exact else None
        for start in range(0, n, tile):
            some = logits[start : start + tile]
            z = some if scratch is None else scratch[: some.numel()].view(some.shape).copy_(some)
            slope = self._slope(z) if self.wants_grad and self.softcap is not None else self.scale
            if self.scale != 1:
                z.mul_(self.scale)
            if self.softcap is not None:
                z.div_(self.softcap).tanh_().mul_(self.softcap)
            largest = z.amax(1, keepdim=True)
            # 2^(x log2 e): on some processors torch's exp takes four times as long as its exp2
            total = z.sub_(largest).mul_(_LOG2_E).exp2_().sum(1, keepdim=True)
            normaliser[start : start + tile] = total.log() + largest
            if not self.wants_grad:
                continue
            z.div_(total)
            if self.softcap is not None or self.scale != 1:
                z.mul_(slope)
            if scratch is not None:
                some.copy_(z)
        return normaliser

    def _slope(self, raw: torch.Tensor) -> torch.Tensor:
        """d shaped / d raw logits: scale * (1 - tanh^2)."""
        if self.softcap is None:
            return torch.full_like(raw, self.scale)
        return (raw * (self.scale / self.softcap)).tanh_().square_().neg_().add_(1).mul_(self.scale)


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
