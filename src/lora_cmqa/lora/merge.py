"""An adapter into its base's weights, and out again.

    base shard                                     merged shard, same name
    model.layers.0.self_attn.q_proj.weight   +  scaling * B @ A   in float32, cast once
    model.layers.0.input_layernorm.weight                         as it is

Tensor by tensor from the base's files: never more than one shard in memory, in its written dtype. Then base + adapter
and merged answer the same golden prompts, and certificate.json says how far apart they are. An adapter that was trained
on a quantised base goes into the base in its 16 bits ("trained_on" says so); weights quantised on disk are refused.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..core import Message
from ..data.files import sha256_of
from ..data.template import ChatTemplate
from ..errors import AdapterError
from ..models import qwen1
from ..models.cache import appears_complete
from ..models.depth import check_layers, layer_of
from ..models.fingerprint import CONVERTED
from ..models.load import DTYPES, check_weight_files, layers_of, load_model, read_json, resolve
from .adapter import WEIGHTS, check_depth, load_adapter, read_adapter_config, read_tensors, refuse_code
from .fingerprint import FILE as FINGERPRINT
from .fingerprint import check_fingerprint, fingerprint, fingerprinted, kept_layers, trained_quantization

CERTIFICATE = "certificate.json"
GOLDEN_PROMPTS = (
    "孩子发烧三十八度五，精神还好，需要马上去医院吗？",
    "高血压患者能不能吃柚子？",
    "What should I do about a mild headache?",
    "法国的首都是哪里？",
)
# Beside the weights, what a model folder needs. (No *.py: code of a checkpoint goes nowhere.)
_BESIDE = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*")
_FROM_RUN = ("tokenizer*", "special_tokens_map.json", "chat_template.jinja", "generation_config.json")
_INDEX = "model.safetensors.index.json"
_ROWS = ".token_adapter.trainable_tokens_delta"  # PEFT's name; the values themselves, not what is added
# A merge that says something else than base + adapter is not kept. Rounding moves float32 logits by about 1e-5 of
# their standard deviation (certificate.json has the number; it grows with depth), a wrong sum by about one; in 16
# bits, where base + adapter is rounded otherwise, next-token distributions are compared, in nats.
_FLOAT32_BOUND, _KL_BOUND = 1e-3, 0.05


@dataclass(frozen=True, slots=True)
class Rows:
    """Rows of an embedding or a head that the adapter replaces: values [rows, width]."""

    ids: tuple[int, ...]
    values: torch.Tensor


def merge(
    run: str | Path,
    out: str | Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    num_hidden_layers: int | None = None,
) -> dict[str, Any]:
    """Write base + adapter of `run` as a plain model folder `out`; returns the certificate.

    base   overrides the base that the adapter names
    dtype  of the written weights: float32, bfloat16, float16; None: each tensor keeps the base's
    num_hidden_layers  depth that the base is cut to; None: what the run's fingerprint says

    Raises AdapterError: no plain LoRA, another base than it was trained on, tensors that find no place, a quantised
    base, or merged answers that differ from base + adapter. RunError: `out` is there and not empty.
    """
    folder = Path(run)
    config = read_adapter_config(folder)
    refuse_code(folder)
    name = base or config.get("base_model_name_or_path")
    if not name:
        raise AdapterError("the adapter names no base model", file=folder, hint="Add --model M.")
    base_folder = resolve(name)
    _refuse_quantised(base_folder)
    stored = fingerprinted(folder)
    if stored is not None:
        check_fingerprint(stored, name)
    kept = check_layers(num_hidden_layers or kept_layers(folder), layers_of(base_folder))
    adapter = read_tensors(folder / WEIGHTS)
    if not config.get("layers_to_transform") and not isinstance(config["target_modules"], str):
        check_depth(adapter, kept, file=folder)
    with appears_complete(Path(out)) as made:
        native = _native(base_folder, made, kept)
        _write(native, made, adapter, config, dtype=dtype, sign=1, layers=kept)
        _copy_beside(native, folder, made)
        certificate = {
            "base": str(name),
            "base_fingerprint": fingerprint(base_folder),
            "base_fingerprint_checked": stored is not None,
            "adapter_sha256": sha256_of(folder / WEIGHTS),
            "trained_on": kind if (kind := trained_quantization(folder)) != "none" else "as the base",
            "dtype": dtype or "as the base",
            "num_hidden_layers": kept,
            **_compare(native, folder, made, kept),
            "files": {f.name: sha256_of(f) for f in sorted(made.glob("*.safetensors"))},
        }
        shutil.rmtree(made / ".native", ignore_errors=True)
        (made / CERTIFICATE).write_text(json.dumps(certificate, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return certificate | {"out": str(out)}


def unmerge(merged: str | Path, run: str | Path, out: str | Path) -> Path:
    """The inverse: take the adapter of `run` out of the weights of `merged`. The base comes back to within the
    rounding of the stored dtype (1e-6 in float32); what modules_to_save replaced is gone and is refused."""
    folder, source = Path(run), Path(merged)
    config = read_adapter_config(folder)
    for key in ("modules_to_save", "trainable_token_indices"):
        if config.get(key):
            raise AdapterError(f"{key} replaced weights of the base, which cannot be taken out", file=folder)
    with appears_complete(Path(out)) as made:
        adapter = read_tensors(folder / WEIGHTS)
        _write(source, made, adapter, config, dtype=None, sign=-1, layers=layers_of(source))
        _copy_beside(source, source, made)
    return Path(out)


# ---- weights ---------------------------------------------------------------------------------------------------------


def _write(
    base: Path,
    out: Path,
    adapter: dict[str, torch.Tensor],
    config: dict[str, Any],
    *,
    dtype: str | None,
    sign: int,
    layers: int,
) -> None:
    """The shards, their index and config.json, without what stands beyond the first `layers`. Every tensor of the
    adapter must find its place."""
    waiting = _changes(adapter, config)
    whole = {name for name, change in waiting.items() if isinstance(change, torch.Tensor)}
    settings = read_json(base / "config.json", base)
    if whole and settings.get("tie_word_embeddings", _ties_by_default(settings)):
        raise AdapterError(
            f"{min(whole)} was trained whole, and this base shares its embedding with its head",
            file=base,
            hint="Serve it unmerged: `cmqa chat RUN`.",
        )
    check_weight_files(base)
    target = DTYPES[dtype] if dtype else None
    where, size, written = {}, 0, target
    for file in sorted(base.glob("*.safetensors")):
        shard = {}
        with safe_open(str(file), framework="pt") as tensors:
            for name in (n for n in tensors.keys() if layer_of(n) < layers):  # noqa: SIM118  # safe_open is no mapping
                weight = tensors.get_tensor(name)
                cast = (target or weight.dtype) if weight.is_floating_point() else weight.dtype
                change = waiting.pop(name, None)
                shard[name] = _changed(name, weight, change, sign).to(cast).contiguous()
                where[name], size, written = file.name, size + shard[name].nbytes, written or cast
        if shard:
            save_file(shard, str(out / file.name), metadata={"format": "pt"})
    if waiting:
        raise AdapterError(
            f"{len(waiting)} of the adapter's modules have no weight in this base, the first is {min(waiting)}",
            file=base,
            hint="The adapter was trained on another base or another depth.",
        )
    if len(set(where.values())) > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (out / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    if written is not None:
        settings.pop("torch_dtype", None)
        settings["dtype"] = str(written).removeprefix("torch.")
    settings.pop("auto_map", None)
    if layers < layers_of(base):
        settings["num_hidden_layers"] = layers
        if settings.get("layer_types"):
            settings["layer_types"] = settings["layer_types"][:layers]
    (out / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def _changes(
    adapter: dict[str, torch.Tensor], config: dict[str, Any]
) -> dict[str, torch.Tensor | Rows | tuple[torch.Tensor, torch.Tensor, float]]:
    """By the base's name of a weight: (A, B, scaling), the whole new tensor of modules_to_save, or new rows."""
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        raise AdapterError("rank_pattern and alpha_pattern are not merged here", hint="Merge it with PEFT.")
    scaling = config["lora_alpha"] / (math.sqrt(config["r"]) if config.get("use_rslora") else config["r"])
    changes: dict[str, Any] = {}
    for key, tensor in adapter.items():
        path = key.removeprefix("base_model.model.")
        if path.endswith(_ROWS):
            module = path.removesuffix(_ROWS)
            indices = config.get("trainable_token_indices") or ()
            ids = indices.get(module.rsplit(".", 1)[-1], ()) if isinstance(indices, dict) else indices
            changes[f"{module}.weight"] = Rows(tuple(ids), tensor)
        elif path.endswith(".lora_A.weight"):
            module = path.removesuffix(".lora_A.weight")
            b = adapter.get(key.replace(".lora_A.", ".lora_B."))
            if b is None:
                raise AdapterError(f"{module} has lora_A and no lora_B")
            changes[f"{module}.weight"] = (tensor, b, scaling)
        elif not path.endswith(".lora_B.weight"):
            changes[path] = tensor
        elif key.replace(".lora_B.", ".lora_A.") not in adapter:
            raise AdapterError(f"{path} has no lora_A beside it")
    return changes


def _changed(name: str, weight: torch.Tensor, change: Any, sign: int) -> torch.Tensor:
    if change is None:
        return weight
    if isinstance(change, Rows):
        if len(change.ids) != len(change.values) or max(change.ids) >= len(weight):
            raise AdapterError(f"{name}: {len(change.ids)} rows are named, {len(change.values)} are there")
        exact = torch.promote_types(weight.dtype, torch.float32)
        return weight.to(exact).index_copy_(0, torch.tensor(change.ids), change.values.to(exact))
    shape = tuple(change.shape) if isinstance(change, torch.Tensor) else (len(change[1]), change[0].shape[1])
    if shape != tuple(weight.shape):
        raise AdapterError(
            f"{name} is {list(weight.shape)} in the base, the adapter's is {list(shape)}",
            hint="The adapter was trained on a base of another size.",
        )
    if isinstance(change, torch.Tensor):
        return change
    a, b, scaling = change
    exact = torch.promote_types(weight.dtype, torch.float32)
    return weight.to(exact).addmm_(b.to(exact), a.to(exact), alpha=sign * scaling)


def _native(base: Path, beside: Path, layers: int) -> Path:
    """`base`, or for a Qwen v1 checkpoint its native form in a hidden folder that goes when the merge ends."""
    if not qwen1.is_qwen1(read_json(base / "config.json", base)):
        return base
    return qwen1.convert(base, beside / ".native", num_hidden_layers=layers)


def _ties_by_default(settings: dict[str, Any]) -> bool:
    return str(settings.get("model_type", "")).startswith("gemma")  # their configs leave the key out


def _refuse_quantised(base: Path) -> None:
    kind = read_json(base / "config.json", base).get("quantization_config")
    if kind:
        method = kind.get("quant_method", "some method") if isinstance(kind, dict) else kind
        raise AdapterError(
            f"the base's weights are quantised ({method}): a sum with them would be rounded to their few levels",
            file=base / "config.json",
            hint="Name the base in 16 or 32 bits with --model.",
        )


# ---- files -----------------------------------------------------------------------------------------------------------


def _copy_beside(base: Path, run: Path, out: Path) -> None:
    """Tokenizer, template and stop ids: the base's, and over them what the run (above a checkpoint) carries."""
    ours = {"config.json", _INDEX, CERTIFICATE, FINGERPRINT, CONVERTED}
    for pattern in _BESIDE:
        for file in base.glob(pattern):
            if file.is_file() and file.name not in ours:
                shutil.copyfile(file, out / file.name)
    for folder in (run.parent if run.name.startswith("checkpoint-") else run, run):
        for pattern in _FROM_RUN:
            for file in folder.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, out / file.name)


# ---- the proof -------------------------------------------------------------------------------------------------------


def _compare(base: Path, run: Path, merged: Path, layers: int) -> dict[str, Any]:
    """Both ways over the golden prompts, one model in memory at a time. Raises AdapterError when they disagree."""
    dtype = read_json(merged / "config.json", merged).get("dtype", "float32")
    model, tokenizer = load_model(merged, dtype=dtype)
    template = ChatTemplate.from_tokenizer(tokenizer)
    prompts = [template.encode_prompt((Message("user", text),)) for text in GOLDEN_PROMPTS]
    after = [_logits(model, ids) for ids in prompts]
    model, _ = load_model(base, dtype=dtype, num_hidden_layers=layers)
    model = load_adapter(model, run).eval()
    before = [_logits(model, ids) for ids in prompts]
    golden: list[dict[str, Any]] = [
        {
            "prompt": text,
            "token_ids": list(ids),
            "kl": float((b.softmax(-1) * (b.log_softmax(-1) - a.log_softmax(-1))).sum(-1).mean()),
            "max_logit_difference": float((a - b).abs().max()),
            "logit_std": float(b.std()),
            "same_next_token": bool(a[-1].argmax() == b[-1].argmax()),
        }
        for text, ids, a, b in zip(GOLDEN_PROMPTS, prompts, after, before, strict=True)
    ]
    relative = max(g["max_logit_difference"] / g["logit_std"] for g in golden)
    kl = max(g["kl"] for g in golden)
    if relative > _FLOAT32_BOUND if dtype == "float32" else kl > _KL_BOUND:
        raise AdapterError(
            f"merged and unmerged answers differ: logits by {relative:.1e} of their standard deviation, "
            f"next-token distributions by {kl:.1e} nats ({dtype})",
            file=run,
            hint="Nothing was written. --dtype float32 rounds least.",
        )
    return {"compared_in": dtype, "max_difference_in_std": relative, "max_kl": kl, "golden": golden}


@torch.no_grad()
def _logits(model: Any, ids: list[int]) -> torch.Tensor:
    """[tokens, vocabulary] float64."""
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].double()
