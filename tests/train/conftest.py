"""Rows, settings and child processes that every test of this room uses: seconds on one core."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lora_cmqa.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from lora_cmqa.core import Example, Message
from lora_cmqa.errors import CmqaError

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


# ---- children that may be killed, and what is left of a run --------------------------------------------------------


def in_a_child(work: Callable[[], object], *, seconds: float = 60) -> int:
    """Run `work` in a forked copy of this process. Its exit code, or minus the signal's number."""
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        except CmqaError as e:
            print(e, file=sys.stderr)
            code = e.exit_code
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    for _ in range(int(seconds / 0.005)):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise TimeoutError(f"the child still ran after {seconds} s")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """OpenMP's threads do not live on in a forked child, so it computes with one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def without_time(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def outcome(run: Path) -> dict:
    """All that must not depend on how often a run was stopped."""
    from lora_cmqa.train.checkpoint import list_checkpoints

    last = list_checkpoints(run)[-1]
    return {
        "adapter": sha256(run / "adapter_model.safetensors"),
        "optimizer": sha256(last / "optimizer.safetensors"),
        "rng": json.loads((last / "rng_state.json").read_text()),
        "data": json.loads((last / "data_state.json").read_text()),
        "state": json.loads((run / "trainer_state.json").read_text()),
        "metrics": without_time(run),
        "card": (run / "README.md").read_text(),
        "files": sorted(str(p.relative_to(run)) for p in run.rglob("*") if "tensorboard" not in p.parts),
    }
