"""A name -> (model, tokenizer). Every Auto* call of the project stands here, and none runs a checkpoint's code.

    "embedded"            Gemma 3 270M of the demo extra            -> gguf.py
    "tiny", "tiny-llama"  built in, random weights                  -> tiny.py
    ./a/folder            a native checkpoint (safetensors)
    ./a/qwen-v1/folder    QWenLMHeadModel with qwen.tiktoken        -> qwen1.py
    owner/name            the hub                                   -> hub.py

The walk: resolve(name) -> folder -> refuse_remote_code(folder) -> config, weights, tokenizer
"""

from __future__ import annotations

import difflib
import json
import re
import typing
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from .. import hub
from ..errors import ModelError
from ..kernels.compiled import bound_compiled_products
from ..kernels.quantized import Kind, bitsandbytes_library, keep_kernels_away
from . import qwen1, tiny
from .cache import quiet_transformers
from .depth import check_layers, refuse_more_layers, say_cost
from .quantized import OnLoad, forget_quantizer
from .sizes import cpu_computes_in_bfloat16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
BUILT_IN = ("embedded", "tiny", *(f"tiny-{kind}" for kind in tiny.KINDS))
TOKENIZERS = "PreTrainedTokenizerFast"
USUAL = ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-8B", "Qwen/Qwen2.5-7B-Instruct")  # for the nearest name only


def load_model(
    name_or_path: str | Path,
    dtype: str = "float32",
    device: str = "cpu",
    *,
    num_hidden_layers: int | None = None,
    quantization: str = "none",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The base model in eval mode with frozen weights, and its tokenizer with its chat template.

    dtype   float32, bfloat16, float16, float64, or auto: bfloat16 where the device computes in it, else float32
    device  "cpu", "cuda", "cuda:1", or auto: a GPU when there is one
    num_hidden_layers  keep the first so many layers only (the seed's way to fit a card); what it costs is said
    quantization  nf4 or int8: the layers' matrices are quantised one by one as they are read (quantized.py)

    Raises ModelError: unknown name, no such folder, a checkpoint that needs its own code or a pickle, missing weights.
    ConfigError: a quantised base without bitsandbytes.
    """
    bound_compiled_products()
    kind = _kind(quantization)
    folder = resolve(name_or_path)
    where = pick_device(device)
    precision = pick_dtype(dtype, where)
    config = read_json(folder / "config.json", folder)
    model: PreTrainedModel
    if qwen1.is_qwen1(config):
        model = qwen1.load(
            folder, precision, num_hidden_layers=num_hidden_layers, quantization=kind, device=where if kind else None
        )
    else:
        refuse_remote_code(folder)
        if config.get("quantization_config"):
            keep_kernels_away()  # transformers may load it through bitsandbytes
        if kind and config.get("quantization_config"):
            raise ModelError(
                f"its weights are quantised already; they cannot be quantised again to {kind}",
                file=folder / "config.json",
                hint="Take the 16-bit checkpoint, or --quantization none.",
            )
        model = _load_native(folder, precision, num_hidden_layers, kind, where)
    if num_hidden_layers is not None and num_hidden_layers < layers_of(folder):
        say_cost(model, num_hidden_layers, layers_of(folder))
    return model.to(where).eval().requires_grad_(False), load_tokenizer(folder)


def _kind(quantization: str) -> Kind | None:
    if quantization == "none":
        return None
    if quantization not in typing.get_args(Kind):
        raise ModelError(f"quantization {quantization!r} is unknown", hint="One of none, nf4, int8.")
    bitsandbytes_library()  # asked before a byte is read
    return typing.cast(Kind, quantization)


def load_tokenizer(name_or_path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer that `load_model` gives, without the model. Raises ModelError as it does."""
    folder = resolve(name_or_path)
    if is_qwen_v1(folder):
        return qwen1.native_tokenizer(folder)
    refuse_remote_code(folder)
    return _load_tokenizer(folder)


# ---- a name -> a folder --------------------------------------------------------------------------------------------


def resolve(name_or_path: str | Path) -> Path:
    """The folder that holds the model: built in, local, or fetched from the hub. A local path opens no socket.

    Raises ModelError for a path that is not there and for a name that is nothing we know.
    """
    name = str(name_or_path)
    if name == "embedded":
        from .gguf import embedded_folder

        return embedded_folder()
    if name == "tiny" or name in BUILT_IN:
        return tiny.tiny_folder(name.removeprefix("tiny").removeprefix("-") or "qwen2")  # type: ignore[arg-type]
    path = Path(name).expanduser()
    if path.is_dir():
        return path.absolute()
    if path.is_file():
        raise ModelError("a model is a folder with config.json and *.safetensors; this is a file", file=path)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).parent.is_dir():
        return hub.fetch(name)
    near = difflib.get_close_matches(name, [*BUILT_IN, *USUAL, *_folders_beside(path)], n=2, cutoff=0.5)
    raise ModelError(
        f"there is no model or folder {name!r}",
        hint=(f"Did you mean {' or '.join(near)}? " if near else "")
        + f"--model takes {', '.join(BUILT_IN[:2])}, a local folder, or a hub name such as {USUAL[0]}.",
    )


def layers_of(folder: Path) -> int:
    """How many layers a model's config.json says. Raises ModelError where it does not say."""
    config = read_json(folder / "config.json", folder)
    if qwen1.is_qwen1(config):
        return qwen1.read_config(folder).layers
    layers = config.get("num_hidden_layers") or (config.get("text_config") or {}).get("num_hidden_layers")
    if not isinstance(layers, int):
        raise ModelError(
            "does not say how many layers there are", file=folder / "config.json", field="num_hidden_layers"
        )
    return layers


def is_qwen_v1(folder: Path) -> bool:
    """A checkpoint that transformers alone cannot load without running its code."""
    return qwen1.is_qwen1(read_json(folder / "config.json", folder))


def chat_format(folder: Path) -> str | None:
    """What Qwen v1's generation config calls its prompts: chatml (a chat model), raw (a base); None where unsaid."""
    file = folder / "generation_config.json"
    said = read_json(file, folder).get("chat_format") if file.exists() else None
    return said if isinstance(said, str) else None


def base_name(name_or_path: str | Path) -> str:
    """What adapter_config.json calls the base, for plain PEFT to load later from any folder: a path in full, a hub
    name as it is."""
    name = str(name_or_path)
    return str(resolve(name)) if name in BUILT_IN or Path(name).expanduser().exists() else name


def _folders_beside(path: Path) -> list[str]:
    try:
        return [str(path.parent / p.name) for p in path.parent.iterdir() if p.is_dir()]
    except OSError:
        return []


# ---- what is refused before anything is loaded -----------------------------------------------------------------------


def refuse_remote_code(folder: str | Path) -> None:
    """Raises ModelError for a checkpoint that only its own Python files can load; runs before any Auto* call.

    A checkpoint may carry code beside a class that transformers has itself: then the code is ignored.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json", folder)
    kind = config.get("model_type")
    if config.get("auto_map") and kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ModelError(
            f"model type {kind!r} is loaded by its own Python code only ({_first(config['auto_map'])}); "
            "code of a checkpoint is never run here",
            file=folder / "config.json",
            hint="Take a checkpoint of a class that transformers has itself (Qwen3, Llama, Gemma 3, ...).",
        )
    for key in ("_attn_implementation", "attn_implementation", "_experts_implementation", "experts_implementation"):
        if "/" in json.dumps(config.get(key)):  # transformers would fetch that kernel and run it
            raise ModelError(f"{key} names code on a hub: {config[key]!r}", file=folder / "config.json")
    tokenizer_file = folder / "tokenizer_config.json"
    if tokenizer_file.exists() and not (folder / "tokenizer.json").exists():
        code = read_json(tokenizer_file, folder).get("auto_map")
        if code:
            raise ModelError(
                f"the tokenizer is loaded by its own Python code only ({_first(code)}); code is never run here",
                file=tokenizer_file,
                hint="Put a tokenizer.json beside it.",
            )


def _first(auto_map: Any) -> str:
    values = auto_map.values() if isinstance(auto_map, dict) else auto_map
    return next((str(v) for v in values if v), "auto_map")


def read_json(file: Path, folder: Path) -> dict[str, Any]:
    """A JSON object of a model's folder; ModelError when it is absent (saying what the folder is) or broken."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if (folder / "adapter_config.json").exists():
            raise ModelError(
                "this is an adapter, not a base model", file=folder, hint=f"cmqa chat {folder} loads it on its base."
            ) from None
        raise ModelError(
            f"no {file.name}", file=folder, hint="A model's folder holds config.json, *.safetensors and its tokenizer."
        ) from None
    except (OSError, ValueError) as e:
        raise ModelError(f"not readable JSON: {e}", file=file) from None
    if not isinstance(content, dict):
        raise ModelError(f"an object is expected, found {type(content).__name__}", file=file)
    return content


def check_weight_files(folder: Path) -> None:
    """Raises ModelError unless the folder's weights are safetensors and all shards of the index are there."""
    if not list(folder.glob("*.safetensors")):
        pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in folder.glob(pattern))
        if pickles:
            raise ModelError(
                f"the weights are pickles ({pickles[0]}{', ...' if len(pickles) > 1 else ''}), which are never opened",
                file=folder,
                hint="Take the checkpoint's safetensors form; most hubs hold both.",
            )
        raise ModelError("no *.safetensors", file=folder)
    index = folder / "model.safetensors.index.json"
    if index.exists():
        named = set(read_json(index, folder).get("weight_map", {}).values())
        missing = sorted(n for n in named if not (folder / n).exists())
        if missing:
            raise ModelError(f"{len(missing)} of {len(named)} weight files are missing: {missing[0]}", file=folder)


# ---- a folder -> model and tokenizer -------------------------------------------------------------------------------


def _load_native(
    folder: Path, dtype: torch.dtype, num_hidden_layers: int | None, kind: Kind | None, device: torch.device
) -> PreTrainedModel:
    check_weight_files(folder)
    # Quantised on the device where it will stay: a 16-bit tensor goes there, and only one at a time.
    quantised: dict[str, Any] = {"quantization_config": OnLoad(kind=kind), "device_map": {"": device}} if kind else {}
    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
            text = config.get_text_config(decoder=True)
            layers = text.num_hidden_layers
            if num_hidden_layers is not None:
                text.num_hidden_layers = check_layers(num_hidden_layers, layers)
                if getattr(text, "layer_types", None):
                    text.layer_types = text.layer_types[:num_hidden_layers]
            model, info = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                output_loading_info=True,
                trust_remote_code=False,
                local_files_only=True,
                **quantised,
            )
            forget_quantizer(model)
    except ModelError:
        raise
    except Exception as e:  # transformers raises OSError, ValueError, KeyError, RuntimeError, SafetensorError ...
        if isinstance(e, OSError) and e.errno:
            raise
        raise ModelError(f"cannot be loaded: {_short(e)}", file=folder) from e
    lacking = sorted(info["missing_keys"]) + sorted(str(k) for k in info["mismatched_keys"])
    if lacking:
        raise ModelError(
            f"{len(lacking)} weights are missing or of another shape, the first is {lacking[0]}",
            file=folder,
            hint="The checkpoint does not fit its config.json; fetch it anew.",
        )
    refuse_more_layers(info["unexpected_keys"], layers, file=folder / "config.json")
    return model


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    file = folder / "tokenizer_config.json"
    config = read_json(file, folder) if file.exists() else {}
    plain = config.get("tokenizer_class") in ("TokenizersBackend", TOKENIZERS)
    try:
        # Where the folder says that tokenizer.json is the whole tokenizer, it is: AutoTokenizer would put the
        # normaliser of the model's family (Qwen2: NFC) into it.
        if plain and (folder / "tokenizer.json").exists():
            return _of_its_files(folder, config) or PreTrainedTokenizerFast.from_pretrained(
                folder, local_files_only=True
            )
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as e:
        if isinstance(e, OSError) and e.errno:
            raise
        raise ModelError(f"its tokenizer cannot be loaded: {_short(e)}", file=folder) from e


def _of_its_files(folder: Path, config: dict[str, Any]) -> PreTrainedTokenizerBase | None:
    """What from_pretrained gives where the settings are words, numbers and lists of them; it parses tokenizer.json
    three times more (a second for 33 MB). None where there is more to put together: tokens as objects, older files."""
    older = ("special_tokens_map.json", "added_tokens.json", "additional_chat_templates")
    if any((folder / name).exists() for name in older):
        return None
    settings = {key: value for key, value in config.items() if key != "tokenizer_class"}
    values = [v for value in settings.values() for v in (value if isinstance(value, list) else [value])]
    if any(isinstance(value, (dict, list)) for value in values):
        return None
    template = folder / "chat_template.jinja"
    if template.exists():
        settings["chat_template"] = template.read_text(encoding="utf-8")
    file = str(folder / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, name_or_path=str(folder), **settings)


def _short(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


# ---- device and dtype ------------------------------------------------------------------------------------------------


def pick_device(device: str) -> torch.device:
    """auto: the GPU when there is one. Raises ModelError for a device that this machine lacks."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        where = torch.device(device)
    except RuntimeError:
        raise ModelError(
            f"device {device!r} is none that torch knows", hint="--device auto, cpu, cuda, cuda:1"
        ) from None
    if where.type == "cuda" and not (torch.cuda.is_available() and (where.index or 0) < torch.cuda.device_count()):
        raise ModelError(
            f"device {device!r} is asked for; this machine has {torch.cuda.device_count()} usable GPUs",
            hint="--device cpu, or --device auto",
        )
    return where


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the device computes in it (not where it would be emulated), else float32."""
    if dtype == "auto":
        return torch.bfloat16 if computes_in_bfloat16(device) else torch.float32
    if dtype not in DTYPES:
        raise ModelError(f"dtype {dtype!r} is unknown", hint=f"One of auto, {', '.join(DTYPES)}.")
    return DTYPES[dtype]


def computes_in_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and cpu_computes_in_bfloat16()
