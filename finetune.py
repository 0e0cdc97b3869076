"""The seed's command line: Qwen's finetune.py with LoRA, on top of `cmqa train`.

    python finetune.py --model_name_or_path M --data_path D.json --output_dir O --use_lora --bf16 True ...
      |  cmqa_words: each flag as HF's TrainingArguments and Qwen's script take it -> our settings
    cmqa train --model M --data D.json --output-dir O --model.dtype bfloat16 ...

Defaults are those of Qwen's script (its dataclasses over TrainingArguments of transformers 4.37). A flag that means
nothing here is accepted with one line that says why; an unknown one is refused with the nearest.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence

from lora_cmqa.cli import main
from lora_cmqa.errors import CmqaError, ConfigError
from lora_cmqa.messages import say

# flag -> our setting; the value goes over as it is
SAME = {
    "model_name_or_path": "model.name-or-path",
    "num_hidden_layers": "model.num-hidden-layers",  # the seed edited config.json by hand
    "data_path": "data.path",
    "model_max_length": "data.model-max-length",
    "lora_r": "lora.r",
    "lora_alpha": "lora.lora-alpha",
    "lora_dropout": "lora.lora-dropout",
    "lora_target_modules": "lora.target-modules",
    "output_dir": "train.output-dir",
    "num_train_epochs": "train.num-train-epochs",
    "max_steps": "train.max-steps",
    "per_device_train_batch_size": "train.per-device-train-batch-size",
    "per_device_eval_batch_size": "train.per-device-eval-batch-size",
    "gradient_accumulation_steps": "train.gradient-accumulation-steps",
    "learning_rate": "train.learning-rate",
    "weight_decay": "train.weight-decay",
    "adam_beta1": "train.adam-beta1",
    "adam_beta2": "train.adam-beta2",
    "adam_epsilon": "train.adam-epsilon",
    "max_grad_norm": "train.max-grad-norm",
    "warmup_ratio": "train.warmup-ratio",
    "warmup_steps": "train.warmup-steps",
    "lr_scheduler_type": "train.lr-scheduler-type",
    "logging_steps": "train.logging-steps",
    "save_total_limit": "train.save-total-limit",
    "seed": "train.seed",
}
# What the script did when a flag was not given. (learning_rate, batch size, epochs, ...: TrainingArguments.)
DEFAULTS = {
    "model_name_or_path": ["Qwen/Qwen-7B"],
    "model_max_length": ["8192"],
    "lora_r": ["64"],
    "lora_alpha": ["16"],
    "lora_dropout": ["0.05"],
    "lora_target_modules": ["c_attn", "c_proj", "w1", "w2"],
    "num_train_epochs": ["3"],
    "per_device_train_batch_size": ["8"],
    "gradient_accumulation_steps": ["1"],
    "learning_rate": ["5e-5"],
    "lr_scheduler_type": ["linear"],
    "warmup_ratio": ["0"],
    "logging_steps": ["500"],
    "save_total_limit": ["0"],
}
SWITCHES = {"use_lora", "q_lora", "bf16", "fp16", "tf32", "gradient_checkpointing", "lazy_preprocess"}
# Read below, one by one.
READ = {
    "eval_data_path",
    "evaluation_strategy",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "report_to",
}
# flag -> why it means nothing here
IDLE = {
    "cache_dir": "the hub's own cache is used (HF_HOME)",
    "dataloader_num_workers": "rows are tokenized once, before the first step",
    "dataloader_pin_memory": "rows are tokenized once, before the first step",
    "ddp_find_unused_parameters": "one process trains",
    "ddp_timeout": "one process trains",
    "deepspeed": "one process trains; the base is frozen and only the adapter has optimizer states",
    "do_eval": "the dev loss is measured when there are dev rows",
    "do_train": "it always trains",
    "fp16": "base weights are bfloat16 or float32, adapter weights float32",
    "group_by_length": "no pad token is computed, so there is nothing to save by it",
    "gradient_checkpointing_kwargs": "--gradient_checkpointing is enough",
    "lazy_preprocess": "rows are tokenized once, before the first step",
    "load_best_model_at_end": "the run folder holds the best adapter on dev where there are dev rows",
    "local_rank": "one process trains",
    "log_level": "messages are the same at every level",
    "logging_dir": "TensorBoard files lie in the run folder",
    "logging_strategy": "metrics.jsonl gets every step",
    "lora_bias": "adapters have no bias, so that every engine loads them",
    "lora_weight_path": "the script itself never read it",
    "optim": "AdamW, fused",
    "overwrite_output_dir": "a run is resumed or refused, never overwritten",
    "q_lora": "the base is not quantised; it stays in bfloat16 or float32",
    "remove_unused_columns": "rows are read by their own format",
    "resume_from_checkpoint": "the same command resumes by itself",
    "run_name": "the output folder names the run",
    "save_on_each_node": "one process trains",
    "save_safetensors": "safetensors is the only format written",
    "tf32": "PyTorch's own setting is kept",
}
KNOWN = sorted({*SAME, *SWITCHES, *READ, *IDLE})
TRUE, FALSE = {"true", "t", "yes", "y", "1"}, {"false", "f", "no", "n", "0"}  # as HfArgumentParser's string_to_bool


def cmqa_words(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The seed's words -> (words of `cmqa train`, one line for each flag without meaning).

    --bf16 True --use_lora --save_steps 1000   ->   --model.dtype bfloat16 --train.save-steps 1000
    Raises ConfigError: unknown flag, a switch that is neither True nor False, no --use_lora.
    """
    given = _given(argv)
    if not _is_on(given, "use_lora"):
        raise ConfigError(
            "without --use_lora the seed's script trained all weights of the base; this tool trains adapters",
            hint="Add --use_lora.",
        )
    notes = [say("train.accepted", flag=f, why=IDLE[f]) for f in given if f in IDLE and _is_on(given, f)]
    words: list[str] = []
    for flag, values in {**DEFAULTS, **given}.items():
        if flag in SAME:
            words += [f"--{SAME[flag]}", *values]
    # The script's compute_dtype; its fp16 becomes what the device computes in.
    dtype = "bfloat16" if _is_on(given, "bf16") else "auto" if _is_on(given, "fp16") else "float32"
    words += ["--model.dtype", dtype, *(["--train.gradient-checkpointing"] * _is_on(given, "gradient_checkpointing"))]
    return words + _evaluation(given) + _saving(given, notes) + _trackers(given, notes), notes


def _given(argv: Sequence[str]) -> dict[str, list[str]]:
    """{"bf16": ["True"], "use_lora": [], ...}; --flag=value counts too, and of a flag given twice the last."""
    given: dict[str, list[str]] = {}
    current: list[str] | None = None
    for word in argv:
        if not word.startswith("--"):
            if current is None:
                raise ConfigError(f"unexpected {word!r}", hint="Settings are written as --name value.")
            current.append(word)
            continue
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if name not in KNOWN:
            near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.4)
            raise ConfigError(f"unknown flag --{name}", hint=f"Did you mean --{near[0]}?" if near else None)
        current = given[name] = [value] if equals else []
    for name, values in given.items():
        if name not in SWITCHES and not values:
            raise ConfigError(f"--{name} needs a value")
        if name != "lora_target_modules" and len(values) > 1:
            raise ConfigError(f"--{name} takes one value, not {' '.join(values)}")
    return given


def _is_on(given: dict[str, list[str]], flag: str) -> bool:
    """A bare switch is on. A flag that is no switch counts as on when it is given."""
    if flag not in given:
        return False
    value = given[flag][0].lower() if given[flag] else "true"
    if flag not in SWITCHES:
        return value not in FALSE
    if value not in TRUE | FALSE:
        raise ConfigError(f"--{flag} takes True or False, not {given[flag][0]!r}")
    return value in TRUE


def _strategy(given: dict[str, list[str]], names: Sequence[str], default: str) -> str:
    value = next((given[n][0].lower() for n in names if n in given), default)
    if value not in ("no", "steps", "epoch"):
        raise ConfigError(f"--{names[0]} is no, steps or epoch, not {value!r}")
    return value


def _evaluation(given: dict[str, list[str]]) -> list[str]:
    """Dev rows are read only when they are to be evaluated; "steps" without a number means logging_steps, as in HF."""
    strategy = _strategy(given, ("evaluation_strategy", "eval_strategy"), "no")
    if "eval_data_path" not in given or strategy == "no":
        return []
    every = (
        given.get("eval_steps", given.get("logging_steps", DEFAULTS["logging_steps"])) if strategy == "steps" else ["0"]
    )
    return ["--data.dev-path", *given["eval_data_path"], "--train.eval-steps", *every]


def _saving(given: dict[str, list[str]], notes: list[str]) -> list[str]:
    strategy = _strategy(given, ("save_strategy",), "steps")
    if strategy == "no":
        notes.append(
            say("train.accepted", flag="save_strategy no", why="each epoch ends with a checkpoint to resume from")
        )
    return ["--train.save-steps", *(given.get("save_steps", ["500"]) if strategy == "steps" else ["0"])]


def _trackers(given: dict[str, list[str]], notes: list[str]) -> list[str]:
    wanted = given.get("report_to", ["none"])[0].lower()
    if wanted not in ("none", "tensorboard"):
        notes.append(
            say("train.accepted", flag=f"report_to {wanted}", why="metrics.jsonl and tensorboard are what there is")
        )
        wanted = "none"
    return ["--train.report-to", wanted]


if __name__ == "__main__":
    try:
        words, notes = cmqa_words(sys.argv[1:])
    except CmqaError as e:
        print(f"{type(e).__name__}: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    for note in notes:
        print(note, file=sys.stderr)
    sys.exit(main(["train", *words]))
