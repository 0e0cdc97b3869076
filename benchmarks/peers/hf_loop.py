"""What a careful user writes with transformers and PEFT: dynamic padding, no checkpointing, AdamW, a plain loop.

Rows of a step are sorted by length before they are cut into micro-batches, so that padding is small; the loss is the
step's sum over supervised tokens divided by their number. Weights in bfloat16, or in float32 under autocast.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from lora_cmqa.core import TokenizedExample

from .setting import ROWS_PER_STEP, Clock, Setting

BATCHES, PRECISIONS = (1, 2, 4, 8), ("autocast", "bf16")


def padded(rows: list[TokenizedExample], length: int, device: torch.device) -> dict[str, torch.Tensor]:
    """input_ids, labels, attention_mask, each int64 [rows, length], padded on the right."""
    ids, labels = np.zeros((len(rows), length), np.int64), np.full((len(rows), length), -100, np.int64)
    real = np.zeros((len(rows), length), np.int64)
    for i, row in enumerate(rows):
        ids[i, : len(row)], labels[i, : len(row)], real[i, : len(row)] = row.input_ids, row.labels, 1
    arrays = {"input_ids": ids, "labels": labels, "attention_mask": real}
    return {name: torch.from_numpy(array).to(device) for name, array in arrays.items()}


def train(
    setting: Setting, model: Any, rows: list[TokenizedExample], clock: Clock, *, batch: int, autocast: bool
) -> None:
    lora = LoraConfig(r=setting.r, lora_alpha=setting.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, lora).train()
    if setting.checkpointing:
        model.gradient_checkpointing_enable()
        wrapped.enable_input_require_grads()
    trained = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=setting.learning_rate, weight_decay=0.0, fused=True)
    for start in range(0, len(rows), ROWS_PER_STEP):
        mine = rows[start : start + ROWS_PER_STEP]
        taught = sum(r.supervised_tokens for r in mine)
        by_length = sorted(mine, key=len)
        for first in range(0, len(mine), batch):
            some = by_length[first : first + batch]
            inputs = padded(some, max(map(len, some)), clock.device)
            with torch.autocast(clock.device.type, torch.bfloat16, enabled=autocast):
                # num_items_in_batch: transformers divides the sum by it instead of by the micro-batch's own count
                loss = wrapped(**inputs, use_cache=False, num_items_in_batch=taught).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        clock.step(mine)
