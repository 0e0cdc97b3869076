"""The plain twin of forward.py, and the way of models that it does not know: transformers' own forward, one row at a
time, with the adapter's change added by a hook on each linear layer.

    y = W x + b (a x)        hooks of the row's adapter, set for the time of the call
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import DynamicCache

from ..lora.decoder import causal_lm
from ..lora.low_rank import LowRank, Pair
from .adapters import Prepared, prepare_plain
from .forward import MOST_ROWS, Head, Row


class PlainForward:
    """`model`: a causal LM of transformers, bare or as a PeftModel. An adapter of no pairs is the PeftModel's own,
    whatever its kind; the others are hooked beside it. What prefill and decode give are logits already."""

    keeps_chunks, chunk, max_rows = False, 4096, MOST_ROWS

    def __init__(self, model: Any) -> None:
        self._model, causal = model, causal_lm(model)
        self._body, self.head = causal.get_decoder(), Head(causal)
        self._modules = dict(causal.named_modules())
        weight = causal.get_input_embeddings().weight
        self.dtype, self.device = weight.dtype, weight.device
        self.max_length = int(getattr(causal.config, "max_position_embeddings", 1 << 30))
        self._caches: dict[int, DynamicCache] = {}

    def prepare(self, digest: str, pairs: LowRank) -> Prepared:
        return prepare_plain(digest, pairs, self.dtype, self.device)

    def reserve(self, slot: int, length: int) -> None:
        """A DynamicCache grows by itself."""

    def free(self, slot: int) -> None:
        self._caches.pop(slot, None)

    def trim(self) -> None:
        """Nothing is kept."""

    def prefill(self, slot: int, start: int, ids: Sequence[int], adapter: Prepared | None) -> torch.Tensor:
        if start == 0:
            self._caches[slot] = DynamicCache(config=self._body.config)
        place = torch.arange(start, start + len(ids), device=self.device)[None]
        with self._adapted(adapter):
            hidden = self._body(
                input_ids=torch.tensor([list(ids)], device=self.device),
                position_ids=place,
                use_cache=True,
                **as_cache(self._body, self._caches[slot]),
            ).last_hidden_state
            return self.head(hidden[0, -1:])  # here, not in `logits`: an adapter may have trained the head

    def decode(self, rows: Sequence[Row]) -> torch.Tensor:
        return torch.cat([self.prefill(r.slot, r.position, [r.token], r.adapter) for r in rows])

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden

    def save_chunk(self, slot: int, start: int, stop: int) -> torch.Tensor:
        raise NotImplementedError("a windowed layer's cache forgets; see keeps_chunks")

    def load_chunk(self, slot: int, start: int, content: torch.Tensor) -> None:
        raise NotImplementedError("see keeps_chunks")

    @contextlib.contextmanager
    def _adapted(self, adapter: Prepared | None) -> Iterator[None]:
        own = adapter is not None and not adapter.pairs
        with contextlib.ExitStack() as stack:
            if not own and hasattr(self._model, "disable_adapter"):
                stack.enter_context(self._model.disable_adapter())
            for path, pair in (adapter.pairs if adapter is not None else {}).items():
                stack.callback(self._modules[path].register_forward_hook(_adding(pair)).remove)
            yield


def as_cache(body: Any, cache: DynamicCache) -> dict[str, DynamicCache]:
    """`cache` as the keyword that this body knows: transformers 5.24 renamed `past_key_values` to `cache`."""
    return {"cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values": cache}


def _adding(pair: Pair) -> Any:
    def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        return output + inputs[0] @ pair.a.T @ pair.b.T

    return hook
