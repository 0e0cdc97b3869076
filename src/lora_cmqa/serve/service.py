"""What the API does, without HTTP: a question and a model's name -> requests for the engine -> what became of them."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from ..core import Message
from ..data.template import ChatTemplate
from ..engine.base import Event, Request
from ..engine.embedded import EmbeddedEngine
from ..engine.sampling import SamplingParams
from ..errors import CmqaError, ConfigError
from ..evaluate.safety import gives_dosage
from .keys import Keys
from .registry import Registry, Version
from .schema import ChatMessage, Sampling
from .worker import Worker


class Draining(CmqaError):
    """The server is about to stop and takes nothing new."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of one request, but `waiting`: requests that may wait for a slot, of all clients together."""

    body_bytes: int = 256 << 10
    prompt_tokens: int = 4096
    new_tokens: int = 2048
    answers: int = 8  # n, or the models of a comparison
    waiting: int = 64
    seconds: float = 300.0


@dataclass(frozen=True, slots=True)
class _Who:
    """Who answers. `pin` keeps the weights of that version until the answer is forgotten."""

    asked: str  # the name that the client used
    name: str  # "base", or the adapter's own name
    version: Version | None
    pin: Pin | None


@dataclass(slots=True)
class Answer:
    """One answer as it grows."""

    who: _Who
    request: Request
    text: str = ""
    tokens: int = 0
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    began: float = field(default_factory=time.perf_counter)
    last_token: float | None = None

    @property
    def name(self) -> str:
        return self.who.name

    @property
    def digest(self) -> str | None:
        return self.who.version.digest if self.who.version else None

    @property
    def served_by(self) -> dict[str, Any]:
        """Which adapter answers: in every response."""
        return {"name": self.name, "digest": self.digest}

    @property
    def flags(self) -> list[str]:
        return ["dosage"] if gives_dosage(self.text) else []


class Metrics:
    """Prometheus, with labels adapter and digest (its first 12 characters). Names come from the registry only."""

    def __init__(self, service: Service) -> None:
        self.registry = CollectorRegistry()
        who = ["adapter", "digest"]
        times = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

        def counter(name: str, about: str, labels: Sequence[str]) -> Counter:
            return Counter(f"cmqa_{name}", about, labels, registry=self.registry)

        def histogram(name: str, about: str) -> Histogram:
            return Histogram(f"cmqa_{name}", about, who, registry=self.registry, buckets=times)

        def gauge(name: str, about: str, value: Callable[[], float]) -> None:
            Gauge(f"cmqa_{name}", about, registry=self.registry).set_function(value)

        self.first_token = histogram("time_to_first_token_seconds", "From the request to its first token")
        self.next_token = histogram("time_per_token_seconds", "Between two tokens of an answer")
        self.prompt_tokens = counter("prompt_tokens", "Tokens of prompts", who)
        self.new_tokens = counter("completion_tokens", "Tokens written", who)
        self.answers = counter("answers", "Answers, by how they ended", [*who, "finish_reason"])
        self.flagged = counter("flagged_answers", "Answers that hold a dose or a prescription's rhythm", [*who, "kind"])
        self.urgent = counter("emergency_notices", "Questions answered with an emergency notice", ["kind"])
        self.errors = counter("errors", "Responses of 4xx and 5xx", ["status"])
        engine = service.engine
        gauge("requests_running", "Requests that are computed", lambda: engine.load[0])
        gauge("requests_waiting", "Requests that wait for a slot", lambda: engine.load[1])
        gauge("adapter_bytes", "Adapters in memory", lambda: engine.adapters.nbytes)
        gauge("prefix_bytes", "Prompt beginnings in memory", lambda: engine.prefixes.nbytes)
        gauge("prefix_chunks_found", "Prompt chunks found in the cache since the start", lambda: engine.prefixes.hits)

    def take(self, answer: Answer, event: Event) -> None:
        who, now = _labels(answer), time.perf_counter()
        if event.token is not None:
            self.new_tokens.labels(*who).inc()
            if answer.last_token is None:
                self.first_token.labels(*who).observe(now - answer.began)
                self.prompt_tokens.labels(*who).inc(len(answer.request.prompt_ids))
            else:
                self.next_token.labels(*who).observe(now - answer.last_token)
            answer.last_token = now
        if event.finish_reason is not None:
            self.answers.labels(*who, event.finish_reason).inc()
            for kind in answer.flags:
                self.flagged.labels(*who, kind).inc()


class Service:
    """`base`: the name under which the bare base is asked for; `notice`: in place of the usual sentence."""

    def __init__(
        self,
        engine: EmbeddedEngine,
        registry: Registry,
        template: ChatTemplate,
        *,
        base: str,
        keys: Keys | None = None,
        limits: Limits | None = None,
        notice: str | None = None,
        hosts: Sequence[str] | None = None,
    ) -> None:
        self.engine, self.registry, self.template, self.base = engine, registry, template, base
        self.keys, self.limits, self.notice, self.hosts = keys or Keys([]), limits or Limits(), notice, hosts
        self.worker = Worker(engine, self.limits.waiting)
        self.metrics = Metrics(self)
        self.draining = False
        self.open_responses = 0
        self.started = int(time.time())

    # ---- a question -> requests ----------------------------------------------------------------------------------

    def chat(self, model: str, messages: Sequence[ChatMessage], body: Sampling, **more: Any) -> list[Answer]:
        """`body.n` answers to be computed. Runs in a thread of its own: it may read a disk and encodes text."""
        turns = _turns(messages)
        who = self._who(model)
        template = who.version.template if who.version else self.template
        return self._answers(who, template.encode_prompt(turns), body, **more)

    def completion(self, model: str, prompt: str, body: Sampling, **more: Any) -> list[Answer]:
        ids = self.template.tokenizer(prompt, add_special_tokens=True, split_special_tokens=True)["input_ids"]
        return self._answers(self._who(model), ids, body, **more)

    def _who(self, model: str) -> _Who:
        if model == self.base:
            return _Who(model, "base", None, None)
        name, version = self.registry.open(model)
        return _Who(model, name, version, Pin(self.engine, version.digest))

    def _answers(self, who: _Who, ids: Sequence[int], body: Sampling, **more: Any) -> list[Answer]:
        if len(ids) > self.limits.prompt_tokens:
            raise ConfigError(
                f"the prompt has {len(ids)} tokens, at most {self.limits.prompt_tokens} are taken", field="messages"
            )
        if body.n > self.limits.answers:
            raise ConfigError(f"n is {body.n}, at most {self.limits.answers} are given", field="n")
        new = more.pop("max_new_tokens", None) or body.max_tokens or min(256, self.limits.new_tokens)
        if new > self.limits.new_tokens:
            raise ConfigError(f"max_tokens is {new}, at most {self.limits.new_tokens} are given", field="max_tokens")
        seed = body.seed if body.seed is not None else secrets.randbelow(2**62)
        answers = []
        for i in range(body.n):
            sampling = SamplingParams(
                max_new_tokens=new,
                temperature=float(body.temperature or 0),
                top_p=1.0 if body.top_p is None else float(body.top_p),
                top_k=body.top_k or 0,
                repetition_penalty=1.0 if body.repetition_penalty is None else float(body.repetition_penalty),
                seed=(seed + i) % 2**63,
                stop=body.stops,
                stop_ids=who.version.stop_ids if who.version else (),
                **more,
            )
            answers.append(Answer(who, Request(tuple(ids), sampling, who.version.digest if who.version else None)))
        return answers

    # ---- requests -> events ----------------------------------------------------------------------------------------

    async def run(self, answers: Sequence[Answer]) -> AsyncIterator[tuple[int, Event]]:
        """All of `answers` in one batch. Left early, their slots are free within a step."""
        group = None
        self.open_responses += 1
        try:
            if self.draining:
                raise Draining("the server is stopping", hint="Ask another one, or this one once it is back.")
            self.worker.check_room(len(answers))
            group = self.worker.submit([a.request for a in answers])
            async for i, event in group.events():
                answer = answers[i]
                answer.text += event.text
                answer.tokens += event.token is not None
                if event.logprob is not None:
                    answer.logprobs.append(event.logprob)
                answer.finish_reason = event.finish_reason
                self.metrics.take(answer, event)
                yield i, event
        finally:
            if group is not None:
                group.cancel()
            self.open_responses -= 1
            for answer in answers:
                if answer.who.pin is not None:
                    answer.who.pin.close()

    def models(self) -> list[dict[str, Any]]:
        """The base first, then every adapter and alias with what is known of it without opening it."""
        common = {"object": "model", "created": self.started, "owned_by": "lora-cmqa"}
        listed: list[dict[str, Any]] = [{"id": self.base, **common, "parent": None, "digest": None}]
        for name in self.registry.names():
            target, version, refusal = self.registry.entry(name)
            one: dict[str, Any] = {"id": name, **common, "parent": self.base, "root": target}
            one["digest"] = version.digest if version else None
            if version:
                one |= {"base_check": version.base_check, "adapter": version.config, "evaluation": version.card}
            if refusal:
                one["refused"] = refusal.message
            listed.append(one)
        return listed


class Pin:
    """Keeps an adapter's weights in memory until it is closed, or nobody holds it any more."""

    def __init__(self, engine: EmbeddedEngine, digest: str) -> None:
        self._engine, self._digest, self._held = engine, digest, False
        engine.adapters.acquire(digest)
        self._held = True

    def close(self) -> None:
        if self._held:
            self._held = False
            self._engine.adapters.release(self._digest)

    __del__ = close


def _turns(messages: Sequence[ChatMessage]) -> list[Message]:
    """[system] user assistant user ... user. Raises ConfigError for any other order."""
    turns = [Message("system" if m.role == "developer" else m.role, m.text) for m in messages]
    talk = turns[1:] if turns[0].role == "system" else turns
    wanted = ["user", "assistant"] * len(talk)
    if len(talk) % 2 == 0 or [m.role for m in talk] != wanted[: len(talk)]:
        raise ConfigError(
            "the turns must be user, assistant, user, ... and end with user, after at most one system turn",
            field="messages",
        )
    return turns


def _labels(answer: Answer) -> tuple[str, str]:
    return answer.name, (answer.digest or "")[:12]
