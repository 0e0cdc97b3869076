"""A run on a GPU with --deterministic that is killed and started again ends as the one left alone, byte for byte.

Each run is a process of its own: CUDA does not live on in a fork.
"""

from __future__ import annotations

import hashlib
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# Trains as the command line does, and kills itself with SIGKILL before the step that is named (0: never).
CHILD = """
import os, signal, sys
from lora_cmqa.cli import main
from lora_cmqa.train import loop

real = loop.train_step

def step(model, batch, *args, **kwargs):
    if batch.step == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(model, batch, *args, **kwargs)

loop.train_step = step
sys.exit(main(sys.argv[2:]))
"""


def train(data: Path, run: Path, *more: str, kill_before: int = 0, device: str = "cuda") -> int:
    words = ["train", "--model", "tiny-qwen3", "--data", data, "--output-dir", run, "--device", device, "--r", 4]
    words += [] if "--system" in more else ["--lora-dropout", 0.1]  # what rows share is computed once without it only
    words += ["--dev-fraction", 0.2, "--max-steps", 7, "--save-steps", 2, "--eval-steps", 2]
    words += ["--learning-rate", 0.05, "--per-device-train-batch-size", 4, "--gradient-accumulation-steps", 1]
    command = [sys.executable, "-c", CHILD, kill_before, *words, "--deterministic", *more]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return done.returncode


def end_of(run: Path) -> dict:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    files = (
        run / "adapter_model.safetensors",
        *(run / "checkpoint-7" / f for f in ("optimizer.safetensors", "rng_state.json")),
    )
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files} | {
        "metrics": [{k: v for k, v in line.items() if k != "time"} for line in lines]
    }


@pytest.mark.parametrize(
    "more",
    [("--dtype", "bfloat16"), ("--dtype", "float32"), ("--gradient-checkpointing",), ("--system", "你是一名医生。")],
    ids=str,
)
def test_case_39_a_killed_run_on_a_gpu_ends_as_the_one_left_alone(tmp_path, more):
    data = tmp_path / "rows.jsonl"
    turns = [(f"第{i // 2}天头痛，怎么办？", "要多休息。" + "必要时就医。" * (i % 4)) for i in range(24)]
    rows = [
        {"question_id": q, "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for q, a in turns
    ]
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    assert train(data, tmp_path / "whole", *more) == 0
    assert train(data, tmp_path / "run", *more, kill_before=5) == -signal.SIGKILL
    assert train(data, tmp_path / "run", *more) == 0
    assert end_of(tmp_path / "run") == end_of(tmp_path / "whole")
    assert json.loads((tmp_path / "run" / "checkpoint-7" / "rng_state.json").read_text())["cuda"] is not None
