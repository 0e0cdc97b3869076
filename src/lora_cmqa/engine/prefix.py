"""Prompts that begin alike are computed once: keys and values of whole chunks, kept by what made them.

    adapter digest, ids[:64]    -> keys and values of positions 0 .. 63
    adapter digest, ids[:128]   -> of positions 64 .. 127

The key holds the adapter's content digest and every token up to the chunk's end, so an adapter loaded anew under the
same name, another adapter, or the bare base never meets another's chunk. A chunk is what a cold run would compute, bit
for bit, because a cold run computes the same chunks.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence

import torch


class PrefixCache:
    """At most `budget` bytes of chunks of `chunk` tokens, least recently used out first."""

    def __init__(self, budget: int, chunk: int) -> None:
        self.budget, self.chunk, self.nbytes = budget, chunk, 0
        self.hits = self.misses = 0  # chunks found and chunks computed
        self._chunks: OrderedDict[bytes, tuple[str | None, torch.Tensor]] = OrderedDict()

    def keys(self, adapter: str | None, ids: Sequence[int]) -> list[bytes]:
        """One key for each whole chunk of `ids` but the last token, whose logits are always wanted."""
        digest = hashlib.sha256((adapter or "").encode() + b"\0")
        keys = []
        for end in range(self.chunk, len(ids), self.chunk):
            digest.update(array("q", ids[end - self.chunk : end]).tobytes())
            keys.append(digest.digest())
        return keys

    def find(self, keys: Sequence[bytes]) -> list[torch.Tensor]:
        """The chunks from the beginning on that are here."""
        found = []
        for key in keys:
            if key not in self._chunks:
                break
            self._chunks.move_to_end(key)
            found.append(self._chunks[key][1])
        self.hits += len(found)
        return found

    def put(self, key: bytes, adapter: str | None, content: torch.Tensor) -> None:
        size = _size(content)
        if key in self._chunks or size > self.budget:
            return
        self._chunks[key] = adapter, content
        self.nbytes += size
        self.misses += 1
        while self.nbytes > self.budget:
            self.nbytes -= _size(self._chunks.popitem(last=False)[1][1])

    def drop(self, adapter: str) -> int:
        """Bytes given back by forgetting all that an adapter computed."""
        before = self.nbytes
        for key in [k for k, (owner, _) in self._chunks.items() if owner == adapter]:
            self.nbytes -= _size(self._chunks.pop(key)[1])
        return before - self.nbytes


def _size(content: torch.Tensor) -> int:
    return content.numel() * content.element_size()
