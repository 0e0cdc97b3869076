"""Which base is this? A base is known by what is in it, not by where it lies.

    config      sha256 over the keys of config.json that decide the computation
    tokenizer   sha256 of each tokenizer file
    weights     for each weight file: size, and sha256 of its first, middle and last MiB (--full: of all of it)

An adapter carries the fingerprint of the base it was trained on; another base is refused with what differs.
"num_hidden_layers" is there where only the first so many layers of that base were used (--num-hidden-layers).
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import AdapterError
from ..models.load import layers_of, resolve

FILE = "fingerprint.json"
_MIB = 1 << 20
# What a base's config says of itself beside its computation: where it was made, and with which library.
_IGNORED = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "auto_map", "use_cache"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "qwen.tiktoken")


def fingerprint(model_folder: str | Path, full: bool = False) -> dict[str, Any]:
    """{"config": sha256, "tokenizer": {file: sha256}, "weights": {file: {"size", "sha256"}}, "full": bool}.

    Seconds for any size of model unless `full`. Raises AdapterError where the folder holds no config.json.
    """
    folder = Path(model_folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise AdapterError("no config.json, so this is no base model", file=folder)
    config = json.loads(config_file.read_text(encoding="utf-8"))
    decisive = {k: v for k, v in config.items() if k not in _IGNORED}
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return {
        "config": _sha256(json.dumps(decisive, sort_keys=True).encode()),
        "tokenizer": {n: _sha256((folder / n).read_bytes()) for n in _TOKENIZER_FILES if (folder / n).is_file()},
        "weights": {w.name: {"size": w.stat().st_size, "sha256": _file_hash(w, full)} for w in weights},
        "full": full,
    }


def write_fingerprint(folder: Path, base: str | Path, *, num_hidden_layers: int | None = None) -> dict[str, Any]:
    """`folder`/fingerprint.json for the base named `base`, with the depth it is cut to where that is less than its."""
    place = resolve(base)
    content = fingerprint(place)
    if num_hidden_layers is not None and num_hidden_layers < layers_of(place):
        content["num_hidden_layers"] = num_hidden_layers
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


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of the parts that differ; files that only one side has count too."""
    named = [] if a["config"] == b["config"] else ["config.json"]
    for part in ("tokenizer", "weights"):
        files = sorted(set(a[part]) | set(b[part]))
        named += [f for f in files if a[part].get(f) != b[part].get(f)]
    return named


def _read(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if {"config", "tokenizer", "weights"} <= content.keys():
            return content
    except (OSError, ValueError, AttributeError):
        pass
    raise AdapterError("not a fingerprint", file=file, hint="`cmqa adapter rebase` writes it anew.")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _file_hash(file: Path, full: bool) -> str:
    size, digest = file.stat().st_size, hashlib.sha256()
    with file.open("rb") as f:
        if full or size <= 3 * _MIB:
            while block := f.read(_MIB):
                digest.update(block)
            return digest.hexdigest()
        for start in (0, size // 2 - _MIB // 2, size - _MIB):
            f.seek(start)
            digest.update(f.read(_MIB))
    return digest.hexdigest()
