"""Is this the base that the adapter was trained on? An adapter carries its base's fingerprint (models/fingerprint.py);
another base is refused with what differs.

"num_hidden_layers" is there where only the first so many layers of that base were used (--num-hidden-layers),
"quantization" where its matrices were quantised (nf4, int8).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..models.fingerprint import differences, fingerprint
from ..models.load import layers_of, resolve

FILE = "fingerprint.json"


def write_fingerprint(
    folder: Path, base: str | Path, *, num_hidden_layers: int | None = None, quantization: str = "none"
) -> dict[str, Any]:
    """`folder`/fingerprint.json for the base named `base`, with the depth it is cut to where that is less than its,
    and with how it is quantised."""
    place = resolve(base)
    content = fingerprint(place)
    if num_hidden_layers is not None and num_hidden_layers < layers_of(place):
        content["num_hidden_layers"] = num_hidden_layers
    if quantization != "none":
        content["quantization"] = quantization
    (folder / FILE).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return content


def fingerprinted(run: str | Path) -> Path | None:
    """The folder of `run`'s fingerprint.json: itself, or for a checkpoint the run above it; None without one."""
    return next((f for f in (Path(run), Path(run).parent) if (f / FILE).is_file()), None)


def kept_layers(run: str | Path) -> int | None:
    """The depth that the base of `run` was cut to, as its fingerprint says; None for a whole base."""
    place = fingerprinted(run)
    kept = _read(place / FILE).get("num_hidden_layers") if place else None
    if kept is not None and (not isinstance(kept, int) or isinstance(kept, bool) or kept < 1):
        raise AdapterError(f"{kept!r} is no number of layers", file=run, field="num_hidden_layers")
    return kept


def trained_quantization(run: str | Path) -> str:
    """none, nf4 or int8: how the base of `run` was kept in training, as its fingerprint says."""
    place = fingerprinted(run)
    kind = _read(place / FILE).get("quantization", "none") if place else "none"
    if kind not in ("none", "nf4", "int8"):
        raise AdapterError(f"{kind!r} is no known quantisation", file=run, field="quantization")
    return str(kind)


def check_fingerprint(run: str | Path, base: str | Path) -> None:
    """Raises AdapterError naming what differs between `base` and the base that `run` was trained on."""
    file = Path(run) / FILE
    if not file.is_file():
        raise AdapterError(f"no {FILE}, so the base cannot be checked", file=run)
    trained_on = _read(file)
    differing = differences(trained_on, fingerprint(resolve(base), full=bool(trained_on.get("full"))))
    if differing:
        raise AdapterError(
            f"this adapter was trained on another base than {base}: {'; '.join(differing)} differ",
            file=file,
            hint="Name the right one with --model, or `cmqa adapter rebase` when you know that they are the same.",
        )


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if {"config", "tokenizer", "weights"} <= content.keys():
            return content
    except (OSError, ValueError, AttributeError):
        pass
    raise AdapterError("not a fingerprint", file=file, hint="`cmqa adapter rebase` writes it anew.")
