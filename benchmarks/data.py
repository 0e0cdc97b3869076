"""The data room's speed: N questions and N answers through read, clean, split, leak report and writing; then
tokenised, kept, packed for one epoch, and opened again from the kept tokens.

    python benchmarks/data.py CMQA_FOLDER [--rows 240000] [--model embedded]

Rows are made from the folder's by edits: clauses of several rows joined and characters replaced, so that most are like
no other, and one in ten is a near-duplicate. Two lines, `data` and `data_tokens`, are added to
benchmarks/results/data.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import random
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from result_line import keep, result_line, versions

from lora_cmqa.data.prepare import load_split, prepare
from lora_cmqa.data.sources import read_cmqa
from lora_cmqa.data.stream import BatchStream
from lora_cmqa.data.template import ChatTemplate
from lora_cmqa.data.token_cache import encode_cached


def make_rows(source: Path, folder: Path, rows: int, seed: int) -> None:
    """A cMQA folder of `rows` questions and as many answers."""
    rng = random.Random(seed)
    examples, _ = read_cmqa(source)
    characters = "的一是在有人不了中大为上个国我以要他时来用们"

    def edited(texts: list[str], last: str) -> str:
        if last and rng.random() < 0.1:
            base = list(last)
            base[rng.randrange(len(base))] = rng.choice(characters)
            return "".join(base)
        clauses = "，".join(t for _ in range(3) for t in rng.choice(texts).split("。")[:2]).split("，")
        rng.shuffle(clauses)
        return "，".join(
            "".join(rng.choice(characters) if rng.random() < 0.08 else c for c in clause) for clause in clauses[:8]
        )

    for name, columns, texts in (
        ("questions", ("question_id", "content"), [e.question for e in examples]),
        ("answers", ("ans_id", "question_id", "content"), [e.answer for e in examples]),
    ):
        last = ""
        with (folder / f"{name}.csv").open("w", encoding="utf-8", newline="") as f:
            writer = csv.writer(f)
            writer.writerow(columns)
            for i in range(rows):
                last = edited(texts, last)
                writer.writerow([i] * (len(columns) - 1) + [last])


def room(made: Path, out: Path, seed: int) -> dict[str, Any]:
    report, seconds = timed(lambda: prepare(made, out, seed=seed))
    return {"seconds": seconds, **memory(), **{k: report[k] for k in COUNTS}}


def tokens(out: Path, kept: Path, model: str, seed: int) -> dict[str, Any]:
    """Encode and keep, pack one epoch at 16 rows a step, open again."""
    from lora_cmqa.models.load import load_tokenizer  # here: torch is no part of the room's memory

    examples = [e for split in ("train", "dev", "test") for e in load_split(out, split)]
    template = ChatTemplate.from_tokenizer(load_tokenizer(model))
    options = {"folder": kept, "max_bytes": 1 << 34, "max_length": 512}
    (rows, report), encoding = timed(lambda: encode_cached(examples, template, **options))
    stream = BatchStream(rows, rows_per_step=16, max_tokens=2048, seed=seed)
    packs, packing = timed(lambda: sum(len(batch.packs) for batch, _ in stream))
    _, opening = timed(lambda: encode_cached(examples, template, **options))
    return {
        "seconds": round(encoding + packing, 1),
        "encode_seconds": encoding,
        "pack_seconds": packing,
        "reopen_seconds": opening,
        **memory(),
        "rows": report.kept,
        "tokens": report.tokens,
        "packs": packs,
    }


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    started = time.perf_counter()
    return work(), round(time.perf_counter() - started, 1)


COUNTS = ("read", "kept", "repaired", "rejected")


def memory() -> dict[str, int]:
    return {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--rows", type=int, default=240_000)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # as the command line does
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "rows").mkdir()
        make_rows(args.source, folder / "rows", args.rows, args.seed)
        packages = ("numpy", "rensa", "plotly")
        write_line("data", args, {}, packages, room(folder / "rows", folder / "out", args.seed))
        settings = {"model": args.model, "model_max_length": 512, "rows_per_step": 16, "max_tokens": 2048}
        values = tokens(folder / "out", folder / "kept", args.model, args.seed)
        write_line("data_tokens", args, settings, ("numpy", "tokenizers", "transformers"), values)


def write_line(bench: str, args: argparse.Namespace, settings: dict, packages: tuple[str, ...], values: dict) -> None:
    line = result_line(
        bench,
        values,
        device=f"{platform.machine()}, CPU, {os.cpu_count()} cores",
        versions=versions(*packages),
        data=f"{args.rows} + {args.rows} rows made by edits from {args.source.name}",
        settings=settings,
        seed=args.seed,
    )
    keep(line, "data")
    print(json.dumps(values))


if __name__ == "__main__":
    main()
