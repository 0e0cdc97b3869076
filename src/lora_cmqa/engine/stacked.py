"""Adapters added side by side: those of one rank as one product for each A and each B. A GPU's way, and the plain twin
of row_wise.py.

    Stack     the adapters of one rank in one step -> A [adapters, modules r, in], B's [adapters, r, out]
    _Group    their rows of the step, laid out for it
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from ..lora.low_rank import LowRank
from .adapters import Key, Matrices, Prepared, Shapes, joined_matrices, size_of

TILE = 8  # rows are padded to a multiple of it


@dataclass(frozen=True, slots=True)
class _Group:
    """Rows [first, stop) of a step, whose adapters have one rank. `gather` [members * m] of them for the stacked
    product, `scatter` [stop - first] back; None where they already lie so."""

    stack: Stack
    first: int
    stop: int
    gather: torch.Tensor | None = None
    scatter: torch.Tensor | None = None


class Stacked:
    """`like`: empty, of the engine's dtype on its device. `most`: rows of the largest step."""

    def __init__(self, shapes: Shapes, like: torch.Tensor, most: int) -> None:
        self._shapes, self._like, self._most = shapes, like, most
        self._stacks: dict[int, Stack] = {}
        self._least: dict[int, int] = {}  # by rank

    def prepare(self, digest: str, pairs: LowRank) -> Prepared:
        rank, joined = joined_matrices(pairs, self._shapes)
        parts = {key: (a.to(self._like), tuple(b.to(self._like) for b in bs)) for key, (a, bs) in joined.items()}
        return Prepared(digest, rank, parts, {}, sum(size_of(t) for a, bs in parts.values() for t in (a, *bs)))

    def places(self, adapters: Sequence[Prepared]) -> dict[str, tuple[int, int]]:
        """By rank, each rank's adapters in the order of their places in its stack, so that its products need no copy
        where all have as many rows."""
        places: dict[str, tuple[int, int]] = {}
        for rank in {a.rank for a in adapters}:
            members = self._stack(rank).arrange([a for a in adapters if a.rank == rank])
            places |= {m.digest: (rank, i) for i, m in enumerate(members)}
        return places

    def of_rows(self, adapters: Sequence[Prepared]) -> list[_Group]:
        groups, first = [], 0
        for rank, same in itertools.groupby(adapters, key=lambda a: a.rank):
            counts = [len(list(own)) for _, own in itertools.groupby(same, key=lambda a: a.digest)]
            groups.append(self._group(rank, counts, first))
            first += sum(counts)
        return groups

    def alone(self, adapter: Prepared, count: int) -> Prepared:
        return adapter

    def add(self, y: torch.Tensor, x: torch.Tensor, key: Key, whose: list[_Group] | Prepared) -> torch.Tensor:
        if isinstance(whose, Prepared):
            if key in whose.parts:
                a, bs = whose.parts[key]
                for mine, small, b in _by_module(y, x @ a.t(), bs):
                    mine.addmm_(small, b)
            return y
        for group in whose:
            if group.stack.changes(key):
                _add_group(y, x, group, key)
        return y

    def clear(self) -> None:
        self._stacks.clear()

    def _stack(self, rank: int) -> Stack:
        if rank not in self._stacks:
            self._stacks[rank] = Stack(self._shapes, rank, self._like)
        return self._stacks[rank]

    def _group(self, rank: int, counts: Sequence[int], first: int) -> _Group:
        """`counts`: rows of each member of the rank's stack, which stand from row `first` on."""
        stack, stop, most = self._stack(rank), first + sum(counts), max(counts)
        # 16-bit rows are taken as they come: padding them to equal rounding costs more than the products do, and what
        # differs is a last bit now and then (docs/decisions/0007).
        height = most if self._like.itemsize == 2 else max(-(-most // TILE) * TILE, self._least_for(rank))
        if len(counts) == stack.places and all(c == height for c in counts):
            return _Group(stack, first, stop)
        starts = [first + sum(counts[:i]) for i in range(len(counts))]
        gather = [s + min(j, c - 1) for s, c in zip(starts, counts, strict=True) for j in range(height)]
        gather += [first] * (height * (stack.places - len(counts)))
        scatter = [i * height + j for i, c in enumerate(counts) for j in range(c)]
        index = [torch.tensor(rows, dtype=torch.long, device=self._like.device) for rows in (gather, scatter)]
        return _Group(stack, first, stop, *index)

    def _least_for(self, rank: int) -> int:
        """Rows of one adapter, measured for A and B of each kind of projection."""
        if rank not in self._least:
            matrices = []
            for inner, outs in set(self._shapes.values()):
                matrices += [
                    self._like.new_empty(n, m) for n, m in ((len(outs) * rank, inner), *((o, rank) for o in outs))
                ]
            self._least[rank] = steady_stack_rows([m.normal_() for m in matrices], self._most)
        return self._least[rank]


class Stack:
    """The adapters of one rank that answer in the same step, as one tensor for each A and B.

    `arrange(wanted)` puts them in the first places and copies only those that were not there: a batch whose members
    stay the same copies nothing.
    """

    def __init__(self, shapes: Shapes, rank: int, like: torch.Tensor) -> None:
        self.rank, self._shapes, self._like = rank, shapes, like
        self._tensors: dict[Key, Matrices] = {}
        self._members: list[Prepared] = []
        self._room = 0

    def arrange(self, wanted: Sequence[Prepared]) -> list[Prepared]:
        """The members in their order afterwards; `wanted` holds each once."""
        if {w.digest for w in wanted} == {m.digest for m in self._members}:
            return list(self._members)
        if len(wanted) > self._room:
            self._grow(max(4, 1 << (len(wanted) - 1).bit_length()))
        by_digest = {w.digest: w for w in wanted}
        absent = [w for w in wanted if w.digest not in {m.digest for m in self._members}]
        spare = [m for m in self._members[len(wanted) :] if m.digest in by_digest]
        for place in range(len(wanted)):
            if place < len(self._members) and self._members[place].digest in by_digest:
                continue
            new = (spare or absent).pop()
            if place < len(self._members):
                self._members[place] = new
            else:
                self._members.append(new)
            self._copy(place, new)
        del self._members[len(wanted) :]
        return list(self._members)

    def get(self, key: Key) -> Matrices:
        """A [places, k r, in] and the k B's [places, r, out]; a lone member has an idle place beside it."""
        a, bs = self._tensors[key]
        return a[: self.places], tuple(b[: self.places] for b in bs)

    @property
    def places(self) -> int:
        """At least 2: a stack of one rounds otherwise."""
        return max(2, len(self._members))

    def changes(self, key: Key) -> bool:
        return any(key in m.parts for m in self._members)

    def _grow(self, room: int) -> None:
        self._room, members, self._members = room, self._members, []
        self._tensors = {
            key: (
                self._like.new_zeros(room, len(outs) * self.rank, inner),
                tuple(self._like.new_zeros(room, self.rank, out) for out in outs),
            )
            for key, (inner, outs) in self._shapes.items()
        }
        for place, member in enumerate(members):
            self._members.append(member)
            self._copy(place, member)

    def _copy(self, place: int, adapter: Prepared) -> None:
        for key, (a, bs) in self._tensors.items():
            new = adapter.parts.get(key)
            for i, held in enumerate((a, *bs)):
                if new is None:
                    held[place].zero_()
                else:
                    held[place].copy_((new[0], *new[1])[i])


def _add_group(y: torch.Tensor, x: torch.Tensor, group: _Group, key: Key) -> None:
    a, bs = group.stack.get(key)
    which = slice(group.first, group.stop) if group.gather is None else group.gather
    some = y[which].view(len(a), -1, y.shape[1])
    for mine, small, b in _by_module(some, torch.bmm(x[which].view(len(a), -1, x.shape[1]), a.mT), bs):
        mine.baddbmm_(small, b)
    if group.gather is not None:
        y[group.first : group.stop] = some.view(-1, y.shape[1])[group.scatter]


def _by_module(
    y: torch.Tensor, small: torch.Tensor, bs: Sequence[torch.Tensor]
) -> Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Each module's outputs [..., out], x A' [..., r] and B [..., r, out]; the first two are views."""
    if len(bs) == 1:
        return ((y, small, bs[0]),)
    outs = y.split([b.shape[-1] for b in bs], dim=-1)
    return zip(outs, small.split(bs[0].shape[-2], dim=-1), bs, strict=True)


@torch.inference_mode()
def steady_stack_rows(matrices: Iterable[torch.Tensor], most: int) -> int:
    """The same for stacked products: rows of each adapter, whichever and however many adapters stand beside it."""
    generator, least = torch.Generator().manual_seed(0), TILE
    for w in matrices:
        x = torch.randn(most, w.shape[1], generator=generator).to(w.device, w.dtype)
        whole = torch.bmm(x.expand(2, -1, -1).clone(), w.mT.expand(2, -1, -1).clone())[0]
        for size in range(most, least - 1, -TILE):
            few = [torch.bmm(x[:size].expand(g, -1, -1).clone(), w.mT.expand(g, -1, -1).clone())[0] for g in (2, 3, 8)]
            if not all(torch.equal(y, whole[:size]) for y in few):
                least = min(most, size + TILE)
                break
    return least
