"""Rows of one step, each with its own adapter, on a CPU: y[m] += B (A x[m]).

    rows       0 0 0 1 2 2        segments: adapter 0 answers rows 0 to 2, adapter 1 row 3, ...
    products   A [modules r, in] as it lies, B in blocks of 16 outputs: each is read once, from end to end

What Punica's SGMV does on a GPU (arXiv 2310.18547, section 4), for a processor (_rows.c). A stacked product
(engine/stacked.py) must copy the adapters of a step side by side and takes one call for each A and B; this reads them
where they are, of any ranks together, and takes one call for each projection. Sums are in float32 and rounded once, to
y's dtype; each row's are taken in one order, so they have the same bits whatever stands beside it.

`why_not` says why it cannot be used.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from . import native

LANES = 16
# The plain one rounds more often.
_ALLOWED = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


@dataclass(frozen=True, slots=True)
class AB:
    """An adapter's matrices of one joined projection: `a` [modules r, in]; `b` [blocks, r, 16], each module's outputs
    from a new block on, its last one filled up with zeros."""

    a: torch.Tensor
    b: torch.Tensor


def in_blocks(bs: Sequence[torch.Tensor]) -> torch.Tensor:
    """B of each module, [r, out] -> [blocks, r, 16]."""
    padded = [torch.nn.functional.pad(b, (0, -b.shape[1] % LANES)) for b in bs]
    return torch.cat([b.view(len(b), -1, LANES).transpose(0, 1) for b in padded]).contiguous()


def from_blocks(b: torch.Tensor, outs: Sequence[int]) -> list[torch.Tensor]:
    """What `in_blocks` was given."""
    counts = [-(-out // LANES) for out in outs]
    return [
        part.transpose(0, 1).reshape(part.shape[1], -1)[:, :out]
        for part, out in zip(b.split(counts), outs, strict=True)
    ]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [first, stop) and the adapter that answers them; a projection that is not in `parts` it leaves alone."""

    parts: Mapping[Any, AB]
    rank: int
    first: int
    stop: int


class _Call(NamedTuple):
    """What the kernel is told of one projection, in the order of its arguments; then what must fit to it."""

    segment: int  # address of five integers for each segment
    segments: int
    outs: int  # address of each module's outputs
    modules: int
    inner: int
    bits: int
    out: int
    dtype: torch.dtype


class Segments:
    """Whose each row of a step is, for every projection: written once for all layers, until somebody comes or goes."""

    def __init__(self, segments: Sequence[Segment], outs: Mapping[Any, tuple[int, ...]]) -> None:
        """`outs`: outputs of each module of each joined projection, e.g. "qkv" of layer 0 -> (1024, 256, 256)."""
        self.segments, self.outs = tuple(segments), outs
        self._rows = max((s.stop for s in segments), default=0)
        most_modules = max(map(len, outs.values()), default=0)
        self._small = torch.empty(sum((s.stop - s.first) * s.rank for s in segments) * most_modules)
        self._kept: list[array[int]] = []  # what addresses point into
        self._calls = {key: call for key in outs if (call := self._call(key)) is not None}

    def _call(self, key: Any) -> _Call | None:
        """None where nobody changes this projection."""
        table, sizes = array("q"), array("q", self.outs[key])
        a = None
        for s in self.segments:
            if key in s.parts:
                a, b = s.parts[key].a, s.parts[key].b
                table.extend((a.data_ptr(), b.data_ptr(), s.first, s.stop, s.rank))
        if a is None:
            return None
        self._kept += table, sizes
        at, of = table.buffer_info()[0], sizes.buffer_info()[0]
        inner, out = a.shape[1], sum(self.outs[key])
        return _Call(at, len(table) // 5, of, len(sizes), inner, native.BITS[a.dtype], out, a.dtype)

    def add(self, y: torch.Tensor, x: torch.Tensor, key: Any) -> torch.Tensor:
        """Into y [rows, all modules' out], in place; x [rows, in]. Both on the CPU, contiguous, of the adapters' dtype;
        ValueError otherwise: the kernel reads addresses and looks at nothing else."""
        call = self._calls.get(key)
        if call is None:
            return y
        right = x.shape[1] == call.inner and y.shape[1] == call.out and x.dtype == y.dtype == call.dtype
        if not right or min(len(x), len(y)) < self._rows or not (y.is_contiguous() and x.is_contiguous()):
            raise ValueError(
                f"y {tuple(y.shape)} {y.dtype} and x {tuple(x.shape)} {x.dtype}; asked for: contiguous, {call.dtype}, "
                f"{self._rows} rows or more of {call.out} and of {call.inner}"
            )
        native.rows.add(y.data_ptr(), x.data_ptr(), *call[:6], self._small.data_ptr(), torch.get_num_threads())
        return y

    def add_plain(self, y: torch.Tensor, x: torch.Tensor, key: Any) -> torch.Tensor:
        """The plain twin of `add`."""
        for s in self.segments:
            if key not in s.parts:
                continue
            ab, rows = s.parts[key], slice(s.first, s.stop)
            small = (x[rows] @ ab.a.t()).split(s.rank, dim=-1)
            bs = from_blocks(ab.b, self.outs[key])
            y[rows] += torch.cat([t @ b for t, b in zip(small, bs, strict=True)], -1)
        return y


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where `Segments.add` can be used; tried beside its twin, which costs a moment once."""
    return native.why_not(device, dtype, _tried, _ALLOWED)


def _tried(draw: torch.Generator, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=draw).to(dtype)

    outs = {"": (40, 16)}
    adapters = [(r, {"": AB(drawn(2 * r, 70), in_blocks([drawn(r, 40), drawn(r, 16)]))}) for r in (4, 3)]
    segments = Segments([Segment(p, r, first, first + 6) for first, (r, p) in zip((0, 6), adapters, strict=True)], outs)
    x, y = drawn(13, 70), drawn(13, 56)
    return [(segments.add(y.clone(), x, ""), segments.add_plain(y.clone(), x, ""))]
