"""One line of a results/*.jsonl: what was measured, where, on what. The files only grow."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def commit() -> str:
    """The project's, wherever the benchmark is started."""
    return subprocess.run(["git", "rev-parse", "HEAD"], cwd=HERE, capture_output=True, text=True).stdout.strip()


def versions(*packages: str) -> dict[str, str]:
    return {"python": platform.python_version()} | {name: version(name) for name in packages}


def result_line(
    bench: str,
    values: dict[str, Any],
    *,
    device: Any,
    versions: dict[str, str],
    data: str,
    settings: dict[str, Any],
    seed: Any,
    **more: Any,
) -> dict[str, Any]:
    """The keys that every line has, in their order; `more` stands before the values."""
    return {
        "bench": bench,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "device": device,
        "versions": versions,
        "data": data,
        "settings": settings,
        "seed": seed,
        **more,
        "values": values,
    }


def keep(line: dict[str, Any], name: str) -> None:
    """Add `line` to results/NAME.jsonl."""
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def kept(name: str) -> Sequence[dict[str, Any]]:
    """The lines of results/NAME.jsonl, oldest first."""
    file = RESULTS / f"{name}.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []
