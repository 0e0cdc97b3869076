"""A run's settings by the memory there is: chosen before the base is loaded, checked after the first step.

    free memory + settings -> plan.choose -> memory.json -> settings with nothing left open
    the fullest micro-batch, its gradient thrown away -> first step -> predicted beside measured -> memory.json
    (on a CPU with ample memory that trial would only delay the first step, and the step alone is compared)

A step is a set of rows, so no choice changes a gradient; but sums are rounded in another order, so a resume takes what
memory.json says and chooses nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from ..config import Config, bytes_of
from ..core import Example, Pack
from ..errors import CmqaError, ConfigError, ModelError, ResourceError, RunError
from ..messages import say
from ..models.sizes import Shape, shape_of
from .commit import write_file
from .ledger import CUDA_CONTEXT, Row, Setup, growth, peak, phases
from .memory import forget_peak, memory_now, peak_memory_bytes, trim_heap
from .plan import (
    HEAD_CHUNK,
    MAX_TOKENS,
    Memory,
    by_hand,
    choose,
    count_rows,
    memory_of,
    settings_of,
    setup_of,
    solve,
)

FILE = "memory.json"
_AMPLE = 2  # times what the plan needs
_OFF = 0.1  # further off, the row that is off most is named


def fitted(config: Config, folder: Path, device: torch.device, examples: Iterable[Example]) -> tuple[Config, str]:
    """`config` with max_tokens, gradient_checkpointing, checkpoint_layers and head_chunk decided, and what to tell.

    The first call of a run writes memory.json, later ones take what stands in it.
    Raises ResourceError where the plan fits nothing, with what was given by hand or at all; RunError for a damaged
    memory.json.
    """
    file = folder / FILE
    if file.exists():
        return _with(config, _read(file)["settings"]), ""
    chosen, record, told = _chosen(config, device, examples)
    write_file(file, _json(record | {"settings": chosen}))
    return _with(config, chosen), told


def _chosen(
    config: Config, device: torch.device, examples: Iterable[Example]
) -> tuple[dict[str, Any], dict[str, Any], str]:
    """(settings by name, what else memory.json holds, what to tell)."""
    t = config.train
    record: dict[str, Any] = {"by_hand": sorted(f"train.{name}" for name in by_hand(config))}
    ceiling = {
        "train.max_tokens": t.max_tokens or MAX_TOKENS,
        "train.gradient_checkpointing": bool(t.gradient_checkpointing),
        "train.checkpoint_layers": t.checkpoint_layers,
        "train.head_chunk": t.head_chunk or HEAD_CHUNK,
    }
    if t.fit == "off":
        return ceiling, record, ""
    try:
        shape = _shape(config)
        memory = _memory(config, device)
        rows = count_rows(examples, config.data.model_max_length)
        choice = choose(config, shape, memory, supervised=rows.supervised if rows else 1.0)
    except (ConfigError, ModelError) as reason:  # a model or modules that the ledger has no words for; they may train
        return ceiling, record, say("train.fit_unknown", reason=reason.message)
    fullest = peak(choice.chosen)
    if not choice.keeps_by_hand or fullest.bytes > memory.bytes:
        raise _refused(config, choice.asked, choice.chosen, memory)
    # As many as were asked for where they fit: a step may hold fewer tokens, which is no reason to lower the setting.
    same_cut = choice.chosen.max_tokens == choice.asked.max_tokens
    chosen = ceiling | {
        "train.max_tokens": ceiling["train.max_tokens"] if same_cut else choice.chosen.max_tokens,
        "train.head_chunk": choice.chosen.head_chunk,
    }
    if t.gradient_checkpointing is None:
        layers = choice.chosen.checkpoint_layers
        chosen |= {"train.gradient_checkpointing": layers > 0, "train.checkpoint_layers": layers}
    record |= {"memory": asdict(memory), "predicted_peak_bytes": fullest.bytes, "peak_phase": fullest.name}
    told = say(
        "train.fit",
        memory=_gib(memory.bytes),
        device=memory.device,
        peak=_gib(fullest.bytes),
        settings="  ".join(f"--{k.removeprefix('train.').replace('_', '-')} {v}" for k, v in chosen.items()),
    )
    return chosen, record, told


def _refused(config: Config, asked: Setup, would_fit: Setup, memory: Memory) -> CmqaError:
    """Nothing is trained that the plan says cannot be: why, and what would fit."""
    needed = peak(solve(asked, memory, by_hand(config)))
    largest = max(needed.rows, key=lambda row: row.bytes)
    given = "  ".join(f"--{n.replace('_', '-')} {getattr(config.train, n)}" for n in sorted(by_hand(config)))
    options = []
    if peak(would_fit).bytes <= memory.bytes:
        said = settings_of(would_fit)
        options.append("  ".join(f"--{k.removeprefix('train.').replace('_', '-')} {said[k]}" for k in said))
    else:
        quantised = solve(replace(asked, quantization="nf4"), memory)
        if memory.on_gpu and peak(quantised).bytes <= memory.bytes:
            options.append(f"a 4-bit base (--quantization nf4, {_gib(peak(quantised).bytes)} GiB)")
        options.append("a smaller base, --model-max-length or --lora.r")
    return ResourceError(
        f"the plan needs {_gib(needed.bytes)} GiB, {_gib(memory.bytes)} GiB are free ({memory.device})"
        + (f", with {given}" if given else "")
        + f"; the largest part is {largest.name}, {_gib(largest.bytes)} GiB",
        hint=f"It would fit with {', or '.join(options)}. `cmqa plan` names every GiB; --fit off tries it anyway.",
    )


def _shape(config: Config) -> Shape:
    shape = shape_of(config.model.name_or_path)
    layers = config.model.num_hidden_layers
    return shape if layers is None else shape.with_layers(layers)


def _memory(config: Config, device: torch.device) -> Memory:
    """What this process may fill: as `cmqa plan` sees it, and no more than --memory-limit."""
    limit = bytes_of(config.train.memory_limit, "memory-limit") if config.train.memory_limit else None
    if device.type != "cuda":
        memory = memory_of(None, None, "cpu")
        return memory if limit is None else replace(memory, bytes=min(memory.bytes, limit))
    free, _ = torch.cuda.mem_get_info(device)  # by now this process has its context, which the ledger counts
    free += torch.cuda.memory_reserved(device) + CUDA_CONTEXT
    if limit is not None:  # of torch's allocator, beside the context
        free = min(free, limit + CUDA_CONTEXT)
    return Memory(free, torch.cuda.get_device_name(device), free=True)


# ---- predicted beside measured ---------------------------------------------------------------------------------------


@dataclass
class Readings:
    """Bytes above the level after loading: `kept` while the backward of the fullest micro-batch so far was about to
    begin, `peak` until the first step was done, `after` it."""

    device: torch.device
    level: int
    resets: bool  # where not, a peak before the level hides a lower one after it
    pack: Pack | None = None  # the fullest micro-batch so far
    kept: int = 0
    peak: int = 0
    after: int = 0

    @classmethod
    def begin(cls, device: torch.device) -> Readings:
        if device.type == "cpu":
            trim_heap()
        level = memory_now(device)
        return cls(device, level, forget_peak(device))

    def forward_is_done(self, pack: Pack) -> None:
        if self.pack is None or pack.tokens > self.pack.tokens:
            self.pack, self.kept = pack, memory_now(self.device) - self.level

    def note_peak(self) -> None:
        self.peak = max(self.peak, peak_memory_bytes(self.device) - self.level)
        self.after = memory_now(self.device) - self.level

    def start_over(self) -> None:
        """A micro-batch was too large: neither it nor what was smaller counts."""
        self.pack, self.kept = None, 0
        self.resets = forget_peak(self.device) and self.resets


def setup_of_pack(config: Config, shape: Shape, pack: Pack, dtype: str, device: torch.device) -> Setup:
    """`config`'s setup with the numbers of the very pack that is computed."""
    setup = setup_of(config, shape, on_gpu=device.type == "cuda")
    return replace(
        setup,
        dtype=dtype,
        max_tokens=pack.tokens,
        step_tokens=None if setup.accumulates else pack.tokens,
        longest_row=int(pack.position_ids.max()) + 1,
        mean_row=sum(n * n for n in pack.row_lengths) / pack.tokens,
        supervised=pack.supervised_tokens / pack.tokens,
    )


def compare(setup: Setup, readings: Readings) -> dict[str, Any]:
    """{predicted_bytes, measured_bytes, error, phase} of the growth until the first step was done; more than a tenth
    off also {row, row_predicted_bytes, row_measured_bytes}: the part that is off most, by its largest row."""
    predicted = growth(setup, first_step=True)
    error = round(predicted.bytes / readings.peak - 1, 4)
    found: dict[str, Any] = {
        "predicted_bytes": predicted.bytes,
        "measured_bytes": readings.peak,
        "error": error,
        "phase": predicted.name,
    }
    if abs(error) <= _OFF:
        return found
    every = {p.name: p.rows for p in phases(setup)}
    kept = [r for r in every["forward"] if r.name.startswith(_KEPT)]
    left = [r for r in every["optimizer"] if r.name.startswith(_LEFT)]
    passing = [r for r in predicted.rows if r.name.startswith(_PASSING) and not r.name.startswith(_KEPT)]
    passes = predicted.bytes - _sum(kept)
    parts = [(kept, _sum(kept), readings.kept), (passing or kept, passes, readings.peak - readings.kept)]
    if setup.on_gpu or setup.gives_back:  # else what the C library keeps of freed blocks would be counted here
        parts.append((left, _sum(left), readings.after))
    rows, expected, measured = max(parts, key=lambda part: abs(part[1] - part[2]))
    row = max(rows, key=lambda r: r.bytes)
    return found | {"row": row.name, "row_predicted_bytes": expected, "row_measured_bytes": measured}


_KEPT = ("activations: ", "LoRA A in ", "head: states")
_PASSING = ("head: ", "backward ", "forward ", "one weight ", "freed, ")
_LEFT = ("LoRA optimizer", "modules_to_save: optimizer", "trained tokens")


def _sum(rows: Iterable[Row]) -> int:
    return sum(row.bytes for row in rows)


def checked(config: Config, folder: Path, dtype: str, readings: Readings) -> str:
    """Write predicted and measured into memory.json; what to tell, "" where nothing can be measured or compared."""
    if not readings.resets or readings.peak <= 0 or readings.pack is None:
        return ""
    try:
        setup = setup_of_pack(config, _shape(config), readings.pack, dtype, readings.device)
    except (ConfigError, ModelError):
        return ""
    found = compare(setup, readings)
    file = folder / FILE
    write_file(file, _json(_read(file) | {"first_step": found | {"tokens": readings.pack.tokens}}))
    if not (
        setup.on_gpu or setup.gives_back
    ):  # the C library holds more and more of what is freed: no step is the peak
        planned, so_far = _gib(found["predicted_bytes"]), _gib(found["measured_bytes"])
        return say("train.memory_so_far", predicted=planned, measured=so_far)
    told = say(
        "train.memory",
        predicted=_gib(found["predicted_bytes"]),
        measured=_gib(found["measured_bytes"]),
        error=f"{100 * found['error']:+.1f}",
    )
    if "row" in found:
        told += " " + say(
            "train.memory_off",
            row=found["row"],
            predicted=_gib(found["row_predicted_bytes"]),
            measured=_gib(found["row_measured_bytes"]),
        )
    return told


def was_checked(folder: Path) -> bool:
    return "first_step" in _read(folder / FILE)


def has_ample_memory(folder: Path, device: torch.device) -> bool:
    """Whether a CPU has twice what the plan needs. A GPU's memory is what the plan fills, so there it is always tried
    before it is believed."""
    record = _read(folder / FILE)
    if device.type == "cuda" or "memory" not in record:
        return False
    return bool(_AMPLE * record["predicted_peak_bytes"] <= record["memory"]["bytes"])


# ---- memory.json -----------------------------------------------------------------------------------------------------


def _with(config: Config, settings: dict[str, Any]) -> Config:
    return replace(config, train=replace(config.train, **{k.removeprefix("train."): v for k, v in settings.items()}))


def stored_settings(folder: Path) -> dict[str, Any]:
    """What the run here has decided, by full names; empty before it has."""
    return dict(_read(folder / FILE)["settings"]) if (folder / FILE).exists() else {}


_KINDS = {
    "train.max_tokens": int,
    "train.gradient_checkpointing": bool,
    "train.checkpoint_layers": int,
    "train.head_chunk": int,
}


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if {name: type(content["settings"][name]) for name in _KINDS} == _KINDS:
            return dict(content)
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise RunError(
        "it does not tell what this run has chosen, so the run cannot go on as it was",
        file=file,
        hint="Start anew with another --output-dir.",
    )


def _json(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f}"
