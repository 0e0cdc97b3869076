"""Put LoRA on a base, and take it off again. PEFT does the injection; this file says where and with which numbers.

all-linear              every linear layer of the decoder, never the head       (PEFT's word)
c_attn c_proj w1 w2     the names of Qwen v1; the same layers by the names used here
wte lm_head             modules_to_save of Qwen v1
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ..errors import AdapterError

QWEN_V1_NAMES: dict[str, tuple[str, ...]] = {
    "c_attn": ("q_proj", "k_proj", "v_proj"),
    "c_proj": ("o_proj", "down_proj"),  # the same name stood in attention and in the MLP
    "w1": ("up_proj",),
    "w2": ("gate_proj",),
    "wte": ("embed_tokens",),
    "lm_head": ("lm_head",),
}


def inject_lora(
    model: Any,
    *,
    r: int = 64,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] = ("all-linear",),
    modules_to_save: Sequence[str] = (),
    use_rslora: bool = False,
    seed: int = 42,
) -> PeftModel:
    """Freeze `model` and put fresh LoRA layers on it, in place: A random (Kaiming uniform), B zero.

    LoRA weights are float32 over a 16-bit or float32 base and float64 over a float64 one. The draw depends on `seed`
    alone and leaves torch's own random state as it was.
    Raises AdapterError for a module name the model does not have.
    """
    targets = _named(model, target_modules, "target_modules")
    saved = _named(model, modules_to_save, "modules_to_save") if modules_to_save else None
    exact = next(model.parameters()).dtype == torch.float64
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # PEFT's hint says int; a float scales as well
        lora_dropout=lora_dropout,
        target_modules="all-linear" if targets == ["all-linear"] else targets,
        modules_to_save=saved,
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
        bias="none",
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    if exact:
        for weight in lora_parameters(wrapped).values():
            weight.data = weight.data.double()
    return wrapped


def remove_lora(model: PeftModel) -> Any:
    """The inverse: the bare base, bit for bit what it was."""
    return model.unload()


def lora_parameters(model: Any) -> dict[str, torch.Tensor]:
    """What is trained, by name in a fixed order: the model's own."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _named(model: Any, names: Sequence[str], setting: str) -> list[str]:
    """Names of today's modules for `names`, each checked against the model."""
    wanted: list[str] = []
    own = {name.rsplit(".", 1)[-1] for name, _ in model.named_modules()}
    for name in names:
        for today in (name,) if name in own else QWEN_V1_NAMES.get(name, (name,)):
            if today != "all-linear" and today not in own:
                near = difflib.get_close_matches(today, own | set(QWEN_V1_NAMES), n=1, cutoff=0.4)
                raise AdapterError(
                    f"{setting}: {type(model).__name__} has no module {name!r}",
                    hint=f"Did you mean {near[0]}?" if near else f"It has {', '.join(sorted(n for n in own if n))}.",
                )
            if today not in wanted:
                wanted.append(today)
    return sorted(wanted)
