"""PEFT without bitsandbytes, which it imports for any base as soon as it is installed: 0.7 s of every start, and with
the package `kernels` a fetch from a hub (kernels/quantized.py). Our quantised layers are none of bitsandbytes'.

    import peft         peft/helpers.py        try: import bitsandbytes
    get_peft_model      tuners/lora/model.py   if is_bnb_available(): from .bnb import dispatch_bnb_8bit   (0.20)

Once bitsandbytes is there (a quantised base, a checkpoint that needs it) PEFT finds it, and both functions do nothing.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from typing import Any

_NAME = "bitsandbytes"


class _Refusing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """bitsandbytes is found, so that transformers, which looks now and remembers, knows of it; importing it fails."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        return importlib.machinery.ModuleSpec(name, self) if name == _NAME else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        raise ImportError(f"{spec.name} is left out while PEFT is imported", name=spec.name)


def import_peft() -> None:
    """The first import of PEFT in this process."""
    if _NAME in sys.modules or importlib.util.find_spec(_NAME) is None:
        importlib.import_module("peft")
        return
    refusing = _Refusing()
    sys.meta_path.insert(0, refusing)
    try:
        importlib.import_module("peft")
    finally:
        sys.meta_path.remove(refusing)


@contextlib.contextmanager
def without_bitsandbytes_layers() -> Iterator[None]:
    """Inside, PEFT puts LoRA on layers without asking bitsandbytes whether they are its own: nobody has imported it,
    so none is."""
    if _NAME in sys.modules:
        yield
        return
    asking = importlib.import_module("peft.tuners.lora.model")
    before = {name: vars(asking)[name] for name in ("is_bnb_available", "is_bnb_4bit_available")}
    try:
        for name in before:
            setattr(asking, name, lambda: False)
        yield
    finally:
        for name, function in before.items():
            setattr(asking, name, function)
