"""The one typed tree of settings: defaults < YAML < flags.

Reading it is inert: nothing is downloaded, no environment variable is set, torch is not imported.
Names are those of HF TrainingArguments and PEFT LoraConfig. Only the top of a verb reads the tree.

    Config > rooms > fields                       written once, with type, default and meaning
    ["--learning_rate", "1e-4"]                   what a person types
    ["--train.learning-rate", "1e-4"]             after `rewrite_argv`: full names, tyro's form
    parse(Config, argv, yaml_file) -> Config      YAML's leaves go first, as flags of the same form
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import hashlib
import io
import json
import math
import re
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from .errors import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    name_or_path: str = "embedded"
    """Hub name, local folder, "embedded" (Gemma 3 270M of the demo extra) or "tiny" (built in, random weights)."""
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"
    """Of the frozen base; LoRA weights are always float32 (float64 under float64). auto: bfloat16 where the
    device computes in it, else float32."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Of the layers' frozen matrices, made while they are loaded: nf4 (QLoRA: 4 bits, constants quantised too) takes a
    quarter of 16 bits, int8 half. Needs bitsandbytes (extra gpu). dtype stays that of the computation."""
    device: str = "auto"
    """"cpu", "cuda", "cuda:1"; auto takes a GPU when there is one."""
    num_hidden_layers: int | None = None
    """Keep the base's first so many layers, as the seed did to fit its card. What is left is a damaged model."""


@dataclass(frozen=True)
class DataConfig:
    path: str | None = None
    """Folder made by `cmqa prepare`, a JSONL of messages, or the seed's conversations JSON."""
    model_max_length: int = 512
    """Longest row in tokens; what is longer is treated by on_too_long, never cut silently."""
    on_too_long: Literal["drop", "shorten", "error"] = "drop"
    """shorten: cut the answer at the last sentence end that fits, with its end token."""
    system: str | None = None
    """System prompt put before rows that have none; None adds nothing."""
    chat_template: str | None = None
    """chatml, gemma, or a .jinja file; None: ChatML for Qwen, else the tokenizer's own."""
    replay: str | None = None
    """General rows (JSONL of messages) mixed into the training rows, against forgetting."""
    dev_path: str | None = None
    """Dev rows in a file or folder of their own, in place of the dev split of path."""
    dev_fraction: float = 0.0
    """Of the rows of a single file that names no dev split: this share becomes the dev set."""
    token_cache_gib: float = 8.0
    """Tokens of large data sets stay in the cache folder (CMQA_CACHE) for the next run, at most so many GiB in all;
    0 keeps none."""
    shared_prefixes: bool = True
    """What rows of a pack begin with alike is computed once: the system prompt, a question with several answers (which
    then stay in one step). Changes no gradient; off where there is dropout."""


@dataclass(frozen=True)
class LoraConfig:
    r: int = 64
    """Width of A and B; the adapter's size grows with it."""
    lora_alpha: float = 16
    """The update is scaled by lora_alpha / r."""
    lora_dropout: float = 0.0
    """The seed used 0.05. Ours is 0: rows are seen a few times only, and 0 keeps every fast path exact."""
    target_modules: tuple[str, ...] = ("all-linear",)
    modules_to_save: tuple[str, ...] = ()
    """Modules trained whole, such as wte lm_head of a base model; the memory they take is said first."""
    trainable_tokens: tuple[str, ...] = ()
    """Tokens whose rows of embedding and head are trained: none, their names, or auto: those of the chat template's
    turn tokens that the base has not learned. Such an adapter is not in the portable profile."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r); folded into lora_alpha when the adapter is saved."""


@dataclass(frozen=True)
class TrainConfig:
    output_dir: str | None = None
    num_train_epochs: float = 1.0
    max_steps: int = -1
    """Stop after this many steps; -1 means by epochs."""
    per_device_train_batch_size: int = 2
    gradient_accumulation_steps: int = 8
    per_device_eval_batch_size: int = 8
    """Kept for the seed's command line; evaluation packs by max_tokens."""
    fit: Literal["auto", "off"] = "auto"
    """auto: max_tokens, gradient_checkpointing and head_chunk, where they are not given, become what the free memory
    holds (`cmqa plan` says which); a run that cannot fit is refused. off: 2048, none, 512. No gradient changes."""
    max_tokens: int | None = None
    """Tokens of a micro-batch at most (a single longer row stands alone). Changes no gradient. None: see fit."""
    learning_rate: float = 3e-4
    weight_decay: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    """Clipping by the global L2 norm; 0 switches it off."""
    warmup_ratio: float = 0.03
    """Share of all steps over which the learning rate rises; the first step of a rise has rate 0, as in HF."""
    warmup_steps: int = 0
    """Steps of the rise; more than 0 wins over warmup_ratio."""
    lr_scheduler_type: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    gradient_checkpointing: bool | None = None
    """Layers keep their input only and are computed again in the backward: less memory, up to half more time.
    None: see fit."""
    checkpoint_layers: int = 0
    """With gradient_checkpointing: only the first so many layers; 0: all."""
    head_chunk: int | None = None
    """Rows of logits that are held at once. Changes no gradient. None: see fit."""
    bf16: bool = False
    """The seed's flag: the base in bfloat16 (model.dtype bfloat16)."""
    logging_steps: int = 1
    eval_steps: int = 0
    """Dev loss and ranking every so many steps; 0: at the end of each epoch."""
    eval_rank_questions: int = 64
    """Dev questions whose 20 candidates are ranked at each evaluation, where the data has candidates; 0 ranks none."""
    metric_for_best_model: Literal["dev_loss", "dev_mrr"] = "dev_loss"
    """What the best adapter and early stopping go by."""
    early_stopping_patience: int = 0
    """Stop after so many evaluations in a row without a better one; 0 never stops early."""
    save_steps: int = 0
    """Checkpoint every so many steps; 0: at the end of each epoch."""
    save_total_limit: int = 2
    """Checkpoints kept; 0 keeps all."""
    seed: int = 42
    report_to: tuple[str, ...] = ()
    """Trackers: tensorboard."""
    resume: Literal["auto", "anyway"] = "auto"
    """anyway: go on with a run that was started on other versions or another processor, and note it."""
    deterministic: bool = False
    """Only kernels that give the same bits every time: on a GPU a resumed run is exact with it, and slower. On a CPU it
    is exact anyway."""
    memory_limit: str | None = None
    """"8GiB": memory above it is an error that the run answers (smaller micro-batches) instead of the process's end.
    On a GPU of torch's allocator; else of the process's data."""
    max_bad_steps: int = 10
    """A step whose loss or gradient is not finite is not applied; more than this many in a row end the run."""


@dataclass(frozen=True)
class EvaluateConfig:
    split: Literal["dev", "test"] = "test"
    quick: bool = False
    """No more than 100 rows, 60 questions x 20 candidates of 32 tokens, 100 probe questions, 80 new tokens."""
    max_new_tokens: int = 160
    generate_rows: int = -1
    """Questions whose answers are generated by base and adapter; 0 generates none, -1 all."""
    loss_rows: int = 0
    """Rows scored by loss; 0 takes the whole split."""
    rank_questions: int = -1
    """Questions whose candidates are ranked; 0 ranks none, -1 all."""
    rank_candidates: int = 100
    """Candidates of each question; 0 takes the whole list."""
    rank_tokens: int = 0
    """Tokens of a candidate that are scored; 0 scores all."""
    general_chat: bool = True
    """Ask the bundled general questions."""
    red_flags: bool = True
    """Ask the bundled red-flag questions."""
    probe: str | None = None
    """Folder or CSV of multiple choice (C-Eval, CMMLU, CMExam forms), to measure forgetting."""
    probe_questions: int = 0
    """Probe questions asked; 0 asks all."""
    probe_shots: int = 0
    """Worked examples before each probe question, from the subject's dev file; five at most."""
    lm_eval: tuple[str, ...] = ()
    """Tasks of EleutherAI's harness for both sides, where it is installed (extra harness); it uses the network."""
    max_forgetting: float = 0.05
    """Share of right answers that the adapter may lose."""
    gate: bool = False
    """Exit 4 unless the task is better, and forgetting and safety are within their limits."""
    bootstrap_samples: int = 10_000
    bootstrap_seed: int = 42


@dataclass(frozen=True)
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)


# ---- names -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """One field of a tree: `name` is "train.learning_rate"; `kind` its type with `| None` taken off."""

    name: str
    kind: Any
    optional: bool

    @property
    def is_bool(self) -> bool:
        return self.kind is bool

    @property
    def is_list(self) -> bool:
        return typing.get_origin(self.kind) is tuple

    @property
    def choices(self) -> tuple[str, ...]:
        return typing.get_args(self.kind) if typing.get_origin(self.kind) is Literal else ()


def settings(tree: type, prefix: str = "") -> Iterator[Setting]:
    """Every field of a tree of dataclasses, in the order written."""
    hints = typing.get_type_hints(tree)
    for f in dataclasses.fields(tree):
        kind = hints[f.name]
        if dataclasses.is_dataclass(kind):
            yield from settings(typing.cast(type, kind), f"{prefix}{f.name}.")
            continue
        inner = [a for a in typing.get_args(kind) if a is not type(None)]
        optional = len(inner) < len(typing.get_args(kind))
        yield Setting(prefix + f.name, inner[0] if optional else kind, optional)


def _names(tree: type) -> dict[str, Setting]:
    """Every way to write a flag of `tree` -> its setting.

    train.save_steps:  train.save-steps  train-save-steps  save-steps (where no other room has it)
    model.name_or_path: also model (a room named alone means its first field)
    """
    everything = list(settings(tree))
    short: dict[str, list[Setting]] = {}
    ways: dict[str, Setting] = {}
    for s in everything:
        full = s.name.replace("_", "-")
        ways[full] = ways[full.replace(".", "-")] = s
        short.setdefault(full.rsplit(".", 1)[-1], []).append(s)
    for s in reversed(everything):  # reversed: the first field of a room is written last and stays
        if "." in s.name:
            ways[s.name.split(".", 1)[0]] = s
    for name, owners in short.items():
        if len(owners) == 1:
            ways.setdefault(name, owners[0])
    return ways


def _unknown(name: str, tree: type, ways: dict[str, Setting], **where: Any) -> ConfigError:
    owners = [s.name for s in settings(tree) if s.name.rsplit(".", 1)[-1].replace("_", "-") == name]
    if len(owners) > 1:
        return ConfigError(f"--{name} could mean {' or '.join(owners)}", hint="Write the full name.", **where)
    near = difflib.get_close_matches(name, ways, n=1, cutoff=0.5)
    hint = f"Did you mean --{near[0]}?" if near else "See --help for the names."
    return ConfigError(f"unknown setting --{name}", hint=hint, **where)


# ---- argv --------------------------------------------------------------------------------------------------------

_TRUE, _FALSE = {"true", "yes", "1", "on"}, {"false", "no", "0", "off"}


def rewrite_argv(tree: type, argv: Sequence[str], positionals: Sequence[str] = ()) -> list[str]:
    """What a person types -> tyro's form: full names, `--flag` / `--room.no-flag` for booleans, choices in their case.

    `positionals` names the settings that bare words fill, in order; the last one may be a list and takes the rest.
    Raises ConfigError for an unknown flag (with the nearest one) and for a bare word too many.
    """
    ways = _names(tree)
    words, out = list(argv), []
    bare: list[str] = []
    while words:
        word = words.pop(0)
        if not word.startswith("--") or word == "--":
            if word.startswith("-") and not re.match(r"-\d", word) and word not in ("-", "--"):
                raise ConfigError(f"unknown option {word}", hint="Flags have two dashes; see --help.")
            bare.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("_", "-").lower()
        setting, negated = ways.get(name), False
        if setting is None:
            positive = re.sub(r"(^|\.)no-", r"\1", name, count=1)
            if positive != name and (setting := ways.get(positive)) is not None and setting.is_bool:
                negated = True
            else:
                raise _unknown(name, tree, ways)
        if equals:
            values = [value]
        elif setting.is_bool:
            values = [words.pop(0)] if words and words[0].lower() in _TRUE | _FALSE else []
        else:
            values = []
            while words and (not words[0].startswith("--")) and (setting.is_list or not values):
                values.append(words.pop(0))
        out += _tyro_words(setting, values, negated)
    for index, name in enumerate(positionals):
        setting = ways[name.replace("_", "-")]
        if bare:
            take = len(bare) if index == len(positionals) - 1 and setting.is_list else 1
            out += _tyro_words(setting, [bare.pop(0) for _ in range(take)], False)
    if bare:
        raise ConfigError(f"unexpected {bare[0]!r}", hint="Settings are written as --name value; see --help.")
    return out


def _tyro_words(setting: Setting, values: list[str], negated: bool) -> list[str]:
    flag = "--" + setting.name.replace("_", "-")
    if setting.is_bool:
        on = not values or values[0].lower() in _TRUE
        if values and values[0].lower() not in _TRUE | _FALSE:
            raise ConfigError(f"{flag} takes True or False, not {values[0]!r}")
        if setting.optional:
            return [flag, str(on != negated)]
        room, _, name = flag[2:].rpartition(".")
        return [flag] if on != negated else [f"--{room + '.' if room else ''}no-{name}"]
    if not values and not setting.is_list:
        raise ConfigError(f"{flag} needs a value")
    if setting.is_list and values == ["none"]:
        values = []
    if setting.choices:
        by_case = {c.lower(): c for c in setting.choices}
        if (values[0].lower()) not in by_case:
            near = difflib.get_close_matches(values[0].lower(), by_case, n=1)
            raise ConfigError(
                f"{flag} cannot be {values[0]!r}",
                hint=f"One of {', '.join(setting.choices)}." + (f" Did you mean {near[0]}?" if near else ""),
            )
        values = [by_case[values[0].lower()]]
    if setting.kind is float and values and values[0].lower().lstrip("+-") in ("nan", "inf", "infinity"):
        raise ConfigError(f"{flag} must be a finite number, not {values[0]}")
    if not any(value.startswith("-") for value in values):
        return [flag, *values]
    if setting.is_list:
        raise ConfigError(f"{flag}: {next(v for v in values if v.startswith('-'))!r} begins with a dash")
    return [f"{flag}={values[0]}"]  # else a text that begins with a dash would be read as a flag


def _yaml_words(tree: type, file: Path) -> list[str]:
    """The leaves of a YAML file as flags; a scalar where a room is expected sets the room's first field."""
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError("no such file", file=file, hint="Named configs lie in configs/.") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise ConfigError(f"not a readable YAML file: {str(e).splitlines()[0]}", file=file) from None
    if content is None:
        return []
    if not isinstance(content, dict):
        raise ConfigError(f"a mapping of settings is expected, found {type(content).__name__}", file=file)
    ways, words = _names(tree), []

    def walk(node: dict[Any, Any], prefix: str) -> None:
        for key, value in node.items():
            name = (prefix + str(key)).replace("_", "-")
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
                continue
            setting = ways.get(name.lower())
            if setting is None:
                raise _unknown(name, tree, ways, file=file)
            if value is None:
                continue
            values = [str(v) for v in value] if isinstance(value, list) else [str(value)]
            if isinstance(value, list) and not setting.is_list:
                raise ConfigError(f"one value is expected, found a list of {len(value)}", file=file, field=setting.name)
            try:
                words.extend(_tyro_words(setting, values, False))
            except ConfigError as e:
                raise ConfigError(e.message, file=file, field=setting.name, hint=e.hint) from None

    walk(content, "")
    return words


Tree = TypeVar("Tree")


def parse(
    tree: type[Tree],
    argv: Sequence[str] = (),
    *,
    yaml_file: str | Path | None = None,
    positionals: Sequence[str] = (),
    prog: str | None = None,
    description: str | None = None,
    explained: Mapping[str, str] | None = None,
) -> Tree:
    """Defaults < YAML < flags -> one frozen tree. Raises ConfigError; SystemExit(0) after printing --help.

    `explained` gives --help another text for a setting, by full name: the tree's own are in English.
    """
    import tyro

    if any(word in ("-h", "--help") for word in argv):
        shown = _explained(tree, explained) if explained else tree
        return tyro.cli(shown, prog=prog, description=description, args=["--help"])
    words = _yaml_words(tree, Path(yaml_file)) if yaml_file is not None else []
    words += rewrite_argv(tree, argv, positionals)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            result = tyro.cli(tree, prog=prog, args=_last_of_each(words))
    except SystemExit:
        found = re.search(r"Error parsing (.*?)\s*[│|]?\s*$", said.getvalue(), re.MULTILINE)
        reason = found.group(1) if found else " ".join(said.getvalue().split())[:300]
        raise ConfigError(reason, hint="See --help for names and types.") from None
    check_ranges(result)
    return result


def _explained(tree: type, texts: Mapping[str, str], prefix: str = "") -> type:
    """`tree` with other texts beside its settings, to be printed only."""
    import tyro

    fields: list[tuple[str, Any, Any]] = []
    hints = typing.get_type_hints(tree)
    for f in dataclasses.fields(tree):
        kind: Any = hints[f.name]
        name = prefix + f.name
        if dataclasses.is_dataclass(kind):
            room = _explained(typing.cast(type, kind), texts, f"{name}.")
            fields.append((f.name, room, field(default_factory=room)))
        else:
            said = tyro.conf.arg(help=texts.get(name, ""))
            fields.append((f.name, Annotated[kind, said], field(default=f.default)))
    return dataclasses.make_dataclass(tree.__name__, fields, frozen=True)


def _last_of_each(words: list[str]) -> list[str]:
    """Of a setting written twice the last one counts, also when a list or a boolean is written twice."""
    groups: dict[str, list[str]] = {}
    current: list[str] = []
    for word in words:
        if word.startswith("--"):
            key = re.sub(r"(^--|\.)no-", r"\1", word.partition("=")[0])
            groups.pop(key, None)
            current = groups.setdefault(key, [])
        current.append(word)
    return [word for group in groups.values() for word in group]


# ---- values ------------------------------------------------------------------------------------------------------

_UNITS = {"": 1, "b": 1, **{f"{p}ib": 2 ** (10 * i) for i, p in enumerate("kmgt", 1)}}
_UNITS |= {f"{p}b": 1000**i for i, p in enumerate("kmgt", 1)} | {p: 2 ** (10 * i) for i, p in enumerate("kmgt", 1)}


def bytes_of(text: str, setting: str) -> int:
    """ "24GiB" and "24G" are 24 * 2**30, "24GB" is 24 * 10**9, a bare number counts bytes. Raises ConfigError."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if found is None or found[2].lower() not in _UNITS or not float(found[1]):
        raise ConfigError(f"--{setting} is {text!r}; an amount of memory is expected", hint="24GiB, 512MiB or 24GB.")
    return int(float(found[1]) * _UNITS[found[2].lower()])


_RANGES: dict[str, tuple[float, float]] = {
    "model.num_hidden_layers": (1, math.inf),
    "data.model_max_length": (8, math.inf),
    "data.dev_fraction": (0, 0.5),
    "data.token_cache_gib": (0, 1e6),
    "lora.r": (1, 4096),
    "lora.lora_alpha": (1e-6, math.inf),
    "lora.lora_dropout": (0, 0.95),
    "train.num_train_epochs": (1e-6, math.inf),
    "train.max_steps": (-1, math.inf),
    "train.per_device_train_batch_size": (1, math.inf),
    "train.gradient_accumulation_steps": (1, math.inf),
    "train.per_device_eval_batch_size": (1, math.inf),
    "train.max_tokens": (8, math.inf),
    "train.checkpoint_layers": (0, math.inf),
    "train.head_chunk": (1, math.inf),
    "train.learning_rate": (0, 10),
    "train.weight_decay": (0, 10),
    "train.adam_beta1": (0, 0.999999),
    "train.adam_beta2": (0, 0.9999999),
    "train.adam_epsilon": (0, 1),
    "train.max_grad_norm": (0, math.inf),
    "train.warmup_ratio": (0, 1),
    "train.warmup_steps": (0, math.inf),
    "train.max_bad_steps": (0, math.inf),
    "train.logging_steps": (1, math.inf),
    "train.eval_steps": (0, math.inf),
    "train.eval_rank_questions": (0, math.inf),
    "train.early_stopping_patience": (0, math.inf),
    "train.save_steps": (0, math.inf),
    "train.save_total_limit": (0, math.inf),
    "train.seed": (0, 2**63 - 1),
    "evaluate.max_new_tokens": (1, math.inf),
    "evaluate.generate_rows": (-1, math.inf),
    "evaluate.rank_questions": (-1, math.inf),
    "evaluate.rank_candidates": (0, math.inf),
    "evaluate.rank_tokens": (0, math.inf),
    "evaluate.probe_questions": (0, math.inf),
    "evaluate.probe_shots": (0, 5),
    "evaluate.max_forgetting": (0, 1),
    "evaluate.loss_rows": (0, math.inf),
    "evaluate.bootstrap_samples": (100, 1_000_000),
    "evaluate.bootstrap_seed": (0, 2**63 - 1),
}


def check_ranges(tree: Any) -> None:
    """Raises ConfigError for the first value outside its range."""
    for name, value in as_flat_dict(tree).items():
        if name in _RANGES and value is not None:
            low, high = _RANGES[name]
            if not (low <= value <= high):
                raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must lie in {low:g} .. {high:g}")


def as_flat_dict(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"train.learning_rate": 3e-4, ...} in the order written."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(tree):
        value = getattr(tree, f.name)
        if dataclasses.is_dataclass(value):
            flat.update(as_flat_dict(value, f"{prefix}{f.name}."))
        else:
            flat[prefix + f.name] = value
    return flat


def as_yaml(tree: Any) -> str:
    """The resolved tree; `parse(type(tree), yaml_file=...)` reads the same tree back."""
    import yaml

    plain = json.loads(json.dumps(dataclasses.asdict(tree)))
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)


def config_hash(tree: Any) -> str:
    """sha256 over every setting that decides what is computed: two runs with one hash compute the same."""
    flat = {k: v for k, v in as_flat_dict(tree).items() if k not in ("train.output_dir", "data.token_cache_gib")}
    return hashlib.sha256(json.dumps(flat, sort_keys=True).encode()).hexdigest()
