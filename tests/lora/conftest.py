"""Tiny models with an adapter that does something, and rows to feed them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lora_cmqa.core import IGNORE, TokenizedExample
from lora_cmqa.data.pack import make_pack
from lora_cmqa.lora.inject import inject_lora, lora_parameters
from lora_cmqa.models.tiny import KINDS, tiny_model


def awaken(model, seed: int = 5):
    """Give the zero B's of fresh LoRA layers (and what else is trained) random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in lora_parameters(model).values():
            weight += 0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(weight.dtype)
    return model


def adapted(kind: str, dtype: torch.dtype = torch.float64, **settings):
    settings = {"r": 4, "lora_alpha": 8, "seed": 1} | settings
    return awaken(inject_lora(tiny_model(kind, dtype), **settings))


def make_rows(lengths=(40, 38, 21, 20, 5, 2), seed: int = 0) -> list[TokenizedExample]:
    rng = np.random.default_rng(seed)
    rows = []
    for i, n in enumerate(lengths):
        ids = rng.integers(0, 256, n).astype(np.int32)
        labels = np.where(np.arange(n) >= n // 2, ids, IGNORE).astype(np.int32)
        rows.append(TokenizedExample(ids, labels, id=f"r{i}", question_id=f"q{i}"))
    return rows


def make_questions(answers=((18, 9, 4), (25,), (30, 12)), system: int = 20, seed: int = 3) -> list[TokenizedExample]:
    """Rows of a system prompt, a question, and an answer of so many tokens: one inner tuple for each question."""
    rng = np.random.default_rng(seed)
    prompt, rows = rng.integers(0, 256, system), []
    for q, lengths in enumerate(answers):
        question = rng.integers(0, 256, 21 + q)
        for n in lengths:
            answer = rng.integers(0, 256, n)
            ids = np.concatenate((prompt, question, answer)).astype(np.int32)
            labels = np.where(np.arange(len(ids)) >= len(ids) - n, ids, IGNORE).astype(np.int32)
            rows.append(TokenizedExample(ids, labels, id=f"r{q}.{n}", question_id=f"q{q}"))
    return rows


def make_packed(lengths=(40, 38, 21, 20, 5, 2), seed: int = 0):
    return make_pack(make_rows(lengths, seed))


@pytest.fixture(params=KINDS)
def kind(request) -> str:
    return request.param
