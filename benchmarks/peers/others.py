"""Other trainers, each in an environment of its own that is made once: TRL, LLaMA-Factory, ms-swift.

    trl-dynamic-2  ->  install("trl")  ->  python in_trl.py '{"how": "dynamic", "batch": "2", ...}'  ->  its steps

They read the same model (written out once in bfloat16, with the chat template of ours) and the same rows as text, in
the layout each wants; their steps come back and are judged like all others. A peer that cannot be installed or dies
raises PeerFailed with the last lines that it said.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_cmqa.core import TokenizedExample
from lora_cmqa.data.template import ChatTemplate
from lora_cmqa.models.load import computes_in_bfloat16, load_model

from .setting import ROWS_PER_STEP, Clock, Setting, read_examples_of

HERE = Path(__file__).parent
ENVIRONMENTS = HERE.parents[1] / "runs" / "bench-env"
MODELS = HERE.parents[1] / "runs" / "bench-model"
INSTALL_SECONDS, TRAIN_SECONDS = 1200, 1800


@dataclass(frozen=True)
class Peer:
    packages: tuple[str, ...]
    tried: tuple[str, ...]  # how-batch; the search's candidates
    without: tuple[str, ...] = ()  # removed again after pip: builds for CUDA that break the import beside a CPU torch


TORCH = "torch==2.13.0"  # the project's: a plain `torch` could bring another
PEERS = {
    "trl": Peer(
        ("trl==1.16.0", "transformers==5.24.0", "peft==0.21.2", "accelerate==1.15.0", "datasets==5.2.0", TORCH),
        ("dynamic-2", "autocast-2", "packing-1"),
    ),
    "llamafactory": Peer(
        ("llamafactory==0.9.5", "transformers==5.6.0", "peft==0.18.1", "accelerate==1.11.0", TORCH),
        ("dynamic-2", "packing-1"),
        ("torchvision", "torchaudio"),
    ),
    "msswift": Peer(
        ("ms-swift==4.6.0", "transformers==5.19.0", "peft==0.20.0", "accelerate==1.15.0", TORCH),
        ("dynamic-1", "dynamic-2"),
    ),
}
SEARCHES = {name: tuple(f"{name}-{how}" for how in peer.tried) for name, peer in PEERS.items()}


class PeerFailed(Exception):
    """A peer was not installed or died; the text is what it said last."""


def install(name: str) -> Path:
    """The python of the peer's environment. Raises PeerFailed."""
    folder, packages = ENVIRONMENTS / name, PEERS[name].packages
    done, wanted = folder / "installed", " ".join(packages)
    if not (done.exists() and done.read_text(encoding="utf-8") == wanted):
        folder.parent.mkdir(parents=True, exist_ok=True)
        print(f"installing {wanted}", file=sys.stderr, flush=True)
        python = str(folder / "bin" / "python")
        _run([sys.executable, "-m", "venv", str(folder)], INSTALL_SECONDS)
        _run([python, "-m", "pip", "install", "--quiet", *packages], INSTALL_SECONDS)
        if without := PEERS[name].without:
            _run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *without], INSTALL_SECONDS)
        done.write_text(wanted, encoding="utf-8")
    return folder / "bin" / "python"


def train(way: str, setting: Setting, rows: list[TokenizedExample], clock: Clock) -> dict[str, Any]:
    """Fills `clock` with the peer's steps; -> peak memory, attention and trained parameters as the peer says them."""
    name, how, batch = way.split("-")
    python = install(name)
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        (folder / "out").mkdir()
        write_rows(setting, rows, folder)
        packs = max(1, round(sum(map(len, rows)) / len(rows) * ROWS_PER_STEP / setting.max_length))
        asked = {
            "how": how,
            "batch": batch,
            "model": str(model_folder(setting.model)),
            "data": made,
            "out": str(folder / "out"),
            "rows_per_step": ROWS_PER_STEP,
            "packs": packs,  # so many full packs hold a step's rows
            "threads": setting.threads,
            "seed": setting.round,
            "r": setting.r,
            "lora_alpha": setting.lora_alpha,
            "learning_rate": setting.learning_rate,
            "max_length": setting.max_length,
            "bf16": computes_in_bfloat16(clock.device),
            "cpu": clock.device.type == "cpu",
        }
        said = _run([str(python), str(HERE / f"in_{name}.py"), json.dumps(asked)], TRAIN_SECONDS, folder)
    told = json.loads([line for line in said.splitlines() if line.startswith('{"began"')][-1])
    clock.began, clock.ends = told["began"], [tuple(end) for end in told["ends"]]
    if len(clock.ends) < 2:
        raise PeerFailed(f"{len(clock.ends)} steps: a rate needs two")
    return {"peak_memory_bytes": told["memory"], "attention": told["attention"], "trained": told["trained_parameters"]}


def write_rows(setting: Setting, rows: list[TokenizedExample], folder: Path) -> None:
    """The texts of `rows` as prompts.jsonl (TRL), rows.json with dataset_info.json (LLaMA-Factory), messages.jsonl."""
    texts = {e.id: e for e in read_examples_of(setting)}
    pairs = [(texts[row.id].question, texts[row.id].answer) for row in rows]
    asks, says = "user", "assistant"
    _lines(
        folder / "prompts.jsonl",
        [{"prompt": [{"role": asks, "content": q}], "completion": [{"role": says, "content": a}]} for q, a in pairs],
    )
    _lines(
        folder / "messages.jsonl",
        [{"messages": [{"role": asks, "content": q}, {"role": says, "content": a}]} for q, a in pairs],
    )
    alpaca = [{"instruction": q, "input": "", "output": a} for q, a in pairs]
    (folder / "rows.json").write_text(json.dumps(alpaca, ensure_ascii=False), encoding="utf-8")
    (folder / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}), encoding="utf-8")


def model_folder(model: str) -> Path:
    """The base written out in bfloat16 once, as plain transformers reads it."""
    folder = MODELS / model.replace("/", "-")
    if not (folder / "done").exists():
        base, tokenizer = load_model(model, dtype="bfloat16")
        base.save_pretrained(folder)
        tokenizer.chat_template = ChatTemplate.from_tokenizer(tokenizer).jinja
        tokenizer.save_pretrained(folder)
        (folder / "done").write_text("", encoding="utf-8")
    return folder


def _lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def _run(command: list[str], seconds: float, cwd: Path | None = None) -> str:
    """stdout of a finished command; a peer finds no hub, no settings of ours and no pinned core."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "OMP_PROC_BIND", "OMP_PLACES")}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "USE_HF": "1", "TOKENIZERS_PARALLELISM": "false"}
    if cwd is not None:
        offline |= {"HF_HOME": str(cwd / "hub"), "MODELSCOPE_CACHE": str(cwd / "hub")}
    try:
        child = subprocess.run(
            command, cwd=cwd, env=inherited | offline, capture_output=True, text=True, timeout=seconds
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PeerFailed(str(error)) from error
    if child.returncode:
        lines = [line for line in (child.stderr + child.stdout).strip().splitlines() if line.strip()]
        said = " | ".join(lines[-3:])
        raise PeerFailed(
            f"{Path(command[1]).name if len(command) > 1 else command[0]}: code {child.returncode}: {said}"
        )
    return child.stdout
