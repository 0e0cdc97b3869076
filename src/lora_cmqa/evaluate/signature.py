"""What a report's numbers depend on: two reports with one signature measured the same thing in the same way."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..config import EvaluateConfig
from ..core import Example
from ..data.files import sha256_of
from ..engine.run import OpenRun
from ..lora.fingerprint import FILE as FINGERPRINT
from ..models.quantized import quantization_of
from . import overlap
from .forgetting import Probe, prompt_file
from .ranking import CandidateSet
from .safety import RED_FLAGS_FILE


def sign(
    opened: OpenRun,
    e: EvaluateConfig,
    *,
    rows: Sequence[Example],
    sets: Sequence[CandidateSet],
    candidates_from_file: bool,
    probe: Probe | None,
    system: str | None,
) -> dict[str, Any]:
    """Hashes are sha256. None stands where a part was not measured."""
    elsewhere = ("split", "probe", "gate", "bootstrap_samples", "bootstrap_seed")
    sizes = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(e).items() if k not in elsewhere}
    return {
        "data_sha256": _hash([[r.id, [[m.role, m.content] for m in r.messages]] for r in rows]),
        "split": e.split,
        "candidates": ("file" if candidates_from_file else "drawn from the split") if sets else None,
        "candidates_sha256": _hash([[c.question_id, c.answers, c.labels] for c in sets]) if sets else None,
        "probe_sha256": _hash([asdict(q) for q in probe.questions]) if probe else None,
        "probe_skipped": probe.skipped if probe else None,
        "general_chat_sha256": _hash_prompts("general_chat.jsonl") if e.general_chat else None,
        "red_flags_sha256": _hash_prompts(RED_FLAGS_FILE) if e.red_flags else None,
        "adapter_sha256": _hash_file(opened.folder / "adapter_model.safetensors"),
        "base_fingerprint_sha256": _hash_file(opened.folder / FINGERPRINT),
        "dtype": str(next(opened.model.parameters()).dtype).removeprefix("torch."),
        "quantization": quantization_of(opened.model),
        "tokenizer_sha256": _hash(sorted(opened.tokenizer.get_vocab().items())),
        "template_sha256": _hash(opened.template.jinja),
        "system": system,
        "decoding": {"temperature": 0, "max_new_tokens": e.max_new_tokens, "stop_ids": list(opened.stop_ids)},
        "text": overlap.signature(),
        "sizes": sizes,
        "bootstrap_samples": e.bootstrap_samples,
        "seed": e.bootstrap_seed,
        "version": _version(),
    }


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogatepass")).hexdigest()


def _hash_prompts(name: str) -> str:
    return hashlib.sha256(prompt_file(name)).hexdigest()


def _hash_file(file: Path) -> str | None:
    return sha256_of(file) if file.is_file() else None


def _version() -> str:
    from .. import __version__

    return __version__
