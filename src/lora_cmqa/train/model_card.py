"""README.md of a run folder: what the adapter is, what it was made of, what it is not."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..config import Config
from ..data.card import read_card


def model_card(config: Config, base: str, *, first: Sequence[str] = (), measured: Sequence[str] = ()) -> str:
    """Front matter that hubs read, then a few plain sections. `measured` are lines known at the run's end, `first`
    the commands without which plain PEFT cannot load the adapter (plain_peft.py)."""
    t, lora = config.train, config.lora
    local = Path(base).is_absolute()  # a path of this machine says nothing to others: the fingerprint names the base
    name = config.model.name_or_path if not local else Path(config.model.name_or_path).name
    d = config.data
    card = read_card(d.path or "", *([d.replay] if d.replay else []))
    targets = " ".join(lora.target_modules)
    depth = config.model.num_hidden_layers
    cut = f", cut to its first {depth} layers" if depth else ""
    kept = "" if config.model.quantization == "none" else f", its layers quantised to {config.model.quantization}"
    whole = f"; trained whole: {' '.join(lora.modules_to_save)}" if lora.modules_to_save else ""
    rows = f"; trained by rows: {' '.join(lora.trainable_tokens)}" if lora.trainable_tokens else ""
    lines = [
        "---",
        "library_name: peft",
        "pipeline_tag: text-generation",
        *([] if local else [f"base_model: {base}"]),
        "tags: [lora, medical, question-answering]",
        "---",
        "",
        f"# A LoRA adapter for {name}",
        "",
        "Trained with lora-cmqa. It writes text that looks like medical answers; it gives **no medical advice**, may",
        "be wrong, and must not decide about anybody's health.",
        "",
        "| | |",
        "|---|---|",
        f"| base | {name}{cut}{kept} (its hashes: `fingerprint.json`) |",
        f"| data | {card['source']}, licence {card['licence']} |",
        *(f"| sha256 of {file} | {digest} |" for file, digest in sorted(card["outputs"].items())),
        f"| LoRA | r {lora.r}, alpha {lora.lora_alpha:g}, dropout {lora.lora_dropout:g}, on {targets}{whole}{rows} |",
        f"| a step | {t.per_device_train_batch_size * t.gradient_accumulation_steps} rows |",
        f"| learning rate | {t.learning_rate:g}, {t.lr_scheduler_type} |",
        f"| epochs | {t.num_train_epochs:g} |" if t.max_steps <= 0 else f"| steps | {t.max_steps} |",
        f"| seed | {t.seed} |",
        *(f"| {line} |" for line in measured),
        "",
        "Every setting stands in `config.yaml`, versions and device in `environment.json`. Use it with",
        *_use(first),
        "",
    ]
    return "\n".join(lines)


def _use(first: Sequence[str]) -> list[str]:
    if not first:
        return ["`cmqa chat FOLDER`, or `peft.AutoPeftModelForCausalLM.from_pretrained(FOLDER)`."]
    return ["`cmqa chat FOLDER`. Plain transformers and PEFT need these commands first:", "", "```", *first, "```"]
