"""checkpoint-N: all that training needs to go on after step N exactly as if it had never stopped.

    adapter_config.json  adapter_model.safetensors  README.md  tokenizer files     loads with plain PEFT
    optimizer.safetensors      both moments and the step count of every parameter
    scheduler.json             the whole schedule and where it stands
    rng_state.json             torch's generators: the CPU's and the run's GPU's
    data_state.json            the stream's place
    trainer_state.json         progress, best so far
    training_args.json         every setting
    manifest.json              sha256 of each of these; written last

The names are HF Trainer's, the formats hold no pickle. A checkpoint appears by rename or not at all; one that does
not match its manifest is named and skipped for the one before.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save

from ..data.files import sha256_of
from ..errors import ResourceError, RunError
from ..lora.adapter import CONFIG, WEIGHTS, adapter_files, read_tensors
from ..lora.inject import lora_parameters
from .commit import MANIFEST, commit_folder, is_disk_error, is_out_of_space, remove_folder
from .optim import Schedule, optimizer_tensors, restore_optimizer

OPTIMIZER, SCHEDULER, RNG = "optimizer.safetensors", "scheduler.json", "rng_state.json"
DATA, STATE, ARGS = "data_state.json", "trainer_state.json", "training_args.json"
BEST = "best_adapter_model.safetensors"  # only where the best so far is not this step's own
_NEEDED = (CONFIG, WEIGHTS, OPTIMIZER, SCHEDULER, RNG, DATA, STATE, ARGS)
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True)
class Checkpoint:
    """What `load_checkpoint` gives beside the weights it put back."""

    folder: Path
    step: int
    trainer_state: dict[str, Any]
    data_state: dict[str, Any]
    rng_state: dict[str, str | None]  # for `restore_rng_state`, right before the first step


def save_checkpoint(
    run: Path,
    model: Any,
    optimizer: torch.optim.Optimizer,
    schedule: Schedule,
    *,
    data_state: dict[str, Any],
    trainer_state: dict[str, Any],
    training_args: dict[str, Any],
    base_model_name_or_path: str,
    companions: Mapping[str, Path],
    save_total_limit: int = 0,
) -> Path:
    """Write `run`/checkpoint-N, N being trainer_state["global_step"], then prune.

    companions  files that make the folder usable alone (tokenizer, README.md, best adapter so far), by name
    Raises ResourceError when the disk is full or read-only; what was there before stays whole.
    """
    step = trainer_state["global_step"]
    folder = run / f"checkpoint-{step}"
    optimizer_state = {k: v.cpu().contiguous() for k, v in optimizer_tensors(optimizer, lora_parameters(model)).items()}
    files: dict[str, bytes | Path] = {
        **companions,
        **adapter_files(model, base_model_name_or_path=base_model_name_or_path),
        OPTIMIZER: save(optimizer_state, metadata={"format": "pt"}),
        SCHEDULER: _json(asdict(schedule) | {"step": step}),
        RNG: _json(rng_state(next(model.parameters()).device)),
        DATA: _json(data_state),
        STATE: _json(trainer_state),
        ARGS: _json(training_args),
    }
    try:
        _commit_or_make_room(folder, files, may_prune=save_total_limit > 0)
    except Exception as e:
        if not is_disk_error(e):
            raise
        kept = list_checkpoints(run)
        raise ResourceError(
            f"checkpoint-{step} could not be written: {e}. "
            + (f"{kept[-1].name} is whole." if kept else "No earlier checkpoint is there."),
            hint="Make room and run the same command again: it goes on from the last checkpoint.",
        ) from e
    if save_total_limit > 0:
        prune(run, save_total_limit)
    return folder


def _commit_or_make_room(folder: Path, files: Mapping[str, bytes | Path], *, may_prune: bool) -> None:
    """On a full disk all but the newest of the older checkpoints go, and it is tried once more."""
    try:
        commit_folder(folder, files)
    except Exception as e:
        if not (may_prune and is_out_of_space(e) and len(list_checkpoints(folder.parent)) > 1):
            raise
        prune(folder.parent, 1)
        commit_folder(folder, files)


def load_checkpoint(folder: Path, model: Any, optimizer: torch.optim.Optimizer, schedule: Schedule) -> Checkpoint:
    """The inverse of `save_checkpoint`: weights and optimizer are put back in place. The random state is only given:
    what the caller still sets up may draw, so `restore_rng_state` comes last.

    Raises RunError when the checkpoint's tensors or schedule are not those of this run.
    """
    tensors = read_tensors(folder / WEIGHTS)
    wanted = get_peft_model_state_dict(model, save_embedding_layers=False)
    if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in wanted.items()}:
        raise RunError("the adapter in it has other layers or another rank than this run", file=folder / WEIGHTS)
    stored = _read(folder / SCHEDULER)
    if {k: v for k, v in stored.items() if k != "step"} != asdict(schedule):
        raise RunError(f"its schedule is {stored}, this run's is {asdict(schedule)}", file=folder / SCHEDULER)
    set_peft_model_state_dict(model, tensors)
    restore_optimizer(optimizer, lora_parameters(model), load_file(folder / OPTIMIZER))
    state = _read(folder / STATE)
    return Checkpoint(folder, state["global_step"], state, _read(folder / DATA), _read(folder / RNG))


# ---- which checkpoints there are ---------------------------------------------------------------------------------


def list_checkpoints(run: Path) -> list[Path]:
    """checkpoint-N folders that hold a manifest, lowest N first."""
    found = [p for p in run.glob("checkpoint-*") if _NAME.fullmatch(p.name) and (p / MANIFEST).is_file()]
    return sorted(found, key=lambda p: int(p.name.split("-")[1]))


def newest_whole(run: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that matches its manifest, and what is wrong with each newer one."""
    damaged: list[str] = []
    folders = [p for p in run.glob("checkpoint-*") if _NAME.fullmatch(p.name) and p.is_dir()]
    for folder in sorted(folders, key=lambda p: -int(p.name.split("-")[1])):
        reason = damage(folder)
        if reason is None:
            return folder, damaged
        damaged.append(f"{folder.name}: {reason}")
    return None, damaged


def damage(folder: Path) -> str | None:
    """Why the checkpoint cannot be trusted, or None: every file of the manifest has the bytes it had when written."""
    try:
        files = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["files"]
        entries = {str(name): (int(e["bytes"]), str(e["sha256"])) for name, e in files.items()}
    except FileNotFoundError:
        return f"no {MANIFEST}, so it was not finished"
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return f"{MANIFEST} is not readable"
    missing = [n for n in _NEEDED if n not in entries]
    if missing:
        return f"{MANIFEST} does not list {missing[0]}"
    for name, (size, digest) in entries.items():
        file = folder / name
        if Path(name).name != name or not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes, {size} were written"
        if sha256_of(file) != digest:
            return f"{name} is not what was written (sha256 differs)"
    return None


def prune(run: Path, keep: int) -> None:
    """Leave the newest `keep` finished checkpoints."""
    for folder in list_checkpoints(run)[:-keep]:
        remove_folder(folder)


# ---- every random state ------------------------------------------------------------------------------------------


# A run draws from torch's global generators alone. Python's and numpy's are left out on purpose: an outsider's first
# import may draw from them (rich does), so they would differ between a fresh process and one that has trained before.
# A test holds that nothing here depends on them.


def rng_state(device: torch.device) -> dict[str, str | None]:
    """torch's generator of the CPU, and that of `device` where it is a GPU, as base64."""
    return {
        "torch": _text(torch.get_rng_state()),
        "cuda": _text(torch.cuda.get_rng_state(device)) if device.type == "cuda" else None,
    }


def restore_rng_state(state: dict[str, str | None], device: torch.device) -> None:
    """The inverse of `rng_state`."""
    if state["torch"] is not None:
        torch.set_rng_state(_tensor(state["torch"]))
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(_tensor(state["cuda"]), device)


def _text(state: torch.Tensor) -> str:
    return base64.b64encode(state.numpy().tobytes()).decode()


def _tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode()


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))
