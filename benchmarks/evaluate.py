"""What `cmqa eval --quick` says of an adapter trained on true rows and of one trained on shuffled answers.

    python benchmarks/evaluate.py DATA --out FOLDER [--model embedded] [--rows 4000] [--probe DIR] [--only true]

DATA is a folder made by `cmqa prepare`. FOLDER/true and FOLDER/shuffled are runs of one epoch over the same questions;
in the second each question is taught with another question's answer, so nothing but style can be learned. Each is
evaluated on DATA's test rows, the first one twice: the files must be the same, byte for byte. Run again, it goes on
where it was stopped. One line for each adapter is added to benchmarks/results/evaluate.jsonl.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from result_line import keep, result_line, versions

from lora_cmqa.config import Config, DataConfig, EvaluateConfig, LoraConfig, ModelConfig, TrainConfig
from lora_cmqa.data.prepare import load_split
from lora_cmqa.data.sources import write_messages
from lora_cmqa.evaluate.evaluation import evaluate
from lora_cmqa.evaluate.nll import shuffled_pairs
from lora_cmqa.train.loop import train

FILES = ("report.json", "report.md", "report.html", "predictions.jsonl")


def make_rows(data: Path, out: Path, rows: int, seed: int, *, shuffled: bool) -> Path:
    """A folder with the first `rows` training rows of `data`, their answers shuffled or not; no dev set."""
    out.mkdir(parents=True, exist_ok=True)
    examples = load_split(data, "train")[:rows]
    write_messages(out / "train.jsonl", shuffled_pairs(examples, seed=seed) if shuffled else examples)
    return out


def settings(model: str, data: Path, run: Path, seed: int) -> Config:
    return Config(
        model=ModelConfig(name_or_path=model),
        data=DataConfig(path=str(data)),
        lora=LoraConfig(r=16, lora_alpha=32),
        train=TrainConfig(
            output_dir=str(run),
            per_device_train_batch_size=16,
            gradient_accumulation_steps=1,
            learning_rate=3e-4,
            save_steps=50,
            save_total_limit=1,
            seed=seed,
        ),
    )


def measure(run: Path, data: Path, e: EvaluateConfig, name: str) -> tuple[dict[str, Any], float]:
    started = time.perf_counter()
    report = evaluate(run, data, e, name=name)
    return report, time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--rows", type=int, default=4000)
    parser.add_argument("--probe", default=None)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--only", choices=("true", "shuffled"), default=None)
    args = parser.parse_args()
    quick = EvaluateConfig(quick=True, probe=args.probe)
    for kind in ("true", "shuffled"):
        if args.only not in (None, kind):
            continue
        rows = make_rows(args.data, args.out / f"data-{kind}", args.rows, args.seed, shuffled=kind == "shuffled")
        run = train(settings(args.model, rows, args.out / kind, args.seed))
        # as the run noted them: a stopped one was trained in several starts
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        trained = sum(step["time"]["seconds"] for step in steps)
        report, seconds = measure(run, args.data, quick, "quick")
        values: dict[str, Any] = {
            "verdict": report["verdict"],
            "forgetting": report["forgetting"],
            "safety": report["safety"],
            "metrics": report["metrics"],
            "train_seconds": round(trained, 1),
            "evaluate_seconds": round(seconds, 1),
        }
        if kind == "true":
            measure(run, args.data, quick, "quick-again")
            folders = [run / "eval" / name for name in ("quick", "quick-again")]
            values["same_bytes_twice"] = all(
                (folders[0] / f).read_bytes() == (folders[1] / f).read_bytes() for f in FILES
            )
        line = result_line(
            "evaluate",
            values,
            device=f"{platform.machine()}, {torch.get_num_threads()} threads",
            versions=versions("torch", "transformers", "peft", "sacrebleu", "jieba"),
            data=f"{args.data.name}: {len(load_split(rows, 'train'))} {kind} training rows, one epoch",
            settings={"model": args.model, "lora": {"r": 16, "lora_alpha": 32}, "train": {"learning_rate": 3e-4}}
            | {"evaluate": report["signature"]["sizes"]},
            seed=args.seed,
        )
        keep(line, "evaluate")
        print(json.dumps({"kind": kind, "verdict": report["verdict"], "seconds": round(seconds, 1)}))


if __name__ == "__main__":
    main()
