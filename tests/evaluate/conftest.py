"""A small run on the tiny model, evaluated once with everything that can be measured."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import lora_cmqa
from lora_cmqa.config import Config, EvaluateConfig, parse
from lora_cmqa.data.prepare import prepare

EVERYTHING = EvaluateConfig(max_new_tokens=4, rank_candidates=5, probe_shots=1, bootstrap_samples=200)


def write_csv(file: Path, rows: list[tuple]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(rows)


@pytest.fixture(scope="session")
def home(tmp_path_factory) -> Path:
    """home/data (prepared), home/run (three steps), home/probe; one test question nearly stands in train."""
    home = tmp_path_factory.mktemp("evaluate")
    parts, feelings, advice = "头胸腹背腰腿手脚眼耳", "疼痒麻胀", "多休息少吃辣喝温水早睡觉"
    asked = [(i, f"{parts[i % 10]}部第{i}天不舒服，夜里{feelings[i % 4]}，是怎么回事？") for i in range(40)]
    asked[39] = (39, asked[0][1] + "急")
    told = [(100 + i, i, f"您好，{q[:2]}的情况第{i}次见到，{advice[i % 9 : i % 9 + 3]}。") for i, q in asked]
    told += [(200, 38, "另一位医生的回答，要注意保暖。")]
    write_csv(home / "cmqa/questions.csv", [("question_id", "content"), *asked])
    write_csv(home / "cmqa/answers.csv", [("ans_id", "question_id", "content"), *told])
    splits = [(i, "train" if i < 28 else "dev" if i < 30 else "test") for i, _ in asked]
    write_csv(home / "cmqa/splits.csv", [("question_id", "split"), *splits])
    prepare(home / "cmqa", home / "data")
    questions = [(i, f"第{i}题", "甲", "乙", "丙", "丁", "ABCD"[i % 4]) for i in range(6)]
    write_csv(home / "probe/val/logic_val.csv", [("id", "question", "A", "B", "C", "D", "answer"), *questions])
    write_csv(home / "probe/dev/logic_dev.csv", [("id", "question", "A", "B", "C", "D", "answer"), *questions[:2]])
    words = ["--model", "tiny", "--dtype", "float32", "--data", str(home / "data"), "--output-dir", str(home / "run")]
    words += ["--r", "4", "--max-steps", "3", "--learning-rate", "2e-2", "--train.max-tokens", "512"]
    lora_cmqa.train(parse(Config, words))
    return home


@pytest.fixture(scope="session")
def everything(home: Path) -> EvaluateConfig:
    return replace(EVERYTHING, probe=str(home / "probe"))


@pytest.fixture(scope="session")
def evaluated(home: Path, everything: EvaluateConfig) -> dict[str, Any]:
    """What `evaluate` returned; its files are in home/run/eval/test."""
    report = lora_cmqa.evaluate(home / "run", home / "data", everything, device="cpu")
    assert json.loads((home / "run/eval/test/report.json").read_text(encoding="utf-8")) == report
    return report
