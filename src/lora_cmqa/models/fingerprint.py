"""Which base is this? A base is known by what is in it, not by where it lies.

    config      sha256 over the keys of config.json that decide the computation
    tokenizer   sha256 of each tokenizer file
    weights     for each weight file: size, and sha256 of its first, middle and last MiB (--full: of all of it)

A folder that `cmqa convert` wrote holds its source's in converted_from.json, with the depth it was cut to.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from ..errors import ModelError

CONVERTED = "converted_from.json"
_MIB = 1 << 20
# What a base's config says of itself beside its computation: where it was made, and with which library.
_IGNORED = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "architectures", "auto_map", "use_cache"}
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt", "qwen.tiktoken")


def fingerprint(model_folder: str | Path, full: bool = False) -> dict[str, Any]:
    """{"config": sha256, "tokenizer": {file: sha256}, "weights": {file: {"size", "sha256"}}, "full": bool}.

    Seconds for any size of model unless `full`. Raises ModelError where the folder holds no config.json.
    """
    folder = Path(model_folder)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ModelError("no config.json, so this is no base model", file=folder)
    try:
        config = dict(json.loads(config_file.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as e:
        raise ModelError(f"not a JSON object: {e}", file=config_file) from None
    decisive = {k: v for k, v in config.items() if k not in _IGNORED}
    weights = sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])
    return {
        "config": _sha256(json.dumps(decisive, sort_keys=True).encode()),
        "tokenizer": {n: _sha256((folder / n).read_bytes()) for n in _TOKENIZER_FILES if (folder / n).is_file()},
        "weights": {w.name: {"size": w.stat().st_size, "sha256": _file_hash(w, full)} for w in weights},
        "full": full,
    }


def converted_from(folder: Path) -> dict[str, Any] | None:
    """The fingerprint of the checkpoint that `folder` was converted from; None where it was not."""
    try:
        content = json.loads((folder / CONVERTED).read_text(encoding="utf-8"))
        return content if {"config", "tokenizer", "weights"} <= content.keys() else None
    except (OSError, ValueError, AttributeError):
        return None


def differences(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Names of the parts that differ; files that only one side has count too."""
    named = [] if a["config"] == b["config"] else ["config.json"]
    for part in ("tokenizer", "weights"):
        files = sorted(set(a[part]) | set(b[part]))
        named += [f for f in files if a[part].get(f) != b[part].get(f)]
    return named


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
