"""What an engine is: requests in, completions out.

Request     prompt token ids, how to sample, with the adapter or without it
Completion  the new token ids, their text, and why it ended
Engine      generate(requests) -> completions in the same order; stream(request) -> pieces of text
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from .sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class Request:
    prompt_ids: tuple[int, ...]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    adapter: bool = True  # False: the bare base answers


@dataclass(frozen=True, slots=True)
class Completion:
    token_ids: tuple[int, ...]  # new tokens, the stop token not among them
    text: str
    finish_reason: Literal["stop", "length"]  # a stop id was met, or max_new_tokens were written


class Engine(Protocol):
    def generate(self, requests: Sequence[Request]) -> list[Completion]: ...

    def stream(self, request: Request) -> Iterator[str]: ...
