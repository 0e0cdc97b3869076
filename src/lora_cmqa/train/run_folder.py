"""The run folder: what stands in it beside checkpoints and metrics, and who may write to it.

config.yaml            every setting, resolved; a second start compares it
environment.json       versions, device, dtype, threads, kernels: what a resume takes as it was
memory.json            what --fit chose, likewise; the peak predicted and the one measured after the first step
memory_cuts.json       only where the memory ran out: from which step on packs are how large
generation_config.json chat_template.jinja tokenizer files fingerprint.json README.md     written once, at the start
adapter_config.json adapter_model.safetensors     best on dev when there is a dev set, else the last
trainer_state.json     says which; "finished": true is written last of all
run.lock               pid, host and start time of the process that trains here, while it does
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..config import Config, ModelConfig, as_flat_dict, as_yaml, parse
from ..data.card import read_card
from ..data.sources import CARD as DATA_CARD
from ..data.template import ChatTemplate
from ..errors import ResourceError, RunError
from ..kernels.kernel import Way
from ..lora.adapter import CONFIG, WEIGHTS
from ..lora.fingerprint import write_fingerprint
from .checkpoint import STATE
from .commit import is_disk_error, write_file
from .fit import FILE as CHOSEN
from .fit import stored_settings

SETTINGS, ENVIRONMENT, METRICS, LOCK, CARD = "config.yaml", "environment.json", "metrics.jsonl", "run.lock", "README.md"
CUTS = "memory_cuts.json"
TEMPLATE, GENERATION = "chat_template.jinja", "generation_config.json"
# Settings that change nothing of what is computed: a resume may change them.
_FREE = {
    *("train.output_dir", "train.resume", "train.logging_steps", "train.report_to", "train.save_total_limit"),
    "data.token_cache_gib",
    *("train.memory_limit", "train.fit"),  # they may cut micro-batches, which changes no gradient
}
_COMPARED = ("versions", "processor", "device", "dtype", "float32_matmul_precision", "kernels")


# ---- first start, second start -----------------------------------------------------------------------------------


def open_run_folder(folder: Path) -> None:
    """Make the folder. Raises ResourceError when its disk is full or read-only, RunError when it cannot be made or
    holds files that a run would overwrite."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as e:
        kind = ResourceError if is_disk_error(e) else RunError
        raise kind(
            f"the run folder cannot be written: {e.strerror}",
            file=folder,
            hint="Make it writable and run the same command again, or name another one with --output-dir.",
        ) from None
    if not (folder / SETTINGS).exists():
        foreign = [n for n in (WEIGHTS, CONFIG, STATE, METRICS, CARD, "config.json") if (folder / n).exists()]
        if foreign:
            raise RunError(
                f"the folder holds {foreign[0]} but no {SETTINGS}, so it is not a run of this tool",
                file=folder,
                hint="Name a new or empty folder with --output-dir.",
            )


def is_finished(folder: Path) -> bool:
    state = folder / STATE
    try:
        return bool(json.loads(state.read_text(encoding="utf-8")).get("finished"))
    except (OSError, ValueError, AttributeError):
        return False


def check_same_config(folder: Path, config: Config) -> bool:
    """False when no run was started here. Raises RunError naming the settings in which `config` is another one."""
    file = folder / SETTINGS
    if not file.exists():
        return False
    then, now = as_flat_dict(parse(Config, yaml_file=file)), as_flat_dict(config)
    for name, value in stored_settings(folder).items():  # left open is as good as what was chosen
        then[name], now[name] = (value if side[name] is None else side[name] for side in (then, now))
    differing = [k for k in now if then[k] != now[k] and k not in _FREE and not k.startswith("evaluate.")]
    if differing:
        named = ", ".join(f"--{k.replace('_', '-')} {_shown(then[k])} then, {_shown(now[k])} now" for k in differing)
        raise RunError(
            f"a run of other settings is here ({named})",
            file=folder,
            hint="Start it again with its own settings to resume it, or name another --output-dir.",
        )
    return True


def _shown(value: Any) -> str:
    return " ".join(map(str, value)) or "none" if isinstance(value, tuple) else str(value)


def write_settings(folder: Path, config: Config) -> None:
    """At the first start only: a resume keeps what is there. Beside them the card of what is trained on."""
    if not (folder / DATA_CARD).exists():
        d = config.data
        write_file(folder / DATA_CARD, _json(read_card(d.path or "", *([d.replay] if d.replay else []))))
    if not (folder / SETTINGS).exists():
        write_file(folder / SETTINGS, as_yaml(config).encode())


# ---- environment -------------------------------------------------------------------------------------------------


def environment(device: torch.device, dtype: torch.dtype, quantization: str = "none") -> dict[str, Any]:
    """Versions, device, dtype and threads of this process, and how the base is quantised where it is."""
    packages = ("lora-cmqa", "torch", "transformers", "peft", "safetensors", "tokenizers", "numpy")
    versions = {"python": platform.python_version(), **{n: _version(n) for n in packages}}
    if device.type == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        versions["liger-kernel"] = _version("liger-kernel")
    if quantization != "none":
        versions["bitsandbytes"] = _version("bitsandbytes")
    return {
        "versions": versions,
        "platform": platform.platform(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        **({"quantization": quantization} if quantization != "none" else {}),
        "threads": torch.get_num_threads(),
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _processor() -> str:
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    except OSError:
        pass
    return f"{name} ({torch.backends.cpu.get_cpu_capability()})"


def same_environment(folder: Path, now: dict[str, Any], *, anyway: bool) -> None:
    """First start: write environment.json. Later: take the stored thread count, and refuse a different machine.

    Other versions or another processor round differently, so the run would not be the one that was started.
    Raises RunError naming what differs, unless `anyway`, which is noted in environment.json.
    """
    file = folder / ENVIRONMENT
    if not file.exists():
        write_file(file, _json(now))
        return
    then = _stored_environment(file)
    torch.set_num_threads(then["threads"])
    differing = {k: _difference(then.get(k), now[k]) for k in _COMPARED if then.get(k) != now[k]}
    if not differing:
        return
    if not anyway:
        named = "; ".join(f"{k}: {a} then, {b} now" for k, (a, b) in differing.items())
        raise RunError(
            f"this run was started elsewhere, so its end would not be exactly the same ({named})",
            file=folder,
            hint="--resume anyway goes on and notes it in environment.json.",
        )
    write_file(file, _json(then | {"resumed_elsewhere": [*then.get("resumed_elsewhere", []), now]}))


def stored_dtype(folder: Path) -> str | None:
    """What `--dtype auto` chose at the first start; None before it."""
    file = folder / ENVIRONMENT
    return _stored_environment(file)["dtype"] if file.exists() else None


def stored_kernels(folder: Path) -> dict[str, Way] | None:
    """How each kernel was called at the first start (kernels/table.py); None before it."""
    file = folder / ENVIRONMENT
    return _stored_environment(file)["kernels"] if file.exists() else None


def forget_unborn_start(folder: Path) -> None:
    """A first start that was killed before it wrote its settings has bound nobody to what it chose."""
    if not (folder / SETTINGS).exists():
        (folder / ENVIRONMENT).unlink(missing_ok=True)
        (folder / CHOSEN).unlink(missing_ok=True)


def _stored_environment(file: Path) -> dict[str, Any]:
    try:
        then = json.loads(file.read_text(encoding="utf-8"))
        is_complete = isinstance(then["dtype"], str) and isinstance(then["kernels"], dict)
        if is_complete and isinstance(then["threads"], int) and then["threads"] > 0:
            return then
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RunError(
        "it does not tell on what this run was started, so the run cannot go on as it was",
        file=file,
        hint="Start anew with another --output-dir.",
    )


def _difference(then: Any, now: Any) -> tuple[str, str]:
    """Of two mappings only the keys that differ are named."""
    if not (isinstance(then, dict) and isinstance(now, dict)):
        return str(then), str(now)
    keys = [k for k in {**then, **now} if then.get(k) != now.get(k)]
    return " ".join(f"{k} {then.get(k)}" for k in keys), " ".join(f"{k} {now.get(k)}" for k in keys)


# ---- what is learned on the way ----------------------------------------------------------------------------------


def write_cuts(folder: Path, cuts: Sequence[tuple[int, int]]) -> None:
    """cuts: (step, max_tokens), as BatchStream has them."""
    write_file(folder / CUTS, (json.dumps(cuts) + "\n").encode())


def read_cuts(folder: Path) -> list[tuple[int, int]]:
    """The inverse of `write_cuts`; none where the memory never ran out. Raises RunError when the file holds no cuts."""
    file = folder / CUTS
    if not file.exists():
        return []
    try:
        return [(int(step), int(most)) for step, most in json.loads(file.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        raise RunError(
            "it does not tell how micro-batches were cut when the memory ran out",
            file=file,
            hint="Start anew with another --output-dir.",
        ) from None


# ---- what is written once ----------------------------------------------------------------------------------------


def write_companions(
    folder: Path, tokenizer: Any, template: ChatTemplate, base: ModelConfig, card: str, model: Any
) -> dict[str, Path]:
    """Tokenizer, template, stop ids, fingerprint and card: what an adapter needs beside it. Existing files are kept,
    so a resume changes none. Returns their names and paths."""
    stop_ids = sorted({*template.stop_ids, *_base_stop_ids(model)})
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch)
        tokenizer.chat_template = template.jinja
        tokenizer.save_pretrained(made)
        write_fingerprint(
            made, base.name_or_path, num_hidden_layers=base.num_hidden_layers, quantization=base.quantization
        )
        (made / TEMPLATE).write_text(template.jinja, encoding="utf-8")
        (made / GENERATION).write_bytes(_json({"eos_token_id": stop_ids, "pad_token_id": tokenizer.pad_token_id}))
        (made / CARD).write_text(card, encoding="utf-8")
        names = sorted(p.name for p in made.iterdir() if p.is_file())
        for name in names:
            if not (folder / name).exists():
                write_file(folder / name, (made / name).read_bytes())
    return {name: folder / name for name in names}


def _base_stop_ids(model: Any) -> list[int]:
    eos = getattr(model.get_base_model().generation_config, "eos_token_id", None)
    return eos if isinstance(eos, list) else [eos] if eos is not None else []


def write_adapter(folder: Path, files: Mapping[str, bytes]) -> None:
    """The run folder's own adapter, weights last: its config names the same layers all through the run."""
    for name in (CONFIG, WEIGHTS):
        write_file(folder / name, files[name])


def write_state(folder: Path, state: dict[str, Any]) -> None:
    write_file(folder / STATE, _json(state))


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


# ---- one process at a time ---------------------------------------------------------------------------------------


class RunLock:
    """Held while a process trains in the folder. The kernel lets go of it when the process ends, however it ends,
    so a lock file that a killed run left keeps nobody out. Raises RunError while another process holds it."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / LOCK
        self._handle: int | None = None

    def __enter__(self) -> RunLock:
        while True:
            handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o644)
            if not _lock(handle):
                holder = os.read(handle, 1000).decode(errors="replace").strip()
                os.close(handle)
                raise RunError(
                    f"another process trains into this folder ({holder or 'it has just started'})",
                    file=self.file.parent,
                    hint="Wait for it or stop it, or name another --output-dir.",
                )
            if _same_file(handle, self.file):
                break
            os.close(handle)  # its holder ended and removed it between our open and our lock
        about = {"pid": os.getpid(), "host": socket.gethostname(), "started": time.strftime("%Y-%m-%dT%H:%M:%S%z")}
        os.ftruncate(handle, 0)
        os.write(handle, (json.dumps(about) + "\n").encode())
        self._handle = handle
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # on a read-only disk it stays; nobody holds it
            self.file.unlink()
        if self._handle is not None:
            os.close(self._handle)


def _same_file(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except OSError:
        return False


def _lock(handle: int) -> bool:
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
