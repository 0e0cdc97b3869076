"""LLaMA-Factory's own sft stage, in its own environment: Alpaca rows, its template `gemma`, loss on answers (default).

It imports torchaudio, which others.py removes because the build that pip takes cannot be loaded beside a CPU torch; no
sound is read here, so an empty module stands in for it.
"""

from __future__ import annotations

import sys
import types
from importlib.machinery import ModuleSpec

try:
    import torchaudio  # noqa: F401
except ImportError:
    silent = types.ModuleType("torchaudio")
    silent.__spec__ = ModuleSpec("torchaudio", None)
    sys.modules["torchaudio"] = silent

from transformers import AutoTokenizer
from watch import Watch, job

asked = job()
watch = Watch(AutoTokenizer.from_pretrained(asked["model"]).pad_token_id)
packing = asked["how"] == "packing"
micro = 1 if packing else int(asked["batch"])

from llamafactory.train.tuner import run_exp  # noqa: E402  (after the watch: it subclasses Trainer on import)

run_exp(
    {
        "model_name_or_path": asked["model"],
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "lora",
        "lora_rank": asked["r"],
        "lora_alpha": int(asked["lora_alpha"]),
        "lora_target": "all",
        "dataset_dir": asked["data"],
        "dataset": "rows",
        "template": "gemma",
        "cutoff_len": asked["max_length"],
        "output_dir": asked["out"],
        "overwrite_cache": True,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": asked["packs" if packing else "rows_per_step"] // micro,
        "learning_rate": asked["learning_rate"],
        "lr_scheduler_type": "cosine",
        "num_train_epochs": 1.0,
        "save_strategy": "no",
        "report_to": "none",
        "logging_strategy": "no",
        "disable_tqdm": True,
        "bf16": asked["bf16"],
        "use_cpu": asked["cpu"],
        "disable_gradient_checkpointing": True,
        "neat_packing": packing,
    }
)
watch.report()
