"""The same training as transformers' Trainer: its losses in float32, its dev loss after an epoch in bfloat16.

    python benchmarks/parity.py                        what results/parity.jsonl lacks for this commit, and the table
    python benchmarks/parity.py --data runs/prepared   rows of a prepared folder instead of the embedded sample
    python benchmarks/parity.py --dry --model tiny --rows 32 --steps 2       seconds; writes nothing

Both begin at the same LoRA weights (the Trainer trains the very PEFT model that `cmqa train` makes) and take the same
rows in the same order, 16 a step. The Trainer pads; its bfloat16 is autocast over float32 weights, which hold the same
values. One evaluator, float32 with plain transformers, scores both adapters on the dev rows.

    float32          20 steps
    float32-loss64   the same, the Trainer's loss taken of its float32 logits widened to float64: on a CPU torch's
                     float32 log_softmax over 262,144 terms is off by 1.3e-5 by itself (docs/decisions/0005)
    bfloat16         an epoch
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peers.hf_loop import padded
from result_line import commit, keep, kept, result_line, versions
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from lora_cmqa.core import TokenizedExample
from lora_cmqa.data.prepare import load_split, prepare
from lora_cmqa.data.stream import BatchStream
from lora_cmqa.data.template import ChatTemplate, encode_all
from lora_cmqa.demo import SAMPLE
from lora_cmqa.lora.decoder import why_plain
from lora_cmqa.lora.inject import inject_lora, lora_parameters
from lora_cmqa.models.load import load_model, load_tokenizer
from lora_cmqa.train.loop import train_steps
from lora_cmqa.train.optim import Schedule, adamw

NAME = "parity"
ROWS_PER_STEP, MICRO = 16, 4
LEARNING_RATE, CLIP = 3e-4, 1.0
ADAM = {"weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8}  # the seed's
LORA: dict[str, Any] = {"r": 8, "lora_alpha": 16, "seed": 42}
DEVICE = torch.device("cpu")
BARS = {"float32": 1e-5, "float32-loss64": 1e-5, "bfloat16": 5e-3}  # losses of each step; dev loss after the epoch

Rows = Sequence[TokenizedExample]


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded")
    p.add_argument("--data", help="a folder that `cmqa prepare` made; default: the embedded sample")
    p.add_argument("--rows", type=int, help="of the training rows at most so many")
    p.add_argument("--dev-rows", type=int, default=100, help="of the dev rows at most so many")
    p.add_argument("--steps", type=int, default=20, help="of the comparison in float32")
    p.add_argument("--only", choices=BARS, action="append", help="of the three comparisons; again for another")
    p.add_argument("--threads", type=int, default=torch.get_num_threads())
    p.add_argument("--dry", action="store_true", help="write no line")
    asked = p.parse_args(argv)
    torch.set_num_threads(asked.threads)
    settings = {k: v for k, v in vars(asked).items() if k not in ("data", "dry", "threads", "only")}
    done = [] if asked.dry else [k for k in kept(NAME) if k["commit"] == commit() and k["settings"] == settings]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(asked.data or scratch)
        if not asked.data:
            prepare(SAMPLE, folder)
        train, dev = (read_rows(asked, folder, split) for split in ("train", "dev"))
    lines = []
    for way in asked.only or BARS:
        dtype = way.removesuffix("-loss64")
        found = next((k for k in done if k["way"] == way), None)
        if found is None:
            steps = asked.steps if dtype == "float32" else -(-len(train) // ROWS_PER_STEP)
            found = result_line(
                NAME,
                compare(asked.model, dtype, train[: steps * ROWS_PER_STEP], dev, steps, exact_loss=way != dtype),
                device={"kind": "cpu", "threads": asked.threads},
                versions=versions("torch", "transformers", "peft"),
                data=asked.data or "embedded sample",
                settings=settings,
                seed=LORA["seed"],
                way=way,
            )
            if not asked.dry:
                keep(found, NAME)
        lines.append(found)
        print(row_of(found, BARS[way]), flush=True)
    return lines


def read_rows(asked: argparse.Namespace, folder: Path, split: str) -> Rows:
    """The training rows in the order of a run's first epoch; the dev rows as they stand."""
    template = ChatTemplate.from_tokenizer(load_tokenizer(asked.model))
    rows, _ = encode_all(load_split(folder, split), template, max_length=512)
    if split == "dev":
        return rows[: asked.dev_rows]
    named = {row.id: row for row in rows}
    epoch = BatchStream(rows, rows_per_step=ROWS_PER_STEP, max_tokens=2048)
    return [named[i] for batch, _ in epoch for i in batch.example_ids][: asked.rows]


def compare(name: str, dtype: str, rows: Rows, dev: Rows, steps: int, *, exact_loss: bool) -> dict[str, Any]:
    ours, mine = by_us(name, dtype, rows, steps)
    theirs, his = by_trainer(name, dtype, rows, steps, of_float64_logits if exact_loss else None)
    apart = [abs(a - b) for a, b in zip(ours, theirs, strict=True)]
    distance = sum(float((mine[k] - his[k]).norm() ** 2) for k in mine) ** 0.5
    base = {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in mine.items()}
    scores = {who: dev_loss(name, adapter, dev) for who, adapter in (("base", base), ("ours", mine), ("trainer", his))}
    return {
        "steps": steps,
        "rows": len(rows),
        "dev_rows": len(dev),
        "losses_ours": [round(x, 7) for x in ours],
        "losses_trainer": [round(x, 7) for x in theirs],
        "loss_apart_most": max(apart),
        "adapter_apart": distance / sum(float(v.norm() ** 2) for v in his.values()) ** 0.5,
        "dev_loss": scores,
        "dev_loss_apart": abs(scores["ours"] - scores["trainer"]),
    }


def by_us(name: str, dtype: str, rows: Rows, steps: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(loss of each step, adapter). As `cmqa train` trains, but the rows are not shuffled again."""
    model = inject_lora(load_model(name, dtype=dtype)[0], **LORA)
    if reason := why_plain(model):
        raise SystemExit(f"the fast path is not taken: {reason}")
    stream = BatchStream(
        rows, rows_per_step=ROWS_PER_STEP, max_tokens=2048, max_steps=steps, order=list(range(len(rows)))
    )
    optimizer, schedule = adamw(lora_parameters(model), **ADAM), Schedule("cosine", LEARNING_RATE, 0, steps)
    losses = [m.loss for m in train_steps(model, stream, optimizer, schedule, max_grad_norm=CLIP)]
    return losses, adapter_of(model)


class _InOrder(Trainer):
    def _get_train_sampler(self, *_: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def by_trainer(
    name: str, dtype: str, rows: Rows, steps: int, loss: Callable[..., torch.Tensor] | None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """(loss of each step, adapter) of transformers' Trainer over PEFT's forward."""
    model = inject_lora(load_model(name, dtype="float32")[0], **LORA)
    model.config.use_cache = False
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=MICRO,
            gradient_accumulation_steps=ROWS_PER_STEP // MICRO,
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="cosine",
            max_grad_norm=CLIP,
            bf16=dtype == "bfloat16",
            use_cpu=True,
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            remove_unused_columns=False,
            **ADAM,
        )
        trainer = _InOrder(
            model,
            arguments,
            train_dataset=[{"row": row} for row in rows],
            data_collator=collated,
            compute_loss_func=loss,
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line], adapter_of(model)


def of_float64_logits(outputs: Any, labels: torch.Tensor, num_items_in_batch: Any = None) -> torch.Tensor:
    """transformers' loss of a causal model, its softmax in float64."""
    logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    taught = targets != -100
    total = torch.nn.functional.cross_entropy(logits[taught].double(), targets[taught], reduction="sum")
    return total / num_items_in_batch


def collated(features: list[dict[str, TokenizedExample]]) -> dict[str, torch.Tensor]:
    rows = [f["row"] for f in features]
    return padded(rows, max(map(len, rows)), DEVICE)


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    return {k: v.detach().clone() for k, v in lora_parameters(model).items()}


def dev_loss(name: str, adapter: dict[str, torch.Tensor], dev: Rows) -> float:
    """Nats per answer token, float32, transformers' own forward on one row at a time."""
    model = inject_lora(load_model(name, dtype="float32")[0], **LORA)
    with torch.no_grad():
        for key, weight in lora_parameters(model).items():
            weight.copy_(adapter[key])
        model.eval()
        total = sum(
            float(model(**padded([row], len(row), DEVICE), use_cache=False).loss) * row.supervised_tokens for row in dev
        )
    return total / sum(row.supervised_tokens for row in dev)


def row_of(line: dict[str, Any], bar: float) -> str:
    v = line["values"]
    dev = "  ".join(f"{who} {loss:.5f}" for who, loss in v["dev_loss"].items())
    apart = v["dev_loss_apart"] if line["way"] == "bfloat16" else v["loss_apart_most"]
    return (
        f"{line['way']:14} {v['steps']:3} steps  losses apart {v['loss_apart_most']:.1e}  adapters apart "
        f"{v['adapter_apart']:.1e}  dev loss {dev}  apart {v['dev_loss_apart']:.1e}  "
        f"{'within' if apart <= bar else 'NOT within'} {bar}"
    )


if __name__ == "__main__":
    main()
