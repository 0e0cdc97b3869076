"""One optimizer step: its rows forward and backward pack by pack, clip, update.

    loss of the step = sum over the supervised tokens of all its packs / their number in the whole step

The division is by the step's own count, so how the rows are cut into packs changes no gradient. Where the memory does
not hold a pack, the same rows are cut smaller and the step's gradient starts again from zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..core import Batch, Pack
from ..errors import ResourceError
from ..kernels.head import CHUNK
from ..lora.decoder import pack_losses
from ..lora.inject import lora_parameters
from .checkpoint import restore_rng_state, rng_state
from .memory import is_out_of_memory
from .optim import clip_by_global_norm


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float  # nats per supervised token, before the update
    grad_norm: float  # L2 over all that is trained, before clipping

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    model: Any,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    *,
    learning_rate: float,
    max_grad_norm: float = 1.0,
    head_chunk: int = CHUNK,
    recut: Callable[[int], Batch] | None = None,
    after_forward: Callable[[Pack], None] = lambda _: None,
) -> StepResult:
    """Update what is trained with the rows of `batch`.

    A result that is not finite was not applied: weights, moments and the optimizer's count are as before.
    head_chunk  rows of logits held at once
    recut  `recut(max_tokens)` gives the rows of `batch` in packs of at most so many tokens; it is called when the
           memory runs out. Raises ResourceError when single rows do not fit either, or where there is no `recut`.
    after_forward  as in `backward`
    """
    model.train()
    optimizer.zero_grad()
    total = backward_that_fits(model, batch, optimizer, head_chunk, recut, after_forward)
    norm = clip_by_global_norm(lora_parameters(model), max_grad_norm)
    result = StepResult(loss=float(total) / batch.step_supervised_tokens, grad_norm=float(norm))
    if result.is_finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad()  # gradients are not held through an evaluation or a save
    return result


def backward_that_fits(
    model: Any,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    head_chunk: int,
    recut: Callable[[int], Batch] | None,
    after_forward: Callable[[Pack], None] = lambda _: None,
) -> torch.Tensor:
    """`backward`; where the memory runs out, from the beginning with the batch that `recut` gives (`train_step`)."""
    device = next(model.parameters()).device
    before = rng_state(device)
    while True:
        try:
            return backward(model, batch, head_chunk, after_forward)
        except Exception as e:
            if not is_out_of_memory(e):
                raise
            reason = str(e).strip().splitlines()[0][:200]
        # Past the handler: the exception's frames held the tensors of the failed pack.
        optimizer.zero_grad()  # a backward that broke off has added to some of them
        restore_rng_state(before, device)  # dropout by the cut alone, not by how far this try came
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        shared = [p.tokens for p in batch.packs if len(p.row_lengths) > 1]
        if recut is None or not shared:
            longest = max(p.tokens for p in batch.packs)
            raise ResourceError(
                f"the memory does not hold a micro-batch of {longest} tokens, which cannot be cut smaller ({reason})",
                hint="--gradient-checkpointing, a smaller --model-max-length or --lora.r; `cmqa plan` names every GiB. "
                "The same command resumes.",
            )
        batch = recut(max(shared) // 2)


def backward(
    model: Any, batch: Batch, head_chunk: int = CHUNK, after_forward: Callable[[Pack], None] = lambda _: None
) -> torch.Tensor:
    """Add the gradient of the step's loss to `.grad`; the sum of this rank's token losses, float64, 0-dim.

    `after_forward` is called with each pack while all that its backward needs is kept.
    """
    total = torch.zeros((), dtype=torch.float64)
    for pack in batch.packs:
        losses = pack_losses(model, pack, chunk=head_chunk)
        after_forward(pack)
        (losses.sum() / batch.step_supervised_tokens).backward()
        total = total.to(losses.device) + losses.detach().double().sum()
    return total
