"""The seed's own training, step for step: 64 rows, 8 steps of 8 x 2 rows, float32, LoRA on c_proj, w1 and w2.

Its stack (transformers 4.37.2, peft 0.6.2; shared/fixtures/qwen-v1/parity_exact) differs from ours by two choices, the
hooks of this test: what it teaches (`seed_row`) and how it weighs (`seed_step`). Everything else is ours: the native
model, the imported adapter, packs, the forward, the loss in chunks, clipping, the schedule, AdamW.

    seed   loss of a step = mean over micro-batches of (mean over their tokens)      8 means of 2 rows each
    ours   loss of a step = sum over its tokens / their number
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lora_cmqa.core import IGNORE, TokenizedExample
from lora_cmqa.data.pack import make_pack
from lora_cmqa.lora.adapter import load_adapter, read_tensors
from lora_cmqa.lora.adapter_import import import_adapter
from lora_cmqa.lora.decoder import pack_losses
from lora_cmqa.lora.inject import lora_parameters
from lora_cmqa.models.load import load_model
from lora_cmqa.models.qwen1 import native_tokenizer
from lora_cmqa.train.optim import Schedule, adamw, clip_by_global_norm, warmup_steps_of

START, END, NEWLINE = 151644, 151645, 198
SYSTEM = "You are a helpful assistant."
TOLERANCE = 1e-5


def seed_row(tokenizer: Any, conversation: list[dict[str, str]], max_length: int = 128) -> tuple[list[int], list[int]]:
    """ids and labels as the seed's finetune.py made them, without the padding.

    <|im_start|>user \\n question <|im_end|> \\n <|im_start|>assistant \\n answer <|im_end|> \\n
         1        0   0    0         1       1       1           0      0    1       1       1     1 = taught
    """
    turns = [{"from": "system", "value": SYSTEM}, *conversation]
    if turns[1]["from"] != "user":
        del turns[1]
    ids: list[int] = []
    labels: list[int] = []
    for turn in turns:
        role, content = tokenizer(turn["from"]).input_ids, tokenizer(turn["value"]).input_ids
        ids += [START, *role, NEWLINE, *content, END, NEWLINE]
        taught = content if turn["from"] == "assistant" else [IGNORE] * len(content)
        labels += [START, *[IGNORE] * (len(role) + 1), *taught, END, NEWLINE]
    return ids[:max_length], labels[:max_length]


def test_the_hook_makes_the_seeds_rows(qwen_v1: Path) -> None:
    tokenizer = native_tokenizer(qwen_v1 / "qwen_v1_tiny")
    seed = json.loads((qwen_v1 / "seed_labels.json").read_text(encoding="utf-8"))
    for row in seed["rows"]:
        ids, labels = seed_row(tokenizer, row["conversations"], seed["max_len"])
        padding = seed["max_len"] - len(ids)
        assert ids + [seed["pad_id"]] * padding == row["input_ids"], row["name"]
        assert labels + [IGNORE] * padding == row["labels"], row["name"]


@pytest.fixture(scope="module")
def parity(qwen_v1: Path) -> dict[str, Any]:
    return json.loads((qwen_v1 / "parity_exact" / "parity.json").read_text(encoding="utf-8"))


def start(qwen_v1: Path, folder: Path, dtype: str = "float32") -> tuple[Any, list[TokenizedExample]]:
    """The seed's model before its first step, and its 64 rows."""
    import_adapter(qwen_v1 / "parity_exact" / "init", qwen_v1 / "qwen_v1_tiny", folder)
    model, tokenizer = load_model(qwen_v1 / "qwen_v1_tiny", dtype=dtype)
    model = load_adapter(model, folder, allow_inert=True, is_trainable=True)
    for weight in lora_parameters(model).values():
        weight.data = weight.data.to(model.dtype)
    rows = []
    for r in json.loads((qwen_v1 / "train64.json").read_text(encoding="utf-8")):
        ids, labels = (np.array(x, dtype=np.int32) for x in seed_row(tokenizer, r["conversations"]))
        rows.append(TokenizedExample(ids, labels, r["id"], r["id"]))
    return model, rows


def seed_step(model: Any, rows: list[TokenizedExample], pairs: list[list[int]]) -> list[float]:
    """Gradients of one step by the seed's weighting, on micro-batches of `pairs`; their losses."""
    losses = []
    for pair in pairs:
        loss = pack_losses(model, make_pack([rows[i] for i in pair])).mean()
        (loss / len(pairs)).backward()
        losses.append(loss.item())
    return losses


def train(
    model: Any, rows: list[TokenizedExample], parity: dict[str, Any], steps: int
) -> tuple[list[float], list[float]]:
    """(micro losses, gradient norms) of the first `steps` steps."""
    every = parity["accumulation"]
    parameters = lora_parameters(model)
    optimizer = adamw(parameters, weight_decay=0.1, adam_beta2=0.95)
    total = parity["max_steps"]
    schedule = Schedule("cosine", parity["lr"], warmup_steps_of(total, warmup_steps=0, warmup_ratio=0.01), total)
    losses, norms = [], []
    model.train()
    for step in range(1, steps + 1):
        losses += seed_step(model, rows, parity["sample_order"][(step - 1) * every : step * every])
        norms.append(float(clip_by_global_norm(parameters, 1.0)))
        rate = schedule.learning_rate_at(step)
        assert rate == pytest.approx(parity["lr_used"][step - 1], abs=1e-12)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    return losses, norms


def worst(ours: list[float], theirs: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))


def test_the_first_two_steps(parity: dict[str, Any], qwen_v1: Path, tmp_path: Path) -> None:
    losses, norms = train(*start(qwen_v1, tmp_path / "init"), parity, steps=2)
    difference = worst(losses, parity["micro_losses"][:16])
    print(f"16 micro losses: largest difference {difference:.1e}")
    assert difference <= TOLERANCE
    assert worst(norms, parity["grad_norms_before_clip"][:2]) <= TOLERANCE


def all_steps(parity: dict[str, Any], qwen_v1: Path, folder: Path, dtype: str) -> torch.Tensor:
    """|ours - theirs| of each of the final adapter's 22,528 values, largest first."""
    model, rows = start(qwen_v1, folder / "init", dtype)
    losses, norms = train(model, rows, parity, steps=8)
    import_adapter(qwen_v1 / "parity_exact" / "final", qwen_v1 / "qwen_v1_tiny", folder / "final")
    final = read_tensors(folder / "final" / "adapter_model.safetensors")
    ours = {n.replace(".default", ""): p.detach() for n, p in lora_parameters(model).items()}
    assert ours.keys() == final.keys()
    off = torch.cat([(ours[n] - t).abs().flatten() for n, t in final.items()]).sort(descending=True).values
    loss, norm = worst(losses, parity["micro_losses"]), worst(norms, parity["grad_norms_before_clip"])
    print(f"{dtype}: 64 micro losses {loss:.1e}, gradient norms {norm:.1e}, adapter {off[0]:.1e}, next {off[1]:.1e}")
    assert loss <= TOLERANCE
    assert norm <= TOLERANCE
    return off


@pytest.mark.slow
def test_all_steps_and_the_final_adapter(parity: dict[str, Any], qwen_v1: Path, tmp_path: Path) -> None:
    """In float64 every value is the seed's to 1e-5. In float32 one of 22,528 is not: its first gradient is
    3e-8, where Adam's epsilon of 1e-8 turns the last bits into the step's length. (The original stands 0.9e-5 from the
    exact value there, on the other side than we do.)"""
    off = all_steps(parity, qwen_v1, tmp_path / "single", "float32")
    assert off[1] <= TOLERANCE
    assert off[0] <= 3 * TOLERANCE
    assert all_steps(parity, qwen_v1, tmp_path / "double", "float64")[0] <= TOLERANCE
