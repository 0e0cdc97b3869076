"""What every way is measured on: the same model, rows, steps, clock and peak of matrix products.

a way is  train(setting, model, rows, clock) -> None       it calls clock.step(rows done) after each optimizer step
"""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lora_cmqa.core import Example, TokenizedExample
from lora_cmqa.data.prepare import load_split
from lora_cmqa.data.sources import read_examples
from lora_cmqa.data.template import ChatTemplate, encode_all
from lora_cmqa.demo import SAMPLE
from lora_cmqa.models.load import DTYPES, load_model, load_tokenizer
from lora_cmqa.models.sizes import Shape, shape_of

ROWS_PER_STEP = 16
# m, n, k: two large squares, then layers, LoRA and heads of small models
PEAK_SHAPES = (
    *((2048, 2048, 2048), (4096, 4096, 4096), (512, 640, 640), (512, 2048, 640), (2048, 576, 576)),
    *((2048, 1536, 576), (2048, 2048, 640), (2048, 640, 2048), (2048, 8, 640), (2048, 640, 8)),
    *((512, 262144, 640), (512, 49152, 576)),
)
TINY_SHAPES = ((256, 256, 256),)


@dataclass(frozen=True)
class Setting:
    model: str  # what load_model takes, or random:NAME for random weights of a known shape
    data: str | None  # prepared folder or any file that read_examples takes; None: the embedded sample
    rows: int
    round: int  # decides which rows and in which order: all ways of a round begin with the same ones
    several_answers: bool = False  # only rows of questions with several answers, question by question
    device: str = "cpu"
    threads: int = 2
    r: int = 8
    lora_alpha: float = 16
    learning_rate: float = 3e-4
    max_length: int = 512
    stretch: int = 0  # every row repeated to so many tokens; 0: as it is
    checkpointing: bool = False  # ours and the plain loop; the seed's recipe always recomputes


@dataclass
class Clock:
    """Ends of steps, with the tokens of the rows done in each and the tokens that were computed for them."""

    device: torch.device
    began: float = field(default_factory=time.perf_counter)
    ends: list[tuple[float, float, int, int, int]] = field(default_factory=list)

    def step(self, rows: Sequence[TokenizedExample], computed: int | None = None) -> None:
        """computed: tokens that shared prefixes leave to compute (padding is not counted: it is no work)."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        tokens = sum(map(len, rows))
        taught = sum(r.supervised_tokens for r in rows)
        self.ends.append(
            (time.perf_counter(), time.process_time(), tokens, tokens if computed is None else computed, taught)
        )

    def values(self, threads: int) -> dict[str, float]:
        """Over the steps after the first, which pays for what is made once."""
        if len(self.ends) < 2:
            raise SystemExit(f"{len(self.ends)} steps: a rate needs two, the first is not counted")
        seconds = self.ends[-1][0] - self.ends[0][0]
        tokens, computed, taught = (sum(e[i] for e in self.ends[1:]) for i in (2, 3, 4))
        return {
            "steps": len(self.ends) - 1,
            "seconds": seconds,
            "first_step_seconds": self.ends[0][0] - self.began,
            "tokens": tokens,
            "computed_tokens": computed,
            "supervised_tokens": taught,
            "tokens_per_second": tokens / seconds,
            # of the processor time that `threads` threads could have had: well under 1 where others took some
            "processor_share": (self.ends[-1][1] - self.ends[0][1]) / seconds / threads,
        }


# ---- rows ------------------------------------------------------------------------------------------------------------


def read_examples_of(setting: Setting) -> list[Example]:
    """All training rows as text."""
    source = read_examples(SAMPLE) if setting.data is None else load_split(Path(setting.data), "train")
    return [e for e in source if e.split in (None, "train")]


def read_rows(setting: Setting, vocabulary: int) -> list[TokenizedExample]:
    """setting.rows rows in the round's order. Raises SystemExit where there are too few for two steps."""
    tokenizer = load_tokenizer("embedded" if setting.model.startswith("random:") else setting.model)
    rows, _ = encode_all(
        read_examples_of(setting), ChatTemplate.from_tokenizer(tokenizer), max_length=setting.max_length
    )
    rows = [_fitted(row, setting.stretch, vocabulary) for row in rows]
    questions: dict[str, list[TokenizedExample]] = {}
    for row in rows:
        questions.setdefault(row.question_id, []).append(row)
    units = [unit for unit in questions.values() if len(unit) > 1] if setting.several_answers else [[r] for r in rows]
    order = np.random.default_rng(setting.round).permutation(len(units))
    chosen = [row for i in order for row in units[i]][: setting.rows]
    if len(chosen) < 2 * ROWS_PER_STEP:
        raise SystemExit(f"{len(chosen)} rows are left; two steps need {2 * ROWS_PER_STEP}")
    return chosen[: len(chosen) - len(chosen) % ROWS_PER_STEP]


def _fitted(row: TokenizedExample, stretch: int, vocabulary: int) -> TokenizedExample:
    ids, labels = row.input_ids, row.labels
    if stretch:
        ids, labels = np.resize(ids, stretch), np.resize(labels, stretch)
    return TokenizedExample(
        ids % vocabulary, np.where(labels < 0, labels, labels % vocabulary), row.id, row.question_id
    )


# ---- models ----------------------------------------------------------------------------------------------------------


def load(setting: Setting, dtype: str) -> Any:
    """The base, frozen, on the device."""
    if not setting.model.startswith("random:"):
        return load_model(setting.model, dtype=dtype, device=setting.device)[0]
    return _random(shape_of(setting.model.removeprefix("random:")), dtype, setting.device)


def without_weights(shape: Shape) -> Any:
    """transformers' causal LM of a known shape on the meta device."""
    import transformers

    family = {"qwen1": "Qwen2", "qwen2": "Qwen2", "qwen3": "Qwen3", "llama": "Llama"}[shape.family]
    config = getattr(transformers, f"{family}Config")(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        tie_word_embeddings=shape.tied,
    )
    with torch.device("meta"):
        return getattr(transformers, f"{family}ForCausalLM")(config)


def _random(shape: Shape, dtype: str, device: str) -> Any:
    model = without_weights(shape)
    model = model.to(DTYPES[dtype]).to_empty(device=device)
    model.tie_weights()
    generator = torch.Generator(device).manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(0, 0.02, generator=generator) if weight.dim() == 2 else weight.fill_(1)
    decoder = model.get_decoder()  # its table is a buffer that to_empty left empty
    decoder.rotary_emb = type(decoder.rotary_emb)(config=model.config).to(device)
    return model.eval().requires_grad_(False)


def operations(model: Any) -> tuple[int, int]:
    """Floating-point operations that LoRA on a frozen base cannot do without: (per body token, per taught token).

    Forward and gradient to the input, 2 each per weight of a matrix; the frozen weights' own gradients are not needed.
    """
    head = model.get_output_embeddings()
    body = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not head)
    return 4 * body, 4 * head.weight.numel()


def peak(dtype: torch.dtype, device: torch.device, shapes: Sequence[tuple[int, int, int]]) -> float:
    """The fastest matrix product, operations a second: best of 5 over all shapes."""
    best = 0.0
    for m, n, k in shapes:
        a, b = (torch.randn(size, k, device=device, dtype=dtype) for size in (m, n))
        times = []
        for _ in range(6):
            began = time.perf_counter()
            torch.nn.functional.linear(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - began)
        best = max(best, 2 * m * n * k / min(times[1:]))
    return best


def peak_memory(device: torch.device) -> int:
    """Bytes: torch's allocator on a GPU, else resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
