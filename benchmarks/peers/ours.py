"""Ours as `cmqa train` runs it, and with one feature off."""

from __future__ import annotations

from typing import Any

from lora_cmqa.core import TokenizedExample
from lora_cmqa.data.stream import BatchStream
from lora_cmqa.kernels.table import check_kernels, chosen_ways
from lora_cmqa.lora import decoder
from lora_cmqa.lora.family import Unsupported
from lora_cmqa.lora.inject import inject_lora, lora_parameters
from lora_cmqa.train.optim import Schedule, adamw
from lora_cmqa.train.step import train_step

from .setting import ROWS_PER_STEP, Clock, Setting

MAX_TOKENS = 2048  # TrainConfig's own


def train(
    setting: Setting,
    model: Any,
    rows: list[TokenizedExample],
    clock: Clock,
    *,
    own_forward: bool = True,
    shared_prefixes: bool = True,
    library_kernels: bool = True,
) -> None:
    found = check_kernels(clock.device, next(model.parameters()).dtype, stored=None if library_kernels else {})
    if "plain" in chosen_ways().values():
        raise SystemExit(f"a plain kernel would be measured: {found}")
    model = inject_lora(model, r=setting.r, lora_alpha=setting.lora_alpha)
    if setting.checkpointing:
        decoder.checkpoint_activations(model)
    if own_forward and (reason := decoder.why_plain(model)):
        raise SystemExit(f"the fast path is not taken: {reason}")
    read_body = decoder.read_body
    if not own_forward:
        decoder.read_body = _refuse
    stream = BatchStream(
        rows, rows_per_step=ROWS_PER_STEP, max_tokens=MAX_TOKENS, shared_prefixes=shared_prefixes, seed=setting.round
    )
    schedule = Schedule("cosine", setting.learning_rate, 0, stream.total_steps)
    optimizer, named = adamw(lora_parameters(model)), {row.id: row for row in rows}
    try:
        for batch, _ in stream:
            train_step(model, batch, optimizer, learning_rate=schedule.learning_rate_at(batch.step))
            clock.step([named[i] for i in batch.example_ids], batch.tokens)
    finally:
        decoder.read_body = read_body


def _refuse(*_: Any, **__: Any) -> Any:
    raise Unsupported("the benchmark asks for transformers' own forward")
