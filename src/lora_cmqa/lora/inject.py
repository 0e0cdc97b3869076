"""Put LoRA on a base, and take it off again. PEFT does the injection; this file says where and with which numbers.

all-linear              every linear layer of the decoder, never the head       (PEFT's word)
c_attn c_proj w1 w2     the names of Qwen v1; the same layers by the names used here
wte lm_head             modules_to_save of Qwen v1
single tokens           rows of embedding and head            (tokens.py)
"""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import AuxiliaryTrainingWrapper

from ..errors import AdapterError
from ..models.quantized import QuantizedLinear
from ..models.sizes import QWEN_V1_NAMES
from .peft_door import without_bitsandbytes_layers
from .tokens import token_indices

_TAKES_LORA = (torch.nn.Linear, torch.nn.Embedding)


def inject_lora(
    model: Any,
    *,
    r: int = 64,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: Sequence[str] = ("all-linear",),
    modules_to_save: Sequence[str] = (),
    trainable_token_ids: Sequence[int] = (),
    use_rslora: bool = False,
    seed: int = 42,
) -> PeftModel:
    """Freeze `model` and put fresh LoRA layers on it, in place: A random (Kaiming uniform), B zero. The rows of
    `trainable_token_ids` in embedding and head are trained too, beginning as they are.

    What is trained is float32 over a 16-bit or float32 base and float64 over a float64 one. The draw depends on `seed`
    alone and leaves torch's own random state as it was.
    Raises AdapterError for a module name the model does not have and for numbers no LoRA can have.
    """
    if r < 1 or not 0 <= lora_dropout < 1:
        raise AdapterError(f"r must be at least 1 and lora_dropout in [0, 1); got r {r}, lora_dropout {lora_dropout}")
    if not target_modules:
        raise AdapterError("target_modules is empty", hint="--target-modules all-linear")
    targets = _named(model, target_modules, "target_modules")
    saved = _named(model, modules_to_save, "modules_to_save") if modules_to_save else None
    refuse_packed_copies(model, saved or ())
    rows = token_indices(model, trainable_token_ids) if trainable_token_ids else None
    if whole := set(saved or ()) & set(rows or ()):
        raise AdapterError(
            f"{min(whole)} is to be trained whole (modules_to_save) and by single rows (trainable_tokens)",
            hint="Name one or the other.",
        )
    exact = next(model.parameters()).dtype == torch.float64
    config = LoraConfig(
        r=r,
        lora_alpha=lora_alpha,  # type: ignore[arg-type]  # PEFT's hint says int; a float scales as well
        lora_dropout=lora_dropout,
        target_modules=targets,
        modules_to_save=saved,
        trainable_token_indices=rows,
        use_rslora=use_rslora,
        task_type="CAUSAL_LM",
        bias="none",
    )
    with peft_at_work(model.device):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config, autocast_adapter_dtype=True)
    if exact:
        for weight in lora_parameters(wrapped).values():
            weight.data = weight.data.double()
    return wrapped


def refuse_packed_copies(model: Any, modules_to_save: Sequence[str]) -> None:
    """Raises AdapterError where a layer that is to be trained whole lies in 4 or 8 bits, which take no gradient."""
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and path.rsplit(".", 1)[-1] in modules_to_save:
            raise AdapterError(
                f"modules_to_save names {path}, which is quantised ({module.kind}) and so cannot be trained whole",
                hint="--quantization none, or LoRA on it (target_modules).",
            )


@contextlib.contextmanager
def peft_at_work(device: torch.device) -> Iterator[None]:
    """While PEFT puts its layers on: random numbers are given back, nothing is said, bitsandbytes is not asked."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), _quiet(), without_bitsandbytes_layers():
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """PEFT asks transformers by a name that it will drop in version 6, which tells the user nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\..*")
        yield


def remove_lora(model: PeftModel) -> Any:
    """The inverse: the bare base, bit for bit what it was."""
    base = model.get_base_model()
    for path, module in list(base.named_modules()):
        if isinstance(module, AuxiliaryTrainingWrapper):  # PEFT's unload would leave the trained copy in its place
            parent, _, leaf = path.rpartition(".")
            setattr(base.get_submodule(parent), leaf, module.original_module)
    return model.unload().requires_grad_(False)


def lora_parameters(model: Any) -> dict[str, torch.Tensor]:
    """What is trained, by name in a fixed order: the model's own."""
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def _named(model: Any, names: Sequence[str], setting: str) -> list[str]:
    """Names of today's modules for `names`, each checked against the model."""
    if "all-linear" in names:
        if setting != "target_modules" or len(names) > 1:
            raise AdapterError(
                f"{setting}: all-linear stands alone, got {' '.join(names)}", hint="Name one or the other."
            )
        # Short names, not PEFT's own word: for few layers it would write every full path into adapter_config.json.
        head = model.get_output_embeddings()
        linear = {path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m is not head}
        return sorted({path.rsplit(".", 1)[-1] for path in linear})
    wanted: list[str] = []
    every = {path.rsplit(".", 1)[-1]: module for path, module in model.named_modules() if path}
    own = {n for n, m in every.items() if setting != "target_modules" or isinstance(m, _TAKES_LORA)}
    for name in names:
        for today in (name,) if name in own else QWEN_V1_NAMES.get(name, (name,)):
            if today not in own:
                near = difflib.get_close_matches(name, own | set(QWEN_V1_NAMES), n=2, cutoff=0.4)
                no = "takes no LoRA in" if today in every else "is no module of"
                raise AdapterError(
                    f"{setting}: {name!r} {no} {type(model).__name__}",
                    hint=f"Did you mean {' or '.join(near)}? " * bool(near)
                    + f"It has {', '.join(sorted(n for n in own if not n.isdigit()))}.",
                )
            if today not in wanted:
                wanted.append(today)
    return sorted(wanted)
