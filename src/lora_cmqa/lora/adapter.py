"""An adapter on disk, in PEFT's own layout, and back.

    adapter_config.json          what PEFT's LoraConfig writes, deterministic, rsLoRA folded into lora_alpha
    adapter_model.safetensors    base_model.model.<path>.lora_A.weight [r, in], ...lora_B.weight [out, r], float32

Written in the *portable profile*, which loads unchanged in PEFT, vLLM and, converted, in llama.cpp: plain LoRA, one
rank, all layers, no bias. Loading refuses what others take in silence: another base's tensors, a missing layer,
a dead adapter, pickles and code in the folder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import (
    LoraConfig,
    PeftModel,
    PeftModelForCausalLM,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import AdapterError
from ..models.depth import layers_in
from .decoder import causal_lm
from .inject import peft_at_work, refuse_packed_copies, remove_lora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"

# Keys that may only hold these values (or nothing): any other makes it another computation than plain LoRA.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "bias": "none",
}
# What loading uses, or what changes nothing in it. Every other key must be empty or false: an allow-list, so that a
# variant PEFT learns tomorrow is refused and not silently left out.
_ALLOWED = {
    *("r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "rank_pattern"),
    *("alpha_pattern", "layers_to_transform", "layers_pattern", "base_model_name_or_path", "inference_mode"),
    *("trainable_token_indices", "revision", "peft_version", "megatron_core", "qalora_group_size"),
}
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")  # the others change the base's weights as well
_CODE, _PICKLES = ("*.py",), ("*.bin", "*.pt", "*.pth", "*.pkl", "*.pickle", "*.ckpt")


# ---- out -------------------------------------------------------------------------------------------------------------


def adapter_files(model: PeftModel, *, base_model_name_or_path: str) -> dict[str, bytes]:
    """The two files of an adapter as bytes; the same weights give the same bytes."""
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    tensors = get_peft_model_state_dict(model, save_embedding_layers=False)
    return encode_adapter(config, tensors, base_model_name_or_path=base_model_name_or_path)


def encode_adapter(
    config: LoraConfig, tensors: Mapping[str, torch.Tensor], *, base_model_name_or_path: str
) -> dict[str, bytes]:
    """{file name: content} of an adapter of these tensors, named as PEFT names them on disk."""
    written = config.to_dict()
    if config.use_rslora:  # folded: engines that do not know rsLoRA scale by lora_alpha / r
        alpha = config.lora_alpha * math.sqrt(config.r)
        written |= {"use_rslora": False, "lora_alpha": int(alpha) if alpha.is_integer() else alpha}
    targets = written["target_modules"]
    written |= {
        "base_model_name_or_path": str(base_model_name_or_path),
        "inference_mode": True,
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
    }
    plain = {k: v.detach().to("cpu").contiguous().clone() for k, v in sorted(tensors.items())}
    text = json.dumps(written, indent=2, sort_keys=True, default=_as_json) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: save(plain, metadata={"format": "pt"})}


def save_adapter(model: PeftModel, folder: str | Path, *, base_model_name_or_path: str) -> Path:
    """Write the adapter of `model` into `folder` (made when absent); its inverse is `load_adapter`."""
    place = Path(folder)
    place.mkdir(parents=True, exist_ok=True)
    for name, content in adapter_files(model, base_model_name_or_path=base_model_name_or_path).items():
        (place / name).write_bytes(content)
    return place


# ---- in --------------------------------------------------------------------------------------------------------------


def read_adapter_config(folder: str | Path) -> dict[str, Any]:
    """adapter_config.json, its keys checked against what this project knows: nothing in it is imported or fetched.

    Raises AdapterError for an unknown key, another kind of adapter, or a value no plain LoRA has.
    """
    file = Path(folder) / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise AdapterError(f"no {CONFIG}", file=folder, hint="Name the folder that `cmqa train` wrote.") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as e:
        raise AdapterError(f"not readable as JSON: {e}", file=file) from None
    if not isinstance(config, dict):
        raise AdapterError(f"an object is expected, found {type(config).__name__}", file=file)
    for key, value in config.items():
        empty = value in (None, False, {}, [])
        if key in _PLAIN and not empty and value != _PLAIN[key]:
            raise AdapterError(f"{value!r} is not plain LoRA, the only kind loaded here", file=file, field=key)
        if key == "init_lora_weights":
            if not any(value is start or value == start for start in _PLAIN_STARTS):
                raise AdapterError(
                    f"{value!r} changes the base's weights too, so this adapter does not fit the base as it is",
                    file=file,
                    field=key,
                    hint="Convert it with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...).",
                )
        elif key not in _PLAIN and key not in _ALLOWED and not empty:
            raise AdapterError(f"{_short(value)}: no plain LoRA adapter has this key", file=file, field=key)
    r, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(r, int) or isinstance(r, bool) or not 1 <= r <= 4096:
        raise AdapterError(f"{r!r} is not a rank (1 .. 4096)", file=file, field="r")
    if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or not math.isfinite(alpha) or alpha <= 0:
        raise AdapterError(f"{alpha!r} is not a positive number", file=file, field="lora_alpha")
    targets = config.get("target_modules")
    if not targets or not (isinstance(targets, str) or all(isinstance(t, str) for t in targets)):
        raise AdapterError(f"{targets!r} names no module", file=file, field="target_modules")
    return config


def load_adapter(model: Any, folder: str | Path, *, allow_inert: bool = False, is_trainable: bool = False) -> PeftModel:
    """Put the adapter of `folder` on the base `model`, in place.

    Every tensor of the file lands and every LoRA layer gets its tensors, of the right shape and finite.
    Raises AdapterError otherwise, for pickles or code in the folder, and for an adapter whose B is zero everywhere
    (it would answer as the base) unless `allow_inert`.
    """
    place = Path(folder)
    config = read_adapter_config(place)
    refuse_code(place)
    tensors = read_tensors(place / WEIGHTS)
    modules = {name.rsplit(".", 1)[-1] for name, _ in causal_lm(model).named_modules()}
    targets = config["target_modules"]
    absent = [t for t in targets if t.rsplit(".", 1)[-1] not in modules] if not isinstance(targets, str) else []
    if absent:
        raise AdapterError(
            f"{type(model).__name__} has no module {absent[0]!r}: this adapter belongs to another kind of model",
            file=place / CONFIG,
            hint="An adapter of Qwen v1's time: `cmqa adapter import OLD --model BASE --out NEW`.",
        )
    refuse_packed_copies(model, config.get("modules_to_save") or ())
    lora = LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config.get("lora_dropout", 0.0) if is_trainable else 0.0,
        target_modules=targets,
        modules_to_save=config.get("modules_to_save"),
        trainable_token_indices=_token_indices(model, config, place / CONFIG),
        use_rslora=config.get("use_rslora", False),
        rank_pattern=config.get("rank_pattern") or {},
        alpha_pattern=config.get("alpha_pattern") or {},
        layers_to_transform=config.get("layers_to_transform"),
        layers_pattern=config.get("layers_pattern"),
        base_model_name_or_path=config.get("base_model_name_or_path"),
        inference_mode=not is_trainable,
        task_type="CAUSAL_LM",
    )
    with peft_at_work(model.device):
        wrapped = PeftModelForCausalLM(model, lora)  # the layers' random start is overwritten below
    try:
        _check_tensors(place / WEIGHTS, tensors, get_peft_model_state_dict(wrapped, save_embedding_layers=False))
        if not allow_inert and not any(t.any() for k, t in tensors.items() if "lora_A" not in k):
            raise AdapterError("every lora_B is zero: this adapter would answer as its base", file=place / WEIGHTS)
    except AdapterError:
        remove_lora(wrapped)  # the base is given back as it came
        raise
    set_peft_model_state_dict(wrapped, tensors)
    return wrapped.train(is_trainable)


def _token_indices(model: Any, config: dict[str, Any], file: Path) -> dict[str, list[int]] | None:
    """The rows of embedding and head that the adapter replaces; PEFT also takes a bare list for the embedding's."""
    given = config.get("trainable_token_indices")
    if not given:
        return None
    base = causal_lm(model)
    matrices = {n.rsplit(".", 1)[-1]: m for n, m in base.named_modules() if m in _ends(base)}
    first = next(n for n, m in matrices.items() if m is base.get_input_embeddings())
    rows = given if isinstance(given, dict) else {first: given}
    for name, ids in rows.items():
        if name not in matrices or not isinstance(ids, list) or not ids:
            raise AdapterError(f"{name!r} is neither embedding nor head", file=file, field="trainable_token_indices")
        size = len(matrices[name].weight)
        if not all(type(i) is int and 0 <= i < size for i in ids) or len(set(ids)) < len(ids):
            raise AdapterError(
                f"{name} has rows 0 to {size - 1}, each named once at most; found {_short(ids)}",
                file=file,
                field="trainable_token_indices",
            )
    return rows


def _ends(base: Any) -> tuple[Any, Any]:
    return base.get_input_embeddings(), base.get_output_embeddings()


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """All tensors of a safetensors file. Raises AdapterError when it is absent, torn, or not finite."""
    if not file.is_file():
        raise AdapterError("the adapter's weights are missing", file=file)
    try:
        with safe_open(str(file), framework="pt") as f:
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118  # safe_open is no mapping
    except (SafetensorError, OSError, ValueError) as e:
        raise AdapterError(f"not a whole safetensors file: {e}", file=file) from None
    bad = [k for k, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise AdapterError(
            f"{len(bad)} of {len(tensors)} tensors hold NaN or infinity, the first is {bad[0]}", file=file
        )
    return tensors


def _check_tensors(file: Path, found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    missing, foreign = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or foreign:
        check_depth(found, len(layers_in(wanted)), file=file)
        parts = []
        if missing:
            parts.append(
                f"{len(missing)} of {len(wanted)} tensors that the base's layers need are missing ({missing[0]})"
            )
        if foreign:
            parts.append(f"{len(foreign)} belong to no layer of this base ({foreign[0]})")
        raise AdapterError(
            "; ".join(parts), file=file, hint="The adapter was trained on another base or another depth."
        )
    for key, tensor in found.items():
        if tensor.shape != wanted[key].shape:
            raise AdapterError(
                f"{key} is {list(tensor.shape)}, the base needs {list(wanted[key].shape)}",
                file=file,
                hint="The adapter was trained on a base of another size.",
            )


def check_depth(tensors: Iterable[str], layers: int, *, file: Path) -> None:
    """Raises AdapterError when the adapter's tensors are those of a base with another number of layers, first to last.

    PEFT alone puts a 16-layer adapter on the first half of 32 layers with a warning.
    """
    held = layers_in(tensors)
    if not held or held == set(range(layers)) or held != set(range(len(held))):
        return
    deep = f"the adapter has {len(held)} layers, the base {layers}"
    if len(held) > layers:
        raise AdapterError(deep, file=file, hint="Name the base that it was trained on.")
    raise AdapterError(
        deep,
        file=file,
        hint=f"If it was trained on a base cut to its first {len(held)} layers, add --num-hidden-layers {len(held)}; "
        f"`cmqa adapter rebase ADAPTER --model BASE --num-hidden-layers {len(held)} --out NEW` writes that into its "
        "fingerprint.json, and then every verb knows.",
    )


def refuse_code(folder: Path) -> None:
    """Weights and settings are all an adapter needs; what can run when it is opened is not let in beside them."""
    for patterns, what in ((_CODE, "code"), (_PICKLES, "a pickle, which can run code when it is opened")):
        found = sorted(p.name for pattern in patterns for p in folder.glob(pattern))
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise AdapterError(
                f"{found[0]}{more} is {what}; an adapter folder holds none",
                file=folder,
                hint=f"Copy {CONFIG} and {WEIGHTS} into a folder of their own. "
                "An adapter of Qwen v1's time: `cmqa adapter import OLD --model BASE --out NEW`.",
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _as_json(value: Any) -> Any:
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", str(value))
