"""Adapters added row by row, read where they lie (kernels/adapter_rows.py): a CPU's way.

Who comes and goes costs nothing but a new table of addresses, and ranks stand side by side in one call.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from ..kernels.adapter_rows import AB, Segment, Segments, in_blocks
from ..lora.low_rank import LowRank
from .adapters import Key, Prepared, Shapes, joined_matrices, size_of


class RowWise:
    """Of `dtype`, on the CPU; asked for where adapter_rows.why_not finds nothing against it."""

    def __init__(self, shapes: Shapes, dtype: torch.dtype) -> None:
        self._shapes, self._dtype = shapes, dtype
        self._outs = {key: outs for key, (_, outs) in shapes.items()}
        self._last: tuple[list[tuple[str, int]], Segments] | None = None  # digests with rows

    def prepare(self, digest: str, pairs: LowRank) -> Prepared:
        rank, joined = joined_matrices(pairs, self._shapes)
        parts = {
            key: AB(a.to(self._dtype).contiguous(), in_blocks([b.to(self._dtype) for b in bs]))
            for key, (a, bs) in joined.items()
        }
        return Prepared(digest, rank, parts, {}, sum(size_of(t) for ab in parts.values() for t in (ab.a, ab.b)))

    def places(self, adapters: Sequence[Prepared]) -> dict[str, int]:
        return {a.digest: i for i, a in enumerate(adapters)}

    def of_rows(self, adapters: Sequence[Prepared]) -> Segments | None:
        if not adapters:
            self._last = None  # no hold on one that is gone
            return None
        together = [list(own) for _, own in itertools.groupby(adapters, key=lambda a: a.digest)]
        members = [(own[0].digest, len(own)) for own in together]
        if self._last is None or self._last[0] != members:
            stops = itertools.accumulate(map(len, together))
            segments = [
                Segment(own[0].parts, own[0].rank, stop - len(own), stop)
                for own, stop in zip(together, stops, strict=True)
            ]
            self._last = members, Segments(segments, self._outs)
        return self._last[1]

    def alone(self, adapter: Prepared, count: int) -> Segments:
        return Segments([Segment(adapter.parts, adapter.rank, 0, count)], self._outs)

    def add(self, y: torch.Tensor, x: torch.Tensor, key: Key, whose: Segments | None) -> torch.Tensor:
        return y if whose is None else whose.add(y, x.contiguous(), key)

    def clear(self) -> None:
        self._last = None
