"""The seed's recipe by transformers' Trainer: every row padded to the full length, gradient checkpointing, 2 rows x 8.

What the seed's script passes on: bf16 where the device computes in it, model_max_length 512 (rows are padded to it),
gradient checkpointing with a gradient asked for at the embeddings, a cosine schedule.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback, TrainingArguments

from lora_cmqa.core import TokenizedExample
from lora_cmqa.models.load import computes_in_bfloat16

from .hf_loop import padded
from .setting import ROWS_PER_STEP, Clock, Setting


class _InOrder(Trainer):
    """The rows are shuffled already, the same for every way."""

    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


class _Steps(TrainerCallback):
    def __init__(self, rows: list[TokenizedExample], clock: Clock) -> None:
        self.rows, self.clock = rows, clock

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        done = state.global_step * ROWS_PER_STEP
        self.clock.step(self.rows[done - ROWS_PER_STEP : done])


def train(setting: Setting, model: Any, rows: list[TokenizedExample], clock: Clock) -> None:
    model.config.use_cache = False
    lora = LoraConfig(r=setting.r, lora_alpha=setting.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = get_peft_model(model, lora)
    wrapped.enable_input_require_grads()
    length = max(setting.max_length, setting.stretch)
    data = [{key: value[0] for key, value in padded([row], length, torch.device("cpu")).items()} for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=ROWS_PER_STEP // 2,
            num_train_epochs=1,
            learning_rate=setting.learning_rate,
            lr_scheduler_type="cosine",
            gradient_checkpointing=True,
            bf16=computes_in_bfloat16(clock.device),
            use_cpu=clock.device.type == "cpu",
            save_strategy="no",
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
        )
        _InOrder(wrapped, arguments, train_dataset=data, callbacks=[_Steps(rows, clock)]).train()
