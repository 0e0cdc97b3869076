"""lora-cmqa: from medical question-and-answer files to a LoRA adapter that proves its gain.

The front door. Every name is loaded on first use, so `import lora_cmqa` reads no torch.
"""

from __future__ import annotations

import importlib
import sys
import types
from typing import Any

__version__ = "0.1.0"

_FRONT_DOOR = {
    "Config": "config",
    "CmqaError": "errors",
    "read_examples": "data.sources",
    "prepare": "data.prepare",
    "load_model": "models.load",
    "convert": "models.qwen1",
    "inject_lora": "lora.inject",
    "save_adapter": "lora.adapter",
    "load_adapter": "lora.adapter",
    "merge": "lora.merge",
    "import_adapter": "lora.adapter_import",
    "plan": "train.plan",
    "train": "train.loop",
    "train_steps": "train.loop",
    "evaluate": "evaluate.evaluation",
    "Chat": "engine.chat",
    "compare": "engine.chat",
    "serve": "serve.server",
}

__all__ = sorted(_FRONT_DOOR)


def __getattr__(name: str) -> Any:
    if name not in _FRONT_DOOR:
        raise AttributeError(f"module 'lora_cmqa' has no attribute {name!r}")
    value = getattr(importlib.import_module(f".{_FRONT_DOOR[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_FRONT_DOOR])


class _FrontDoor(types.ModuleType):
    """`train`, `evaluate` and `serve` are rooms and public functions: importing the room must not hide the function."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _FRONT_DOOR and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _FrontDoor
