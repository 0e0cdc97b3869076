"""From the command to the first step's line: `cmqa train` in a process of its own, stopped there.

    python benchmarks/start.py                        embedded sample and base: one line in results/start.jsonl
    python benchmarks/start.py --data data/mine       a prepared folder
    python benchmarks/start.py --dry --model tiny     seconds; writes nothing

A start before the rounds fills the caches (base, token ids) and is not counted. Seconds are of the wall clock, from the
start of the process until metrics.jsonl has its first line, after the first optimizer step of 16 rows.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from result_line import keep, result_line, versions

from lora_cmqa.data.prepare import prepare
from lora_cmqa.demo import SAMPLE

NAME = "start"
PATIENCE = 600.0  # seconds


def main(argv: list[str] | None = None) -> dict[str, Any]:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", default="embedded")
    p.add_argument("--data", help="a folder that `cmqa prepare` made; default: the embedded sample")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--dry", action="store_true", help="write no line")
    asked = p.parse_args(argv)
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as scratch:
        data = Path(asked.data or Path(scratch) / "data")
        if not asked.data:
            prepare(SAMPLE, data)
        taken = [first_step(asked.model, data, Path(scratch) / f"run-{n}") for n in range(asked.rounds + 1)][1:]
    line = result_line(
        NAME,
        {
            "seconds_to_first_step": {"median": statistics.median(taken), "least": min(taken), "most": max(taken)},
            "load_before": load_before,
        },
        device={"kind": "cpu", "threads": torch.get_num_threads()},
        versions=versions("torch", "transformers", "peft"),
        data=asked.data or "embedded sample",
        settings={"model": asked.model, "rounds": asked.rounds},
        seed=None,
    )
    if not asked.dry:
        keep(line, NAME)
    print(" ".join(f"{seconds:.1f}" for seconds in taken), "s")
    return line


def first_step(model: str, data: Path, run: Path) -> float:
    """Seconds until the run has its first line. Raises SystemExit with the run's last words where it ends before."""
    command = [sys.executable, "-m", "lora_cmqa.cli", "train", "--model", model, "--data", str(data)]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*command, "--output-dir", str(run), "--max-steps", "100"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
    )
    try:
        while time.perf_counter() - began < PATIENCE:
            metrics = run / "metrics.jsonl"
            if metrics.exists() and b"\n" in metrics.read_bytes():
                return time.perf_counter() - began
            if process.poll() is not None:
                words = process.stderr.read().decode(errors="replace")[-500:] if process.stderr else ""
                raise SystemExit(f"the run ended with {process.returncode}: {words}")
            time.sleep(0.01)
        raise SystemExit(f"no step within {PATIENCE:.0f} s")
    finally:
        process.kill()
        process.wait()


if __name__ == "__main__":
    main()
