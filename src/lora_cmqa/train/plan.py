"""Does it fit, and what to change: from config files alone, before anything is loaded.

    Config + config.json -> Setup -> ledger (every GiB named) -> the fastest settings that fit the memory
                                                              -> what each switch buys and costs

What is not given is free below a ceiling: micro-batches may become smaller, layers may be recomputed, the head may work
in smaller chunks. None of the three changes a gradient. A quantised base does, so it is only offered. What was given by
hand is kept; where nothing fits with it, the plan shows what would fit without.
"""

from __future__ import annotations

import math
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from ..config import Config, bytes_of
from ..core import Example
from ..errors import ConfigError
from ..messages import say
from ..models.sizes import QWEN_V1_NAMES, Shape, cpu_computes_in_bfloat16, shape_of
from . import qwen_recipe
from .ledger import NF4_BYTES, Phase, Setup, flops_of_attention, flops_per_taught_token, flops_per_token, peak, phases

Recipe = Literal["ours", "qwen-finetune"]

# Dense 16-bit matrix operations a second, and bytes a second of memory, by the makers' data sheets.
CARDS: dict[str, tuple[float, float]] = {
    "RTX 3090": (71e12, 936e9),
    "RTX 4090": (165e12, 1008e9),
    "A100": (312e12, 1555e9),
    "L40S": (362e12, 864e9),
    "H100": (989e12, 3350e9),
    "H200": (989e12, 4800e9),
}
# Where they are not given: the most that a run takes.
MAX_TOKENS, HEAD_CHUNK = 2048, 512
TURN_TOKENS = ("<|im_start|>", "<|im_end|>")  # what trainable_tokens auto trains at most, as far as a plan can know
MARGIN = 0.05  # stays free when settings are chosen: a card shows less than it is sold with, and a plan may be off
ASSUMED_MFU = 0.4  # share of the peak that training reaches; an assumption until a run on the card has measured it
_OPERATIONS_PER_BYTE = 100  # of a card that is not in the table: what they all lie around
# 1,000 pairs of cMedQA2 with qwen.tiktoken: 0.671 tokens a character; ChatML adds 5 tokens a turn.
TOKENS_PER_CHARACTER, TOKENS_PER_TURN = 0.67, 5


@dataclass(frozen=True, slots=True)
class Memory:
    """What a run may fill."""

    bytes: int
    device: str  # a card's name, "gpu" or "cpu"
    free: bool  # seen on this machine just now, not told

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


def plan(
    config: Config, *, gpu_memory: str | None = None, gpu: str | None = None, recipe: Recipe = "ours"
) -> dict[str, Any]:
    """The ledger of a run, whether it fits, and the fastest settings that do.

    gpu_memory  "24GiB"; None: the free memory of the card that nvidia-smi names, else of this machine
    gpu         a card of CARDS, for the time of an epoch; None: the one that is seen
    recipe      qwen-finetune: the ledger of Qwen v1's own finetune.py with the same numbers, instead

    Returns predicted_peak_bytes, fits, recipe (settings by their names), ledger [{name, bytes}] of the fullest moment,
    phases (every moment, with its ledger), asked (the settings as given), by_hand (those that a person set),
    keeps_by_hand (whether recipe keeps them), switches, offload (what the optimizer's states on the host would free,
    and what frees as much), epoch (None without data).
    Raises ConfigError, ModelError for what cannot be read; DataError for the data folder.
    """
    shape = shape_of(config.model.name_or_path)
    if config.model.num_hidden_layers is not None:
        shape = shape.with_layers(config.model.num_hidden_layers)
    memory = memory_of(gpu_memory, gpu, config.model.device)
    if not memory.on_gpu and config.train.memory_limit is not None:
        memory = replace(memory, bytes=min(memory.bytes, bytes_of(config.train.memory_limit, "memory-limit")))
    if recipe == "qwen-finetune":
        return _qwen_plan(config, shape, memory)
    rows = _rows_of(config)
    choice = choose(config, shape, memory, supervised=rows.supervised if rows else 1.0)
    asked, chosen = choice.asked, choice.chosen
    fullest = peak(chosen)
    asked_peak = peak(asked).bytes
    return {
        "model": {"name": shape.name, "parameters": shape.parameters},
        "memory": asdict(memory),
        "predicted_peak_bytes": fullest.bytes,
        "fits": fullest.bytes <= memory.bytes,
        "recipe": {"name": "ours", **settings_of(chosen)},
        "ledger": _plain(fullest)["ledger"],
        "peak_phase": fullest.name,
        "phases": [_plain(p) for p in phases(chosen)],
        "asked": {"predicted_peak_bytes": asked_peak, "fits": asked_peak <= memory.bytes, **settings_of(asked)},
        "by_hand": sorted(f"train.{name}" for name in by_hand(config)),
        "keeps_by_hand": choice.keeps_by_hand,
        "switches": [asdict(s) for s in switches(chosen, memory)],
        "offload": offload(chosen, memory),
        "epoch": _epoch(chosen, rows, memory) if rows else None,
    }


def _plain(phase: Phase) -> dict[str, Any]:
    ledger = [asdict(row) for row in phase.rows if row.bytes]
    return {"name": phase.name, "bytes": phase.bytes, "on_host": phase.on_host, "ledger": ledger}


# ---- settings -> setup, and back -------------------------------------------------------------------------------------


def setup_of(config: Config, shape: Shape, *, on_gpu: bool, supervised: float = 1.0) -> Setup:
    """What of the settings decides memory. `supervised`: the share of tokens that are taught; 1 is the worst."""
    t, longest = config.train, config.data.model_max_length
    max_tokens = t.max_tokens or MAX_TOKENS
    step = t.per_device_train_batch_size * t.gradient_accumulation_steps * longest  # no micro-batch is larger
    layers = (t.checkpoint_layers or shape.layers) if t.gradient_checkpointing else 0
    return Setup(
        shape=shape,
        dtype=_dtype(config, on_gpu),
        quantization=config.model.quantization,
        r=config.lora.r,
        targets=_targets(config.lora.target_modules, shape),
        trained_whole=_trained_whole(config.lora.modules_to_save, shape),
        trained_tokens=len(TURN_TOKENS if "auto" in config.lora.trainable_tokens else config.lora.trainable_tokens),
        max_tokens=min(max_tokens, step),
        step_tokens=step,
        longest_row=longest,
        supervised=supervised,
        checkpoint_layers=min(layers, shape.layers),
        head_chunk=t.head_chunk or HEAD_CHUNK,
        on_gpu=on_gpu,
        gives_back=t.memory_limit is not None,
    )


def settings_of(setup: Setup) -> dict[str, Any]:
    """The settings by which `cmqa train` runs it."""
    return {
        "model.dtype": setup.dtype,
        "model.quantization": setup.quantization,
        "train.max_tokens": setup.max_tokens,
        "train.gradient_checkpointing": setup.checkpoint_layers > 0,
        "train.checkpoint_layers": setup.checkpoint_layers,
        "train.head_chunk": setup.head_chunk,
    }


def _dtype(config: Config, on_gpu: bool) -> str:
    wanted = "bfloat16" if config.train.bf16 and config.model.dtype == "auto" else config.model.dtype
    if wanted != "auto":
        return wanted
    return "bfloat16" if on_gpu or cpu_computes_in_bfloat16() else "float32"


def _targets(names: Sequence[str], shape: Shape) -> tuple[str, ...] | None:
    if "all-linear" in names:
        return None
    found = [
        today for name in names for today in ((name,) if name in shape.linears else QWEN_V1_NAMES.get(name, (name,)))
    ]
    for name in found:
        if name not in shape.linears:
            raise ConfigError(
                f"target_modules: {name!r} is not planned", hint=f"all-linear, {', '.join(shape.linears)}"
            )
    return tuple(dict.fromkeys(found))


def _trained_whole(names: Sequence[str], shape: Shape) -> int:
    """Parameters of modules_to_save."""
    sizes = {"embed_tokens": shape.embedding_parameters, "lm_head": shape.embedding_parameters}
    sizes |= {name: shape.layers * out * inner for name, (out, inner) in shape.linears.items()}
    total = 0
    for name in names:
        for today in (name,) if name in sizes else QWEN_V1_NAMES.get(name, (name,)):
            if today not in sizes:
                raise ConfigError(f"modules_to_save: {today!r} is not planned", hint=f"One of {', '.join(sizes)}.")
            total += sizes[today]
    return total


# ---- the memory there is ---------------------------------------------------------------------------------------------


def memory_of(gpu_memory: str | None, gpu: str | None, device: str) -> Memory:
    if gpu is not None and _card(gpu) is None:
        raise ConfigError(f"--gpu {gpu!r} is not in the table", hint=f"One of {', '.join(CARDS)}.")
    if gpu_memory is not None:
        return Memory(bytes_of(gpu_memory, "gpu-memory"), gpu or "gpu", free=False)
    seen = None if device == "cpu" else _card_seen()
    if seen is not None:
        return Memory(seen[1], gpu or seen[0], free=True)
    if device.startswith("cuda") or gpu:
        raise ConfigError("no card is seen here (nvidia-smi)", hint="Name its memory: --gpu-memory 24GiB")
    return Memory(_free_of_machine(), "cpu", free=True)


def _card_seen() -> tuple[str, int] | None:
    """(name, free bytes) of the first card, as nvidia-smi says."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.free", "--format=csv,noheader,nounits", "--id=0"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout
        name, free = said.strip().splitlines()[0].rsplit(",", 1)
        return name.strip(), int(free) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _free_of_machine() -> int:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    raise ConfigError(f"the free memory of {platform.system()} is not known here", hint="--gpu-memory 24GiB")


def _card(name: str) -> tuple[float, float] | None:
    return next((speeds for card, speeds in CARDS.items() if card.lower() in name.lower()), None)


# ---- the fastest that fits -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choice:
    asked: Setup  # what is given, and the ceiling of what is not
    chosen: Setup
    keeps_by_hand: bool  # False: with what a person set nothing fits, and `chosen` would


def choose(config: Config, shape: Shape, memory: Memory, *, supervised: float = 1.0) -> Choice:
    """The fastest settings that fit beside those that a person set; where there are none, the fastest of all."""
    asked, given = setup_of(config, shape, on_gpu=memory.on_gpu, supervised=supervised), by_hand(config)
    chosen = solve(asked, memory, given)
    if given and peak(chosen).bytes > memory.bytes:
        free = solve(asked, memory)
        if peak(free).bytes <= memory.bytes:
            return Choice(asked, free, keeps_by_hand=False)
    return Choice(asked, chosen, keeps_by_hand=True)


def by_hand(config: Config) -> frozenset[str]:
    """Of the settings that a plan may choose those that a person set."""
    names = ("max_tokens", "gradient_checkpointing", "head_chunk")
    return frozenset(name for name in names if getattr(config.train, name) is not None)


def solve(asked: Setup, memory: Memory, kept: frozenset[str] = frozenset()) -> Setup:
    """`asked` where it fits with MARGIN; else the fastest settings below it that do; else those that take least.

    kept  names as `by_hand` gives them: they stay as asked
    """
    room = memory.bytes * (1 - MARGIN)
    if peak(asked).bytes <= room:
        return asked
    sizes = {setup: peak(setup).bytes for setup in _candidates(asked, kept)}
    fitting = [setup for setup, size in sizes.items() if size <= room]
    if fitting:
        return min(fitting, key=lambda s: cost(s, memory))
    return min(sizes, key=lambda s: sizes[s])


def _candidates(asked: Setup, kept: frozenset[str] = frozenset()) -> Iterator[Setup]:
    tokens = asked.max_tokens
    last = asked.checkpoint_layers if "gradient_checkpointing" in kept else asked.shape.layers
    sizes = [tokens]
    while tokens > max(256, asked.longest_row) and "max_tokens" not in kept:
        tokens = max(tokens // 2, asked.longest_row)
        sizes.append(tokens)
    chunks = (asked.head_chunk,) if "head_chunk" in kept else (asked.head_chunk, min(asked.head_chunk, 64))
    for size in sizes:
        for layers in range(asked.checkpoint_layers, last + 1):
            for chunk in dict.fromkeys(chunks):
                yield replace(asked, max_tokens=size, checkpoint_layers=layers, head_chunk=chunk)


def cost(setup: Setup, memory: Memory) -> float:
    """Operations a token, with the reading of the weights, once each way for every micro-batch, counted as the
    operations that the card does meanwhile."""
    card = _card(memory.device)
    operations_per_byte = card[0] / card[1] if card else _OPERATIONS_PER_BYTE
    shape = setup.shape
    of_weight: float = setup.value_bytes
    if setup.quantization != "none":  # read packed, written out, read again
        of_weight = 2 * of_weight + (NF4_BYTES if setup.quantization == "nf4" else 1)
    layer = shape.linear_parameters * of_weight
    read = (2 * shape.layers + setup.checkpoint_layers) * layer
    head = 2 * shape.vocab * shape.hidden * setup.value_bytes * math.ceil(setup.taught / setup.head_chunk)
    return flops_per_token(setup) + operations_per_byte * (read + head) / setup.tokens


@dataclass(frozen=True, slots=True)
class Switch:
    """One change of the chosen settings: bytes it frees at the peak (negative: takes), and time a token, as a share."""

    flag: str
    frees_bytes: int
    time: float  # 0.1: a tenth slower
    fits: bool
    changes_gradient: bool = False


def switches(chosen: Setup, memory: Memory) -> tuple[Switch, ...]:
    shape = chosen.shape
    other: dict[str, Setup] = {}
    if chosen.checkpoint_layers:
        other["--no-gradient-checkpointing"] = replace(chosen, checkpoint_layers=0)
    if chosen.checkpoint_layers < shape.layers:
        other["--gradient-checkpointing"] = replace(chosen, checkpoint_layers=shape.layers)
    if chosen.max_tokens > max(256, chosen.longest_row):
        half = max(chosen.max_tokens // 2, chosen.longest_row)
        other[f"--max-tokens {half}"] = replace(chosen, max_tokens=half)
    other[f"--max-tokens {2 * chosen.max_tokens}"] = replace(chosen, max_tokens=2 * chosen.max_tokens)
    if chosen.head_chunk > 64:
        other["--head-chunk 64"] = replace(chosen, head_chunk=64)
    changing: dict[str, Setup] = {}
    if chosen.quantization == "none":
        changing["--quantization nf4"] = replace(chosen, quantization="nf4")
    if chosen.r > 16:
        changing["--lora.r 16"] = replace(chosen, r=16)
    if chosen.trained_whole:
        changing["--modules-to-save none"] = replace(chosen, trained_whole=0)
    now, speed = peak(chosen).bytes, cost(chosen, memory)
    return tuple(
        Switch(flag, now - then, cost(setup, memory) / speed - 1, peak(setup).bytes <= memory.bytes, flag in changing)
        for flag, setup in (other | changing).items()
        for then in (peak(setup).bytes,)
    )


def offload(chosen: Setup, memory: Memory) -> dict[str, Any]:
    """What the optimizer's states on the host would free, and the fastest settings that free as much.

    It is not built: docs/decisions/0011-no-optimizer-offload.md has the numbers.
    """
    fullest = peak(chosen)
    frees = sum(row.bytes for row in fullest.rows if row.name.endswith("optimizer states"))
    fitting = [s for s in _candidates(chosen) if fullest.bytes - peak(s).bytes >= frees]
    if not fitting:
        return {"frees_bytes": frees, "instead": None, "time": None}
    instead = min(fitting, key=lambda s: cost(s, memory))
    now, then = settings_of(chosen), settings_of(instead)
    changes = {name: then[name] for name in then if then[name] != now[name]}
    return {"frees_bytes": frees, "instead": changes, "time": cost(instead, memory) / cost(chosen, memory) - 1}


# ---- the data's share: operations and time of an epoch ---------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RowCount:
    """Estimated from characters: the model's tokenizer is not loaded."""

    rows: int
    tokens: int
    taught: int

    @property
    def supervised(self) -> float:
        return self.taught / self.tokens


def _rows_of(config: Config) -> RowCount | None:
    if not config.data.path:
        return None
    from ..data.prepare import load_split

    examples = load_split(
        Path(config.data.path), "train", dev_fraction=config.data.dev_fraction, seed=config.train.seed
    )
    return count_rows(examples, config.data.model_max_length)


def count_rows(examples: Iterable[Example], longest: int) -> RowCount | None:
    """None where no row is left."""
    rows, tokens, taught = 0, 0, 0
    for example in examples:
        turns = [(m.role, TOKENS_PER_CHARACTER * len(m.content) + TOKENS_PER_TURN) for m in example.messages]
        total = sum(n for _, n in turns)
        if total <= longest:  # longer ones are left out, or shortened to about the limit
            rows, tokens = rows + 1, tokens + round(total)
            taught += round(sum(n for role, n in turns if role == "assistant"))
    return RowCount(rows, tokens, taught) if rows else None


def _epoch(setup: Setup, rows: RowCount, memory: Memory) -> dict[str, Any]:
    mean = rows.tokens / rows.rows
    share = setup.checkpoint_layers / setup.shape.layers
    flops = rows.tokens * flops_per_token(setup) + rows.taught * flops_per_taught_token(setup.shape)
    flops += rows.rows * flops_of_attention(setup.shape, round(mean), share)
    card = _card(memory.device)
    return {
        **asdict(rows),
        "estimated_from_characters": True,
        "flops": flops,
        "assumed_mfu": ASSUMED_MFU if card else None,
        "seconds": flops / (card[0] * ASSUMED_MFU) if card else None,
    }


# ---- Qwen's own script -----------------------------------------------------------------------------------------------


def _qwen_plan(config: Config, shape: Shape, memory: Memory) -> dict[str, Any]:
    """The same numbers through qwen_recipe.py, with the cause and the cure beside it."""
    embeddings = qwen_recipe.trains_embeddings(config.model.name_or_path)
    asked: dict[str, Any] = {
        "r": config.lora.r,
        "length": config.data.model_max_length,
        "batch": config.train.per_device_train_batch_size,
        "quantised": False,
    }

    def fullest(layers: int, embeddings: bool) -> Phase:
        return qwen_recipe.peak(shape.with_layers(layers), embeddings=embeddings, **asked)

    now, half = fullest(shape.layers, embeddings), max(1, shape.layers // 2)
    ours = choose(config, shape, memory if memory.on_gpu else replace(memory, device="gpu")).chosen
    return {
        "model": {"name": shape.name, "parameters": shape.parameters},
        "memory": asdict(memory),
        "predicted_peak_bytes": now.bytes,
        "fits": now.bytes <= memory.bytes,
        "recipe": {"name": "qwen-finetune", "modules_to_save": ["wte", "lm_head"] if embeddings else [], **asked},
        "ledger": _plain(now)["ledger"],
        "peak_phase": now.name,
        "phases": [_plain(p) for p in qwen_recipe.phases(shape, embeddings=embeddings, **asked)],
        "why": {
            "name_or_path": config.model.name_or_path,
            "trains_embeddings": embeddings,
            "embedding_parameters": shape.embedding_parameters + shape.head_parameters,
            "without_embeddings_bytes": fullest(shape.layers, False).bytes,
            "half_of_the_layers": half,
            "half_of_the_layers_bytes": fullest(half, embeddings).bytes,
            "ours_bytes": peak(ours).bytes,
            "ours": settings_of(ours),
        },
    }


def explain(result: dict[str, Any]) -> str:
    """The cause and the cure of --recipe qwen-finetune, as sentences."""
    why = result["why"]
    values = {
        "name": why["name_or_path"],
        "millions": f"{why['embedding_parameters'] / 1e6:,.0f}",
        "now": _gib(result["predicted_peak_bytes"]),
        "memory": _gib(result["memory"]["bytes"]),
        "without": _gib(why["without_embeddings_bytes"]),
        "half": why["half_of_the_layers"],
        "half_bytes": _gib(why["half_of_the_layers_bytes"]),
        "ours": _gib(why["ours_bytes"]),
    }
    return say("plan.why_embeddings" if why["trains_embeddings"] else "plan.why_lora_only", **values)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
