"""The engine that needs nothing else: transformers' forward with a key-value cache, many requests at once.

requests -> groups with / without the adapter -> left-padded prompts -> prefill -> one token a step for all
                                                                          until each met a stop id or its length
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from .base import Completion, Request
from .sampling import next_token


class EmbeddedEngine:
    """`model`: a causal LM of transformers, bare or as a PeftModel; `stop_ids` end an answer and are not part of it."""

    def __init__(self, model: Any, tokenizer: Any, stop_ids: Sequence[int], *, max_batch: int = 32) -> None:
        self.model, self.tokenizer, self.stop_ids, self.max_batch = model, tokenizer, frozenset(stop_ids), max_batch
        causal = model.get_base_model() if hasattr(model, "get_base_model") else model
        self._body, self._head = causal.get_decoder(), causal.get_output_embeddings()
        self._softcap = getattr(causal.config, "final_logit_softcapping", None)
        self._scale = getattr(causal.config, "logit_scale", None)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of the requests."""
        done: dict[int, Completion] = {}
        for adapter in (True, False):
            # Like lengths together: left padding is computed for nothing.
            wanted = sorted(
                (i for i, r in enumerate(requests) if r.adapter == adapter), key=lambda i: len(requests[i].prompt_ids)
            )
            for start in range(0, len(wanted), self.max_batch):
                some = wanted[start : start + self.max_batch]
                answers: list[list[int]] = [[] for _ in some]
                for row, token in self._decode([requests[i] for i in some]):
                    answers[row].append(token)
                for i, ids in zip(some, answers, strict=True):
                    done[i] = self._completion(ids)
        return [done[i] for i in range(len(requests))]

    def stream(self, request: Request) -> Iterator[str]:
        """The answer in pieces of whole characters."""
        ids: list[int] = []
        said = ""
        for _, token in self._decode([request]):
            if token in self.stop_ids:
                break
            ids.append(token)
            text = self._text(ids)
            if not text.endswith("\ufffd"):  # the last character's bytes are not all here yet
                yield text[len(said) :]
                said = text
        if rest := self._text(ids)[len(said) :]:
            yield rest

    def _completion(self, ids: list[int]) -> Completion:
        stopped = bool(ids) and ids[-1] in self.stop_ids
        ids = ids[:-1] if stopped else ids
        return Completion(tuple(ids), self._text(ids), "stop" if stopped else "length")

    def _text(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden [rows, 1 or more, width] -> logits of each row's last position, [rows, vocabulary].

        The head gets a contiguous 2-D tensor: a sliced 3-D one under a frozen weight makes torch expand
        the whole head once per row.
        """
        logits = self._head(hidden[:, -1].contiguous())
        if self._scale is not None:
            logits = logits * self._scale
        if self._softcap is not None:
            logits = torch.tanh(logits / self._softcap) * self._softcap
        return logits

    def _without_adapter(self) -> contextlib.AbstractContextManager[None]:
        return self.model.disable_adapter() if hasattr(self.model, "disable_adapter") else contextlib.nullcontext()

    @torch.inference_mode()
    def _decode(self, requests: Sequence[Request]) -> Iterator[tuple[int, int]]:
        """Yields (row, token) as tokens are chosen, the stop token included; all requests agree on `adapter`."""
        if not requests:
            return
        device = self._head.weight.device
        width = max(len(r.prompt_ids) for r in requests)
        ids = torch.zeros(len(requests), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, r in enumerate(requests):
            ids[row, width - len(r.prompt_ids) :] = torch.tensor(r.prompt_ids)
            mask[row, width - len(r.prompt_ids) :] = 1
        ids, mask = ids.to(device), mask.to(device)
        position = (mask.cumsum(-1) - 1).clamp(min=0)
        cache = DynamicCache(config=self._body.config)
        seen = [list(r.prompt_ids) for r in requests]
        generators = [torch.Generator().manual_seed(r.sampling.seed) for r in requests]
        alive = [True] * len(requests)
        steps = max(r.sampling.max_new_tokens for r in requests)
        for step in range(steps):
            # Entered once a forward: between two tokens of a stream the model is as it was.
            with self._without_adapter() if not requests[0].adapter else contextlib.nullcontext():
                hidden = self._body(
                    input_ids=ids,
                    attention_mask=None if bool(mask.all()) else mask,
                    position_ids=position,
                    past_key_values=cache,
                    use_cache=True,
                ).last_hidden_state
                logits = self._logits(hidden)
            largest = logits.argmax(-1).tolist()
            chosen = []
            for row, r in enumerate(requests):
                plain = r.sampling.is_plain_greedy
                token = (
                    largest[row]
                    if plain or not alive[row]
                    else next_token(logits[row], r.sampling, seen[row], generators[row])
                )
                chosen.append(token)
                if alive[row]:
                    seen[row].append(token)
                    alive[row] = token not in self.stop_ids and step + 1 < r.sampling.max_new_tokens
                    yield row, token
            if not any(alive):
                return
            ids = torch.tensor(chosen, device=device)[:, None]
            mask = torch.cat([mask, mask.new_ones(len(requests), 1)], dim=1)
            position = position[:, -1:] + 1
