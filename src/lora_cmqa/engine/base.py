"""What an engine is: requests in, completions out.

Request     prompt token ids, how to sample, and which adapter answers
Event       what one step added to an answer: text, token, why it ended
Completion  the whole answer
Engine      generate(requests) -> completions in the same order; stream(request) -> pieces of text
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from .sampling import SamplingParams

RUN_ADAPTER = "default"  # the adapter of a run that was opened as a PeftModel: PEFT's own name for it

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True, slots=True)
class Request:
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: str | None = None  # its name in the engine; None: the bare base answers


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Natural logarithms under the model's own distribution, before temperature, penalty, top-k and top-p."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()  # the likeliest tokens, best first


@dataclass(frozen=True, slots=True)
class Event:
    """`text` is what can be shown since the last event: whole characters, nothing that may begin a stop string."""

    text: str = ""
    token: int | None = None  # a stop id is no part of the answer and is not named
    logprob: TokenLogprob | None = None
    finish_reason: FinishReason | None = None
    error: Exception | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    token_ids: tuple[int, ...]  # new tokens, the stop token not among them
    text: str
    finish_reason: FinishReason  # stop: a stop id or a stop string was met; length: max_new_tokens were written
    logprobs: tuple[TokenLogprob, ...] = ()


class Engine(Protocol):
    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...

    def stream(self, request: Request) -> Iterator[str]: ...
