"""What a base asks for before plain transformers and PEFT take the adapter that was trained on it.

a native folder            nothing: AutoPeftModelForCausalLM.from_pretrained(RUN)
a Qwen v1 folder           convert the base, rebase the adapter (with the depth it was cut to)
a native folder, cut       merge: PEFT would put the adapter on the first layers of the whole base
"""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config import ModelConfig
from ..models.load import is_qwen_v1, layers_of, resolve


def commands_for_plain_peft(model: ModelConfig, run: Path | None = None) -> tuple[str, ...]:
    """Commands as they are typed, which write to folders beside `run` (None: with words in place of the folders, for
    readers elsewhere); () where none is needed."""
    base = resolve(model.name_or_path)
    kept = model.num_hidden_layers
    cut = kept is not None and kept < layers_of(base)
    if is_qwen_v1(base):
        words: tuple[str, ...] = ("BASE", "NATIVE", "FOLDER", "NEW")
        if run is not None:
            native = f"{base.name}-native-{kept}" if cut else f"{base.name}-native"  # runs on one base share it
            beside = (base, run.with_name(native), run, run.with_name(f"{run.name}-native"))
            words = tuple(shlex.quote(str(path)) for path in beside)
        source, converted, adapter, out = words
        depth = f" --num-hidden-layers {kept}" if cut else ""
        return (
            f"cmqa convert {source} --out {converted}{depth}",
            f"cmqa adapter rebase {adapter} --model {converted} --out {out}",
        )
    if cut:
        adapter, out = ("FOLDER", "NEW")
        if run is not None:
            adapter, out = (shlex.quote(str(path)) for path in (run, run.with_name(f"{run.name}-merged")))
        return (f"cmqa merge {adapter} --out {out}",)
    return ()
