"""A run folder (or a bare base) -> all that answering needs."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..data.template import ChatTemplate
from ..errors import AdapterError, RunError
from ..kernels.table import check_kernels, say_passed_over
from ..lora.adapter import load_adapter, read_adapter_config
from ..lora.fingerprint import check_fingerprint, fingerprinted, kept_layers, trained_quantization
from ..models.load import load_model
from ..models.quantized import quantization_of

GENERATION = "generation_config.json"


@dataclass(frozen=True)
class OpenRun:
    """`model` is a PeftModel where `folder` holds an adapter, else the base as it is."""

    model: Any
    tokenizer: Any
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    folder: Path
    base: str
    has_adapter: bool


def open_run(
    run: str | Path,
    *,
    base: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    num_hidden_layers: int | None = None,
    quantization: str | None = None,
) -> OpenRun:
    """Load the base and put the adapter of `run` on it, in eval mode.

    `run` is a run folder, one of its checkpoints, or any PEFT adapter folder; a base model's name or folder opens
    that base without an adapter. `base` overrides the base that the adapter names, `num_hidden_layers` the depth that
    the run's fingerprint says its base was cut to, `quantization` how it says the base was kept in training.
    Raises RunError when nothing is there, AdapterError for an adapter that does not fit, ModelError for the base.
    """
    folder = Path(run)
    has_adapter = (folder / "adapter_config.json").is_file()
    if not has_adapter and folder.is_dir() and not (folder / "config.json").is_file():
        raise RunError(
            f"{folder} holds neither adapter_config.json nor config.json",
            hint="Name the --output-dir of `cmqa train`, or one of its checkpoint-N folders.",
        )
    name = base or (read_adapter_config(folder)["base_model_name_or_path"] if has_adapter else str(run))
    if not name:
        file = folder / "adapter_config.json"
        raise AdapterError("the adapter names no base model", file=file, hint="Add --model M.")
    kept, kind = num_hidden_layers, quantization
    if has_adapter:
        source = fingerprinted(folder)
        if source is not None:
            check_fingerprint(source, name)
        kept, kind = kept or kept_layers(folder), kind or trained_quantization(folder)
    model, tokenizer = load_model(name, dtype=dtype, device=device, num_hidden_layers=kept, quantization=kind or "none")
    check_kernels_of(model)
    if has_adapter:
        model = load_adapter(model, folder)
    model.eval()
    template = ChatTemplate.from_tokenizer(tokenizer, _chat_template(folder) if has_adapter else None)
    return OpenRun(model, tokenizer, template, _stop_ids(folder, template), folder, str(name), has_adapter)


def check_kernels_of(model: Any) -> None:
    """Compare the fast functions with their plain twins where `model` stands; what differs is replaced, and said."""
    weights, kind = next(model.parameters()), quantization_of(model)
    say_passed_over(check_kernels(weights.device, weights.dtype, kind), weights.device, weights.dtype, kind)


def _chat_template(folder: Path) -> str | None:
    """The template the adapter was trained with; a checkpoint may leave it to the run folder above it."""
    for place in (folder, folder.parent):
        if (place / "chat_template.jinja").is_file():
            return (place / "chat_template.jinja").read_text(encoding="utf-8")
    return None


def _stop_ids(folder: Path, template: ChatTemplate) -> tuple[int, ...]:
    """What ends an answer: the ids stored with the adapter, and the template's own."""
    ids = set(template.stop_ids)
    for place in (folder, folder.parent):
        if (place / GENERATION).is_file():
            ids |= set(stored_stop_ids(place))
            break
    return tuple(sorted(ids))


def stored_stop_ids(folder: Path) -> tuple[int, ...]:
    """The ends of an answer in `folder`'s generation_config.json; none where it has none. Raises AdapterError."""
    file = folder / GENERATION
    if not file.is_file():
        return ()
    try:
        stored = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as e:
        raise AdapterError(f"not readable JSON: {e}", file=file) from None
    ids = stored if isinstance(stored, list) else [stored]
    return tuple(i for i in ids if isinstance(i, int))
