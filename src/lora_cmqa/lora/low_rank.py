"""An adapter as nothing but its matrices, beside a base that stays as it is.

    folder (PEFT's layout) or PeftModel -> {"model.layers.0.self_attn.q_proj": Pair(a [r, in], b [out, r])}

    y = W x + b (a x)        the scale lora_alpha / r is folded into b

Many such adapters answer on one base at once (engine/adapters.py), which PEFT's layers on the model cannot do.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import check_target_module_exists

from ..errors import AdapterError
from .adapter import CONFIG, WEIGHTS, read_adapter_config, read_tensors, refuse_code
from .decoder import causal_lm

_NAME = re.compile(r"base_model\.model\.(?P<path>.+)\.lora_(?P<side>[AB])\.weight")


class Pair(NamedTuple):
    a: torch.Tensor  # [r, in]
    b: torch.Tensor  # [out, r], times the scale


LowRank = dict[str, Pair]  # by the path of the base's module


def adapter_digest(folder: str | Path) -> str:
    """sha256 over the two files that decide what an adapter computes: its identity, wherever it lies."""
    place, digest = Path(folder), hashlib.sha256()
    for name in (CONFIG, WEIGHTS):
        try:
            content = (place / name).read_bytes()
        except OSError as e:
            raise AdapterError(f"not readable: {e.strerror or e}", file=place / name) from None
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def low_rank_from_folder(folder: str | Path, base: Any) -> LowRank:
    """The matrices of an adapter folder for the bare `base`, float32, on the CPU.

    Every tensor of the file lands on a linear layer of its shape and every layer that the config names gets its two;
    else AdapterError, as for code or pickles in the folder, tensors that are not finite, a trained copy of a whole
    layer (modules_to_save) or rows of one, and LoRA on the embeddings or the head, which other rows of a batch would
    share.
    """
    place = Path(folder)
    config = read_adapter_config(place)
    refuse_code(place)
    for key in ("modules_to_save", "trainable_token_indices"):
        if config.get(key):
            raise AdapterError(
                f"{config[key]} were trained; beside other adapters on one base only LoRA can answer",
                file=place / CONFIG,
                field=key,
                hint="cmqa chat serves it alone; cmqa merge makes it a model of its own.",
            )
    tensors = read_tensors(place / WEIGHTS)
    sides: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        found = _NAME.fullmatch(name)
        if found is None:
            raise AdapterError(f"{name} is not the A or B of a linear layer", file=place / WEIGHTS)
        sides.setdefault(found["path"], {})[found["side"]] = tensor
    linear, wanted = dict(_linears(base)), set(_targets(config, base))
    _compare(place / WEIGHTS, set(sides), wanted)
    pairs = {}
    for path in sorted(sides):
        pairs[path] = _pair(place / WEIGHTS, path, sides[path], linear[path], config)
    if not any(pair.b.any() for pair in pairs.values()):
        raise AdapterError("every lora_B is zero: this adapter would answer as its base", file=place / WEIGHTS)
    return pairs


def low_rank_from_peft(model: PeftModel, adapter: str) -> LowRank:
    """The matrices of an adapter that is on a model, in their own dtype; a copy that later training does not change."""
    pairs = {}
    for path, module in model.get_base_model().named_modules():
        if isinstance(module, LoraLinear) and adapter in module.lora_A:
            a, b = module.lora_A[adapter].weight.detach(), module.lora_B[adapter].weight.detach()
            pairs[path] = Pair(a.clone(), b * module.scaling[adapter])
    return pairs


def _linears(base: Any) -> Iterator[tuple[str, torch.nn.Linear]]:
    causal = causal_lm(base)
    head = causal.get_output_embeddings()
    for path, module in causal.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not head:
            yield path, module


def _targets(config: dict[str, Any], base: Any) -> Iterator[str]:
    """Paths of the linear layers that the config puts LoRA on, by PEFT's own rule."""
    every = config["target_modules"] == "all-linear"
    lora = LoraConfig(
        target_modules=None if every else config["target_modules"],
        layers_to_transform=config.get("layers_to_transform"),
        layers_pattern=config.get("layers_pattern"),
    )
    for path, _ in _linears(base):
        if every or check_target_module_exists(lora, path):
            yield path


def _compare(file: Path, found: set[str], wanted: set[str]) -> None:
    missing, foreign = sorted(wanted - found), sorted(found - wanted)
    if foreign:
        raise AdapterError(
            f"{len(foreign)} of {len(found)} layers in it are none of this base's that its config names ({foreign[0]})",
            file=file,
            hint="The adapter was trained on another base, or on layers that cannot be served beside others.",
        )
    if missing or not found:
        raise AdapterError(
            f"{len(missing)} of {len(wanted)} layers that its config names have no tensors ({next(iter(missing), '')})",
            file=file,
            hint="The adapter was trained on another base or another depth.",
        )


def _pair(
    file: Path, path: str, sides: dict[str, torch.Tensor], module: torch.nn.Linear, config: dict[str, Any]
) -> Pair:
    if len(sides) < 2:
        raise AdapterError(f"{path} has a lora_{next(iter(sides))} without its other half", file=file)
    a, b = sides["A"], sides["B"]
    rank = _by_pattern(config.get("rank_pattern") or {}, path, config["r"])
    for name, tensor, shape in (
        ("A", a, (rank, module.in_features)),
        ("B", b, (module.out_features, rank)),
    ):
        if tuple(tensor.shape) != shape:
            raise AdapterError(
                f"lora_{name} of {path} is {list(tensor.shape)}, base and config say {list(shape)}",
                file=file,
                hint="The adapter was trained on a base of another size, or its config was edited.",
            )
        if not tensor.is_floating_point():
            raise AdapterError(f"lora_{name} of {path} holds {tensor.dtype}", file=file)
    alpha = _by_pattern(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Pair(a.float(), b.float() * scale)


def _by_pattern(patterns: dict[str, Any], path: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of the module's path counts."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", path):
            return value
    return default


def describe(folder: str | Path) -> dict[str, Any]:
    """What a listing says of an adapter: rank, alpha and target modules, from its config alone."""
    config = read_adapter_config(folder)
    targets = config["target_modules"]
    return {
        "r": config["r"],
        "lora_alpha": config["lora_alpha"],
        "target_modules": targets if isinstance(targets, str) else sorted(targets),
    }
