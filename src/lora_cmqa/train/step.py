"""One optimizer step: its rows forward and backward pack by pack, clip, update.

    loss of the step = sum over the supervised tokens of all its packs / their number in the whole step

The division is by the step's own count, so how the rows are cut into packs changes no gradient.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from ..core import Batch
from ..lora.decoder import pack_losses
from ..lora.inject import lora_parameters
from .optim import clip_by_global_norm


@dataclass(frozen=True, slots=True)
class StepResult:
    loss: float  # nats per supervised token, before the update
    grad_norm: float  # L2 over all that is trained, before clipping

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


def train_step(
    model: Any, batch: Batch, optimizer: torch.optim.Optimizer, *, learning_rate: float, max_grad_norm: float = 1.0
) -> StepResult:
    """Update what is trained with the rows of `batch`.

    A result that is not finite was not applied: weights, moments and the optimizer's count are as before.
    """
    model.train()
    optimizer.zero_grad()
    total = backward(model, batch)
    norm = clip_by_global_norm(lora_parameters(model), max_grad_norm)
    result = StepResult(loss=float(total) / batch.step_supervised_tokens, grad_norm=float(norm))
    if result.is_finite:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        optimizer.step()
    optimizer.zero_grad()  # gradients are not held through an evaluation or a save
    return result


def backward(model: Any, batch: Batch) -> torch.Tensor:
    """Add the gradient of the step's loss to `.grad`; the sum of this rank's token losses, float64, 0-dim."""
    total = torch.zeros((), dtype=torch.float64)
    for pack in batch.packs:
        losses = pack_losses(model, pack)
        (losses.sum() / batch.step_supervised_tokens).backward()
        total = total.to(losses.device) + losses.detach().double().sum()
    return total
