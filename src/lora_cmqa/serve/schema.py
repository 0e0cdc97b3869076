"""What may stand in a request's body. A field that is not listed is refused: a setting that did nothing would be taken
for one that did."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictFloat, StrictInt, StrictStr

_A_NAME = re.compile(r"\w{1,40}", re.ASCII)
Number = StrictInt | StrictFloat
Text = Annotated[StrictStr, Field(max_length=200_000)]
Name = Annotated[StrictStr, Field(min_length=1, max_length=4096)]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """What every refusal and every failure looks like: OpenAI's form."""

    error: ErrorDetail


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class TextPart(_Body):
    type: Literal["text"]
    text: Text


class ChatMessage(_Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: Text | Annotated[list[TextPart], Field(min_length=1, max_length=16)]
    name: Annotated[StrictStr, Field(max_length=64)] | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(p.text for p in self.content)


class StreamOptions(_Body):
    include_usage: StrictBool = False
    include_obfuscation: StrictBool = False


class Sampling(_Body):
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = None
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=0, le=1_000_000)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[StrictStr, Field(min_length=1, max_length=256)]
        | Annotated[list[Annotated[StrictStr, Field(min_length=1, max_length=256)]], Field(max_length=8)]
        | None
    ) = None
    n: Annotated[StrictInt, Field(ge=1)] = 1
    stream: StrictBool = False
    stream_options: StreamOptions | None = None
    user: Annotated[StrictStr, Field(max_length=256)] | None = None
    frequency_penalty: Literal[0] | None = None  # known to clients; repetition_penalty is what works here
    presence_penalty: Literal[0] | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatBody(Sampling):
    model: Name
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=64)]
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None


class CompletionBody(Sampling):
    model: Name
    prompt: Text | Annotated[list[Text], Field(min_length=1, max_length=16)]
    logprobs: Annotated[StrictInt, Field(ge=0, le=5)] | None = None
    echo: Literal[False] = False


class CompareBody(Sampling):
    models: Annotated[list[Name], Field(min_length=1, max_length=8)]
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=64)]


class LoadBody(_Body):
    name: Name


class AliasBody(_Body):
    alias: Name
    name: Name


def first_problem(errors: list[dict[str, Any]]) -> tuple[str, str | None]:
    """(sentence, field) of pydantic's errors, without what was sent: it may be a patient's text."""
    first = errors[0]
    parts = [
        str(p) for p in first.get("loc", ()) if p != "body" and not str(p).startswith(("function-", "constrained"))
    ]
    place = ".".join(p if _A_NAME.fullmatch(p) else "?" for p in parts)  # an unknown field's name may be text, too
    said = "is not a known field" if first["type"] == "extra_forbidden" else str(first["msg"])
    return (f"{place}: {said}" if place else said), place or None
