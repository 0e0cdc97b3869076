"""Adapters that were made elsewhere or for elsewhere.

import_adapter   of Qwen v1's time (peft 0.6 on QWenLMHeadModel) -> PEFT's layout on the native model
rebase           the same adapter, named for its base's new place (after `cmqa convert`)

    theirs  base_model.model.transformer.h.3.attn.c_attn.lora_A.weight   [r, hidden]
                                                        lora_B.weight   [3 * hidden, r]   rows q, then k, then v
    ours    base_model.model.model.layers.3.self_attn.q_proj (k, v): A the same, B its third; exact, r unchanged
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from ..errors import AdapterError
from ..models import qwen1
from ..models.cache import appears_complete
from ..models.depth import check_layers
from ..models.fingerprint import converted_from, differences, fingerprint
from ..models.load import base_name, load_model, read_json, resolve
from .adapter import CONFIG, WEIGHTS, check_depth, encode_adapter, load_adapter, read_adapter_config, read_tensors
from .fingerprint import FILE as FINGERPRINT
from .fingerprint import fingerprinted, kept_layers, write_fingerprint
from .inject import QWEN_V1_NAMES

_PREFIX = "base_model.model."
_BIN = "adapter_model.bin"


def import_adapter(
    old: str | Path,
    base: str | Path,
    out: str | Path,
    *,
    without_missing: bool = False,
    num_hidden_layers: int | None = None,
) -> dict[str, Any]:
    """Convert the adapter folder `old` (of Qwen v1's time) for `base`, a Qwen v1 folder or its converted form.
    `num_hidden_layers`: it was trained on the base's first so many layers, as the seed's were.

    Reads adapter_config.json and the weights, nothing else in the folder: safetensors, or adapter_model.bin as
    tensors only. Raises AdapterError: a tensor without a place, fewer or more layers than the base, wrong shapes,
    modules_to_save declared and absent (the seed script's silent loss) unless `without_missing`.
    """
    folder = Path(old)
    config = read_adapter_config(folder)
    for key in ("rank_pattern", "alpha_pattern", "layers_to_transform"):
        if config.get(key):
            raise AdapterError("was not used by adapters of that time and is not converted", file=folder, field=key)
    base_folder = resolve(base)
    sizes = _Sizes(base_folder, num_hidden_layers)
    native = _native_tensors(folder, _read(folder))
    saved, missing = _modules_to_save(folder, config, native, without_missing)
    lora = {k: t for k, t in native.items() if ".lora_" in k}
    targets = _check(folder, lora, saved, native, sizes, config)
    written = LoraConfig(
        r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config.get("lora_dropout", 0.0),
        target_modules=targets,
        modules_to_save=[name for name, _ in saved] or None,
        use_rslora=config.get("use_rslora", False),
        task_type="CAUSAL_LM",
    )
    tensors = {_PREFIX + k: t for k, t in native.items()}
    with appears_complete(Path(out)) as made:
        for name, content in encode_adapter(written, tensors, base_model_name_or_path=base_name(base)).items():
            (made / name).write_bytes(content)
        write_fingerprint(made, base_folder, num_hidden_layers=sizes.layers)
    return {
        "out": str(out),
        "base": str(base),
        "layers": sizes.layers,
        "tensors": len(tensors),
        "target_modules": targets,
        "modules_to_save": [name for name, _ in saved],
        "left_out": missing,
    }


def rebase(
    adapter: str | Path, new_base: str | Path, out: str | Path, *, num_hidden_layers: int | None = None
) -> dict[str, Any]:
    """The adapter of `adapter` with `new_base` as the base it names, and that base's fingerprint. A depth that
    `adapter`'s own fingerprint notes is kept; `num_hidden_layers` notes one.

    Every tensor is checked against the new base (load_adapter). Whether both bases hold the same weights only their
    fingerprints can say: `same_base` is True where they are equal, or where the new base says that it was converted
    from the old one (converted_from.json); False where that is not known.
    """
    folder = Path(adapter)
    config = read_adapter_config(folder)
    kept = num_hidden_layers or kept_layers(folder)
    model, _ = load_model(new_base, dtype="auto", num_hidden_layers=kept)
    load_adapter(model, folder, allow_inert=True)
    same = _is_same_base(folder, resolve(new_base))
    with appears_complete(Path(out)) as made:
        for file in folder.iterdir():
            if file.is_file() and file.name not in (CONFIG, FINGERPRINT):
                shutil.copyfile(file, made / file.name)
        named = config | {"base_model_name_or_path": base_name(new_base)}
        (made / CONFIG).write_text(json.dumps(named, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        write_fingerprint(made, new_base, num_hidden_layers=kept)
    return {"out": str(out), "base": str(new_base), "before": config.get("base_model_name_or_path"), "same_base": same}


def _is_same_base(adapter: Path, new_base: Path) -> bool:
    place = fingerprinted(adapter)
    if place is None:
        return False
    trained_on = read_json(place / FINGERPRINT, place)
    source = converted_from(new_base)
    return any(not differences(trained_on, base) for base in (fingerprint(new_base), source) if base is not None)


# ---- in --------------------------------------------------------------------------------------------------------------


def _read(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / WEIGHTS).is_file() or not (folder / _BIN).is_file():
        return read_tensors(folder / WEIGHTS)
    try:
        tensors = torch.load(folder / _BIN, map_location="cpu", weights_only=True)
    except Exception as e:  # pickle.UnpicklingError and its kin: something else than tensors
        raise AdapterError(f"not a file of tensors: {str(e).splitlines()[0][:200]}", file=folder / _BIN) from None
    if not isinstance(tensors, dict) or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise AdapterError("not a file of named tensors", file=folder / _BIN)
    bad = [k for k, t in tensors.items() if not torch.isfinite(t).all()]
    if bad:
        raise AdapterError(f"{len(bad)} of {len(tensors)} tensors hold NaN or infinity", file=folder / _BIN)
    return tensors


def _native_tensors(folder: Path, old: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Our names without PEFT's prefix: A of a joined module shared, B cut by rows."""
    native = {}
    for key, tensor in old.items():
        path = key.removeprefix(_PREFIX)
        module, lora, part = path.partition(".lora_")
        ours = qwen1.native_names(f"{module}.weight" if lora else path)
        if not ours:
            raise AdapterError(
                f"the tensor {key} has no place in Qwen v1's table",
                file=folder,
                hint="An adapter of today's names loads as it is: `cmqa chat FOLDER`.",
            )
        parts = tensor.chunk(len(ours)) if part.startswith("B.") else [tensor] * len(ours)
        for name, value in zip(ours, parts, strict=True):
            native[f"{name.removesuffix('.weight')}.lora_{part}" if lora else name] = value
    return native


def _modules_to_save(
    folder: Path, config: dict[str, Any], native: dict[str, torch.Tensor], without_missing: bool
) -> tuple[list[tuple[str, str]], list[str]]:
    """[(module, its tensor's name)] that are there, and the declared ones that are not."""
    saved, missing = [], []
    for declared in config.get("modules_to_save") or []:
        (today,) = QWEN_V1_NAMES.get(declared, (declared,))
        tensor = next((k for k in native if k.endswith(f"{today}.weight") and ".lora_" not in k), None)
        if tensor is None:
            missing.append(declared)
        else:
            saved.append((today, tensor))
    if missing and not without_missing:
        raise AdapterError(
            f"modules_to_save declares {', '.join(missing)}, trained with the adapter, and their weights are not here: "
            "the seed's script lost them when it saved the last state",
            file=folder,
            hint="Import a checkpoint-N folder of the same run, which has them, or accept the loss with "
            "--without-missing.",
        )
    return saved, missing


def _declared(targets: str | list[str]) -> set[str]:
    """c_proj -> {self_attn.o_proj, mlp.down_proj}, by PEFT's rule: a name stands for every path that ends in it."""
    wanted = set()
    for name, ours in qwen1.TABLE.items():
        path = f".{name.removesuffix('.weight')}"
        if not isinstance(targets, str) and any(path.endswith(f".{t}") for t in targets):
            wanted |= {o.removesuffix(".weight") for o in ours}
    return wanted


class _Sizes:
    """What the base's config says about shapes. Raises AdapterError for a base of another family."""

    def __init__(self, base: Path, num_hidden_layers: int | None) -> None:
        config = read_json(base / "config.json", base)
        if qwen1.is_qwen1(config):
            v1 = qwen1.read_config(base)
            self.layers, self.hidden, self.ffn, self.vocab = v1.layers, v1.hidden, v1.ffn, v1.vocab
        elif config.get("model_type") == "qwen2":
            self.layers, self.hidden = config["num_hidden_layers"], config["hidden_size"]
            self.ffn, self.vocab = config["intermediate_size"], config["vocab_size"]
        else:
            raise AdapterError(
                f"model type {config.get('model_type')!r} is neither Qwen v1 nor its converted form", file=base
            )
        self.layers = check_layers(num_hidden_layers, self.layers)

    def of(self, module: str) -> tuple[int, int]:
        """(out, in) of a module's weight."""
        leaf = module.rsplit(".", 1)[-1]
        if leaf in ("embed_tokens", "lm_head"):
            return self.vocab, self.hidden
        out, into = self.hidden, self.hidden
        if leaf in ("gate_proj", "up_proj"):
            out = self.ffn
        elif leaf == "down_proj":
            into = self.ffn
        return out, into


def _check(
    folder: Path,
    lora: dict[str, torch.Tensor],
    saved: list[tuple[str, str]],
    native: dict[str, torch.Tensor],
    sizes: _Sizes,
    config: dict[str, Any],
) -> list[str]:
    """Every layer of the base has every module, in its shape. Returns the modules' short names."""
    stray = set(native) - set(lora) - {tensor for _, tensor in saved}
    if stray:
        raise AdapterError(f"{min(stray)} is in the file and not declared in modules_to_save", file=folder)
    modules = {k.rsplit(".lora_", 1)[0] for k in lora}
    within = {m.split(".", 3)[3] for m in modules if m.startswith("model.layers.")}
    check_depth(lora, sizes.layers, file=folder)
    lacking = sorted(_declared(config["target_modules"]) - within)
    if lacking:
        raise AdapterError(
            f"target_modules declares {', '.join(lacking)} (by today's names), and no tensor of it is here", file=folder
        )
    r = config["r"]
    for module in (f"model.layers.{n}.{m}" for n in range(sizes.layers) for m in within):
        out, into = sizes.of(module)
        for part, shape in (("A", (r, into)), ("B", (out, r))):
            tensor = lora.get(f"{module}.lora_{part}.weight")
            if tensor is None:
                raise AdapterError(f"{module} has no lora_{part}", file=folder)
            if tuple(tensor.shape) != shape:
                raise AdapterError(
                    f"{module}.lora_{part} is {list(tensor.shape)}; r and the base need {list(shape)}", file=folder
                )
    for name, tensor_name in saved:
        if tuple(native[tensor_name].shape) != sizes.of(name):
            raise AdapterError(
                f"{name} is {list(native[tensor_name].shape)}, the base needs {list(sizes.of(name))}", file=folder
            )
    return sorted({m.rsplit(".", 1)[-1] for m in within})
