"""Rows and settings that every test of this room uses: seconds on one core."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lora_cmqa.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from lora_cmqa.core import Example, Message

TOPICS = ("头痛", "发烧", "咳嗽", "失眠", "胃痛")


def examples(count: int) -> list[Example]:
    """Rows of different lengths, some close to each other, so that packs and attention groups vary."""
    rows = []
    for i in range(count):
        topic = TOPICS[i % len(TOPICS)]
        question = Message("user", f"{topic}第{i}天，怎么办？")
        answer = Message("assistant", f"{topic}要多休息。" + "必要时就医。" * (i % 4))
        rows.append(Example((question, answer), id=f"row-{i}", question_id=f"q-{i}"))
    return rows


@pytest.fixture
def rows_file(tmp_path: Path) -> Path:
    """24 rows as the seed's conversations JSON."""
    file = tmp_path / "rows.json"
    content = [
        {"id": e.id, "conversations": [{"from": m.role, "value": m.content} for m in e.messages]} for e in examples(24)
    ]
    file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return file


@pytest.fixture
def settings(tmp_path: Path, rows_file: Path) -> Callable[..., Config]:
    """settings(max_steps=3) -> Config of the tiny model on those rows, into tmp_path/run."""

    def make(**train: object) -> Config:
        base = TrainConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=4,
            gradient_accumulation_steps=1,
            learning_rate=5e-3,
            warmup_ratio=0.1,
            save_steps=2,
            eval_steps=2,
            max_tokens=256,
        )
        return Config(
            model=ModelConfig(name_or_path="tiny", dtype="float32", device="cpu"),
            data=DataConfig(path=str(rows_file), dev_fraction=0.2),
            lora=LoraConfig(r=4, lora_dropout=0.1),
            train=replace(base, **train),  # type: ignore[arg-type]
        )

    return make
