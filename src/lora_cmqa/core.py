"""The nouns that travel through the house.

    Message            one turn of a conversation
    Example            one row: a conversation with a name             (text)
    TokenizedExample   the row as token ids, labels on the answers     (numbers)
    Pack               several rows end to end, no padding             (one micro-batch)
    Batch              the packs of one optimizer step                 (one set of rows)
    StepMetrics        what one step did                               (one line of metrics.jsonl)

Nothing here imports torch: arrays are numpy, and the model's room turns them into tensors.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "dev", "test"]

IGNORE = -100  # the label of a token that is read but not taught (torch's cross_entropy ignore_index)


@dataclass(frozen=True, slots=True)
class Message:
    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Example:
    """One row. `question_id` groups the answers of one question; `source` names the file it came from."""

    messages: tuple[Message, ...]
    id: str
    question_id: str
    source: str = ""
    split: Split | None = None

    @property
    def question(self) -> str:
        """The first user turn."""
        return next((m.content for m in self.messages if m.role == "user"), "")

    @property
    def answer(self) -> str:
        """The last assistant turn."""
        return next((m.content for m in reversed(self.messages) if m.role == "assistant"), "")


@dataclass(frozen=True, slots=True)
class TokenizedExample:
    """`input_ids` and `labels`, both int32 [tokens]; labels are not shifted, IGNORE where nothing is taught."""

    input_ids: np.ndarray
    labels: np.ndarray
    id: str
    question_id: str

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised_tokens(self) -> int:
        return int((self.labels[1:] != IGNORE).sum())


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows laid end to end. A row sees itself only; no pad token stands between.

    rows         [5 6 7 8 2]  [5 9 4 2]          8 2 and 4 2 are taught
    input_ids     5 6 7 8 2    5 9 4 2           int32 [tokens]
    position_ids  0 1 2 3 4    0 1 2 3           int32 [tokens]
    row_lengths   5            4                 sums to tokens
    predict_at    2 3          6 7               int32 [supervised]: whose hidden state predicts ...
    targets       8 2          4 2               int32 [supervised]: ... this token

    With shared prefixes a row may lie in parts: what rows have in common stands once, and each goes on from there.

    rows         [5 6 7 8 2]  [5 6 7 9 4 2]      the same question 5 6 7, two answers
    input_ids     5 6 7    8 2    9 4 2
    position_ids  0 1 2    3 4    3 4 5
    row_lengths   3        2      3              of the parts
    parents      -1        0      0              the part that each continues; () where no part continues another
    predict_at    2 3      2 5 6                 the question's last token predicts the first of both answers
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    row_lengths: tuple[int, ...]
    predict_at: np.ndarray
    targets: np.ndarray
    example_ids: tuple[str, ...]
    parents: tuple[int, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that are computed: those of the rows, less what shared prefixes spare."""
        return len(self.input_ids)

    @property
    def supervised_tokens(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, slots=True)
class Batch:
    """The rows of one optimizer step, cut into packs (micro-batches). The cut changes no gradient."""

    packs: tuple[Pack, ...]
    step: int  # counts from 1 over the whole run
    epoch: float  # rows seen / rows of an epoch, after this step
    step_supervised_tokens: int  # of the whole step, over all ranks: what the step's loss is divided by

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.packs)

    @property
    def supervised_tokens(self) -> int:
        return sum(p.supervised_tokens for p in self.packs)

    @property
    def example_ids(self) -> tuple[str, ...]:
        return tuple(i for p in self.packs for i in p.example_ids)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One line of metrics.jsonl. `time` holds all that a repeated run may differ in:
    seconds, tokens_per_second, peak_memory_bytes."""

    step: int
    epoch: float
    loss: float  # sum over the step's supervised tokens / their number, nats
    grad_norm: float  # before clipping, over the step's mean loss
    learning_rate: float
    tokens: int  # real tokens computed, no padding
    supervised_tokens: int
    world_size: int = 1
    time: dict[str, Any] = field(default_factory=dict)
