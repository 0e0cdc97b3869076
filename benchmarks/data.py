"""The data room's speed: N questions and N answers through read, clean, split, leak report and writing.

    python benchmarks/data.py CMQA_FOLDER [--rows 240000]

Rows are made from the folder's by edits: clauses of several rows joined and characters replaced, so that most are like
no other, and one in ten is a near-duplicate. One line is added to benchmarks/results/data.jsonl.
"""

from __future__ import annotations

import argparse
import csv
import json
import platform
import random
import resource
import subprocess
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from lora_cmqa.data.prepare import prepare
from lora_cmqa.data.sources import read_cmqa


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("--rows", type=int, default=240_000)
    parser.add_argument("--seed", type=int, default=42)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "rows"
        made.mkdir()
        make_rows(args.source, made, args.rows, args.seed)
        started = time.perf_counter()
        report = prepare(made, Path(folder) / "out", seed=args.seed)
        seconds = time.perf_counter() - started
    line = {
        "bench": "data",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "date": time.strftime("%Y-%m-%d"),
        "device": f"{platform.machine()}, CPU",
        "versions": {name: version(name) for name in ("numpy", "rensa", "plotly")},
        "data": f"{args.rows} + {args.rows} rows made by edits from {args.source.name}",
        "settings": {},
        "seed": args.seed,
        "values": {
            "seconds": round(seconds, 1),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            **{k: report[k] for k in ("read", "kept", "repaired", "rejected")},
        },
    }
    results = Path(__file__).parent / "results" / "data.jsonl"
    results.parent.mkdir(exist_ok=True)
    with results.open("a", encoding="utf-8") as f:
        f.write(json.dumps(line, ensure_ascii=False) + "\n")
    print(json.dumps(line["values"]))


if __name__ == "__main__":
    main()
