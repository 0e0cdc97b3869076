"""Tiny adapters by name, and an engine that serves them beside the base."""

from __future__ import annotations

import pytest
import torch

from lora_cmqa.engine.embedded import EmbeddedEngine
from lora_cmqa.lora.low_rank import Pair
from lora_cmqa.models.load import load_model


def random_low_rank(model, name: str, r: int = 4, only: tuple[str, ...] = ()):
    """Matrices on every linear layer of the decoder (or on those named), drawn by name."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    head = model.get_output_embeddings()
    return {
        path: Pair(
            torch.randn(r, module.in_features, generator=generator) / module.in_features**0.5,
            torch.randn(module.out_features, r, generator=generator) * 0.2,
        )
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head and (not only or path.endswith(only))
    }


ADAPTERS = {"a": (4, ()), "b": (4, ()), "c": (8, ()), "d": (4, ("q_proj", "v_proj"))}


@pytest.fixture
def serving():
    """(kind, dtype, **engine settings) -> an engine with the adapters a, b (rank 4), c (rank 8), d (q and v only)."""

    def make(kind: str = "tiny", dtype: str = "float64", **settings) -> EmbeddedEngine:
        model, tokenizer = load_model(kind, dtype=dtype)

        def load(name: str):
            r, only = ADAPTERS[name.split("-")[0]]
            return random_low_rank(model, name, r, only)

        settings.setdefault("stop_ids", ())
        return EmbeddedEngine(model, tokenizer, load_adapter=load, **settings)

    return make
