"""The engine that needs nothing else: continuous batching of requests of many adapters and of the bare base.

    submit -> waiting -> a slot of the cache -> prompt, chunk by chunk -> one token a step with all others -> finished
                                                                                             cancel, at any time

    step   free what was cancelled; let the waiting in; some prompt chunks; one decode of every row; choose the tokens

Requests come and go between any two steps. What a row computes depends on that row alone (forward.py says how far),
so an answer does not depend on what else is asked. `forward.py` is the fast way, `plain.py` its twin and the way of
models that the fast one does not know.
"""

from __future__ import annotations

import contextlib
import heapq
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ..errors import AdapterError, ConfigError
from ..lora.decoder import causal_lm
from ..lora.family import Unsupported
from ..lora.low_rank import LowRank, low_rank_from_peft
from .adapters import AdapterStore, Prepared
from .base import RUN_ADAPTER, Completion, Event, FinishReason, Request, TokenLogprob
from .forward import BatchForward, Forward, Row
from .plain import PlainForward
from .prefix import PrefixCache
from .sampling import largest_tokens, next_token, token_logprob
from .text import TextStream

Listener = Callable[[Event], None]
MIB = 1 << 20
_PROMPT_TOKENS = 256  # of prompts in a step beside rows that are being written: a longer one would make those wait


@dataclass(eq=False)
class Sequence_:
    """One request on its way. `submit` gives it; `cancel` takes it."""

    request: Request
    listener: Listener
    text: TextStream
    generator: torch.Generator
    slot: int = -1
    adapter: Prepared | None = None
    keys: list[bytes] = field(default_factory=list)  # of the prefix cache
    ids: list[int] = field(default_factory=list)  # prompt and answer
    cached: int = 0  # of `ids`, in the cache
    cancelled: bool = False
    finished: bool = False

    @property
    def written(self) -> int:
        return len(self.ids) - len(self.request.prompt_ids)

    @property
    def prompt_left(self) -> int:
        return max(0, len(self.request.prompt_ids) - self.cached)


class EmbeddedEngine:
    """`model`: a causal LM of transformers, bare or as a PeftModel, whose adapter then answers as RUN_ADAPTER.

    stop_ids         end an answer and are not part of it
    load_adapter     name -> its matrices, for the names that requests may bear besides RUN_ADAPTER; a name always means
                     the same content (the server's names are content digests)
    adapter_memory   bytes of adapters kept loaded; those that answer are kept besides
    prefix_memory    bytes of prompt beginnings kept; 0 keeps none
    plain            transformers' forward, row by row, in place of the fast one

    `generate` and `stream` drive the steps themselves. A server calls `submit` and `cancel` from any thread and `step`
    from one.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        stop_ids: Sequence[int],
        *,
        max_batch: int = 32,
        load_adapter: Callable[[str], LowRank] | None = None,
        adapter_memory: int = 1024 * MIB,
        prefix_memory: int = 256 * MIB,
        plain: bool = False,
    ) -> None:
        self.model, self.tokenizer, self.stop_ids, self.max_batch = model, tokenizer, frozenset(stop_ids), max_batch
        self._load, self._plain = load_adapter, plain
        self.why_plain: str | None = None  # why the slow way is taken, as a sentence
        self.forward = self._new_forward()
        self.why_stacked = self.forward.why_stacked if isinstance(self.forward, BatchForward) else None
        self.adapters = AdapterStore(self._prepare, adapter_memory)
        self.prefixes = PrefixCache(prefix_memory, self.forward.chunk)
        self._incoming: deque[Sequence_] = deque()
        self._waiting: deque[Sequence_] = deque()
        self._running: list[Sequence_] = []
        self._free_slots = list(range(max_batch))
        self._lock, self._stepping, self._guests = threading.RLock(), threading.RLock(), 0
        self._own: tuple[Prepared, LowRank] | None = None  # the PeftModel's adapter as it was last seen
        self._own_count = 0

    # ---- whole requests ----------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of the requests."""
        answers = [_Answer() for _ in requests]
        sequences = [self.submit(r, a.add) for r, a in zip(requests, answers, strict=True)]
        try:
            while not all(s.finished for s in sequences):
                self.step()
        finally:
            for s in sequences:
                self.cancel(s)
        return [a.completion() for a in answers]

    def stream(self, request: Request) -> Iterator[str]:
        """The answer in pieces of whole characters. Left half-way, it frees its place at the next step."""
        events: deque[Event] = deque()
        sequence = self.submit(request, events.append)
        try:
            while events or not sequence.finished:
                if not events:
                    self.step()
                while events:
                    event = events.popleft()
                    if event.error is not None:
                        raise event.error
                    if event.text:
                        yield event.text
        finally:
            self.cancel(sequence)

    # ---- requests that come and go -----------------------------------------------------------------------------

    def submit(self, request: Request, listener: Listener) -> Sequence_:
        """Queue a request; `listener` gets its events from the thread that steps. Raises ConfigError where prompt and
        answer are longer than the model's positions, AdapterError for an adapter that no one can load."""
        most = self.forward.max_length
        wanted = len(request.prompt_ids) + request.sampling.max_new_tokens
        if not request.prompt_ids:
            raise ConfigError("the prompt is empty", field="prompt")
        if wanted > most:
            raise ConfigError(
                f"prompt ({len(request.prompt_ids)} tokens) and answer (at most {request.sampling.max_new_tokens}) are "
                f"{wanted} tokens; this model has {most} positions",
                field="max_new_tokens",
                hint="Ask for a shorter answer, or shorten the prompt.",
            )
        own = request.adapter == RUN_ADAPTER and hasattr(self.model, "disable_adapter")
        if request.adapter is not None and not own and self._load is None:
            raise AdapterError(f"there is no adapter {request.adapter!r} here")
        sequence = Sequence_(
            request,
            listener,
            TextStream(self.tokenizer, request.sampling.stop),
            torch.Generator().manual_seed(request.sampling.seed),
            ids=list(request.prompt_ids),
        )
        with self._lock:
            self._incoming.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence_) -> None:
        """Its slot is free after the next step; nothing is computed for it any more."""
        sequence.cancelled = True

    @property
    def load(self) -> tuple[int, int]:
        """(requests that are computed, requests that wait)"""
        wanted = [sum(not s.cancelled for s in list(some)) for some in (self._running, self._waiting, self._incoming)]
        return wanted[0], wanted[1] + wanted[2]

    def fail_all(self, error: Exception) -> None:
        """Every request that is here ends with `error`."""
        with self._between_steps():
            with self._lock:
                self._waiting += self._incoming
                self._incoming.clear()
            for s in (*self._running, *self._waiting):
                self._end(s, "error", error=error)

    def forget(self, name: str) -> int:
        """Bytes given back now by an adapter and what it computed; the rest when its requests have ended."""
        with self._between_steps():
            freed = self.adapters.forget(name) + self.prefixes.drop(name)
            if not self._running:
                self.forward.trim()
            return freed

    def last_logits(self, ids: Sequence[int], adapter: LowRank | None = None) -> torch.Tensor:
        """Logits after `ids` (fewer than a chunk), float32 [vocabulary], on the CPU; any thread, between two steps."""
        with self._between_steps():
            slot = self.max_batch  # no request's
            self.forward.reserve(slot, len(ids))
            prepared = self.forward.prepare("", adapter) if adapter else None
            logits = self.forward.logits(self.forward.prefill(slot, 0, ids, prepared))
            self.forward.free(slot)
            return logits[0].float().cpu()

    def step(self) -> bool:
        """One step for everything that is here; False when nothing is."""
        while self._guests:  # a lock alone would be taken again before anyone who waits for it wakes up
            time.sleep(0.0002)
        with self._stepping, torch.inference_mode():
            return self._step()

    @contextlib.contextmanager
    def _between_steps(self) -> Iterator[None]:
        """The engine to oneself, from any thread but the one that steps."""
        with self._lock:
            self._guests += 1
        try:
            with self._stepping, torch.inference_mode():
                yield
        finally:
            with self._lock:
                self._guests -= 1

    def _step(self) -> bool:
        with self._lock:
            self._waiting += self._incoming
            self._incoming.clear()
        self._drop_cancelled()
        self._admit()
        if not self._running:
            return False
        try:
            rows = [s for s in self._running if not s.prompt_left]
            hidden = self._prompts(beside=len(rows))
            for start in range(0, len(rows), self.forward.max_rows):
                some = rows[start : start + self.forward.max_rows]
                states = self.forward.decode([Row(s.slot, s.ids[-1], s.cached, s.adapter) for s in some])
                for s in some:
                    s.cached += 1
                hidden += zip(some, states.split(1), strict=True)
            for start in range(0, len(hidden), self.forward.max_rows):
                self._choose(hidden[start : start + self.forward.max_rows])
        except Exception as e:  # out of memory, say: whoever was in the step is told, and the engine lives on
            for s in list(self._running):
                self._end(s, "error", error=e)
        return True

    # ---- inside a step -------------------------------------------------------------------------------------------

    def _drop_cancelled(self) -> None:
        for s in [s for s in (*self._running, *self._waiting) if s.cancelled]:
            self._end(s, "cancelled")

    def _admit(self) -> None:
        while self._waiting and self._free_slots:
            s = self._waiting.popleft()
            try:
                if s.request.adapter is not None:
                    s.adapter = self._acquire(s.request.adapter)
            except Exception as e:
                self._end(s, "error", error=e)
                continue
            s.slot = heapq.heappop(self._free_slots)
            self._running.append(s)
            self.forward.reserve(s.slot, len(s.ids) + s.request.sampling.max_new_tokens)
            if self.forward.keeps_chunks and self.prefixes.budget:
                s.keys = self.prefixes.keys(s.adapter.digest if s.adapter else None, s.ids)
                for chunk in self.prefixes.find(s.keys):
                    self.forward.load_chunk(s.slot, s.cached, chunk)
                    s.cached += self.prefixes.chunk

    def _prompts(self, beside: int) -> list[tuple[Sequence_, torch.Tensor]]:
        """Prompt chunks, oldest request first; (request, hidden state) of the prompts that are now whole."""
        whole, left = [], _PROMPT_TOKENS if beside else 1 << 30
        for s in [s for s in self._running if s.prompt_left]:
            while s.prompt_left and left > 0:
                stop = min(s.cached + self.forward.chunk, len(s.request.prompt_ids))
                hidden = self.forward.prefill(s.slot, s.cached, s.ids[s.cached : stop], s.adapter)
                place = s.cached // self.forward.chunk
                if place < len(s.keys):
                    owner = s.adapter.digest if s.adapter else None
                    self.prefixes.put(s.keys[place], owner, self.forward.save_chunk(s.slot, s.cached, stop))
                left -= stop - s.cached
                s.cached = stop
                if not s.prompt_left:
                    whole.append((s, hidden))
        return whole

    def _choose(self, hidden: Sequence[tuple[Sequence_, torch.Tensor]]) -> None:
        logits = self.forward.logits(torch.cat([h for _, h in hidden]))
        largest = largest_tokens(logits).tolist()
        for row, (s, _) in enumerate(hidden):
            sampling = s.request.sampling
            plain = sampling.is_plain_greedy
            token = largest[row] if plain else next_token(logits[row], sampling, s.ids, s.generator)
            self._take(s, token, logits[row])

    def _take(self, s: Sequence_, token: int, logits: torch.Tensor) -> None:
        if token in self.stop_ids or token in s.request.sampling.stop_ids:
            self._end(s, "stop", text=s.text.finish())
            return
        logprob = None
        if s.request.sampling.logprobs is not None:
            logprob = TokenLogprob(token, *token_logprob(logits, token, s.request.sampling.logprobs))
        s.ids.append(token)
        text = s.text.push(token)
        if s.text.stopped:
            self._end(s, "stop", text=text, token=token, logprob=logprob)
        elif s.written >= s.request.sampling.max_new_tokens:
            self._end(s, "length", text=text + s.text.finish(), token=token, logprob=logprob)
        else:
            s.listener(Event(text, token, logprob))

    def _end(self, s: Sequence_, reason: FinishReason, *, error: Exception | None = None, **last: Any) -> None:
        s.finished = True
        if s in self._waiting:
            self._waiting.remove(s)
        if s.adapter is not None and s.request.adapter != RUN_ADAPTER:
            self.adapters.release(s.request.adapter or "")
        s.adapter = None
        if s.slot >= 0:  # last: whoever sees the slot free finds nothing else of the request
            self._running.remove(s)
            self.forward.free(s.slot)
            heapq.heappush(self._free_slots, s.slot)
            s.slot = -1
        s.listener(Event(finish_reason=reason, error=error, **last))

    # ---- adapters and the model ------------------------------------------------------------------------------------

    def _new_forward(self) -> Forward:
        if not self._plain:
            try:
                return BatchForward(causal_lm(self.model))
            except Unsupported as reason:
                self.why_plain = str(reason)
        return PlainForward(self.model)

    def _acquire(self, name: str) -> Prepared:
        return self._own_adapter() if name == RUN_ADAPTER else self.adapters.acquire(name)

    def _prepare(self, name: str) -> Prepared:
        assert self._load is not None
        return self.forward.prepare(name, self._load(name))

    def _own_adapter(self) -> Prepared:
        """The PeftModel's adapter as it is now: it may have been trained on since the last request."""
        if isinstance(self.forward, PlainForward):
            return Prepared(RUN_ADAPTER, 0, {}, {}, 0)
        pairs = low_rank_from_peft(self.model, RUN_ADAPTER)
        if self._own is None or not _same(self._own[1], pairs):
            self._own_count += 1
            self._own = self.forward.prepare(f"{RUN_ADAPTER} {self._own_count}", pairs), pairs
        return self._own[0]


class _Answer:
    """Events put together."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.ids: list[int] = []
        self.logprobs: list[TokenLogprob] = []
        self.last = Event()

    def add(self, event: Event) -> None:
        self.last = event
        self.text.append(event.text)
        if event.token is not None:
            self.ids.append(event.token)
        if event.logprob is not None:
            self.logprobs.append(event.logprob)

    def completion(self) -> Completion:
        """Raises what ended the request, where something did."""
        if self.last.error is not None:
            raise self.last.error
        assert self.last.finish_reason is not None
        return Completion(tuple(self.ids), "".join(self.text), self.last.finish_reason, tuple(self.logprobs))


def _same(a: LowRank, b: LowRank) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[p].a, b[p].a) and torch.equal(a[p].b, b[p].b) for p in a)
