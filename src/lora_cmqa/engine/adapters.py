"""Adapters of an engine: thousands on disk, those in use in memory, those of one batch side by side.

    AdapterStore   name -> LowRank -> Prepared (in the base's dtype, on its device), within a budget
    Stack          those of one rank in one decode step -> A [adapters, k r, in], B's [adapters, r, out]

Projections that read the same input share one A, its rows below each other; each keeps a B of its own:

    qkv   A = [A_q; A_k; A_v]      x A' = [s_q  s_k  s_v]      y_q += s_q B_q'   y_k += s_k B_k'   y_v += s_v B_v'

(One block diagonal B for all would be one product, but two thirds of what it reads are zeros.)

Where rows are few and weights can be packed (kernels/packed.py), the adapters of a stack stand below each other as one
weight, and what a row has no part in is set to zero between its two products:

    x [A_1; A_2; A_3]'  ->  row of adapter 2:  [ 0  s_2  0 ]  ->  [ 0  s_2  0 ] [B_1; B_2; B_3]  =  s_2 B_2
"""

from __future__ import annotations

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import AdapterError
from ..kernels.packed import Packed, can_pack, packed
from ..lora.low_rank import LowRank

# Name of the joined projection -> its modules in a decoder's layer, in the order of the joined weight's rows.
JOINED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "out": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
# Packing eight adapters of rank 16 takes as long as some fifteen steps gain by it (embedded base; docs/LOG.md).
PACK_AFTER = 16  # steps with the same members
_PACKED_BYTES = 256 << 20  # of a stack, which is then held twice
_PLACE = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)$")
Key = tuple[int, str]  # layer, name of the joined projection
Parts = tuple[torch.Tensor, tuple[torch.Tensor, ...]]  # A, B's
PackedParts = tuple[Packed, tuple[Packed, ...]]  # A [k places r, in], B's [out, places r]


@dataclass(frozen=True, slots=True)
class Prepared:
    """One adapter ready for use. `parts`: A [k r, in] and the k B's, each [r, out], of each joined projection it
    changes; zeros for a module of it that it does not."""

    digest: str
    rank: int
    parts: dict[Key, Parts]
    pairs: LowRank  # by module, for the plain way; empty where `parts` serve
    nbytes: int


def prepare_joined(
    digest: str, pairs: LowRank, widths: dict[Key, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> Prepared:
    """`widths`: outputs of the modules of each joined projection, e.g. (0, "qkv") -> (1024, 256, 256)."""
    rank = max(len(pair.a) for pair in pairs.values())
    grouped: dict[Key, dict[str, Any]] = {}
    for path, pair in pairs.items():
        found = _PLACE.search(path)
        joined = next((j for j, modules in JOINED.items() if found and found[2] in modules), None)
        if found is None or joined is None:
            raise AdapterError(f"{path} is no projection of a decoder's layer")
        grouped.setdefault((int(found[1]), joined), {})[found[2]] = pair
    parts = {}
    for key, modules in grouped.items():
        outs = widths[key]
        inner = next(iter(modules.values())).a.shape[1]
        a, bs = torch.zeros(len(outs) * rank, inner), [torch.zeros(rank, out) for out in outs]
        if dtype == torch.float64:
            a, bs = a.double(), [b.double() for b in bs]
        for i, (name, b) in enumerate(zip(JOINED[key[1]], bs, strict=True)):
            if name in modules:
                pair = modules[name]
                a[i * rank : i * rank + len(pair.a)] = pair.a
                b[: len(pair.a)] = pair.b.T
        parts[key] = (a.to(device, dtype), tuple(b.to(device, dtype) for b in bs))
    return Prepared(digest, rank, parts, {}, sum(_size(t) for a, bs in parts.values() for t in (a, *bs)))


def prepare_plain(digest: str, pairs: LowRank, dtype: torch.dtype, device: torch.device) -> Prepared:
    moved = {p: type(pair)(pair.a.to(device, dtype), pair.b.to(device, dtype)) for p, pair in pairs.items()}
    rank = max(len(pair.a) for pair in pairs.values())
    return Prepared(digest, rank, {}, moved, sum(_size(t) for pair in moved.values() for t in pair))


class AdapterStore:
    """Prepared adapters by name, within `budget` bytes; those that answer now stay. Any thread may call."""

    def __init__(self, load: Callable[[str], Prepared], budget: int) -> None:
        self.budget, self.nbytes, self.loads = budget, 0, 0
        self._load = load
        self._here: OrderedDict[str, Prepared] = OrderedDict()
        self._users: dict[str, int] = {}
        self._unwanted: set[str] = set()  # forgotten while they still answer
        self._lock = threading.RLock()

    def acquire(self, name: str) -> Prepared:
        """Loaded when it is not here; `release` it once for each time. Raises what `load` raises."""
        with self._lock:
            adapter = self._here.get(name)
            if adapter is not None:
                return self._use(name, adapter)
        new = self._load(name)  # without the lock: who answers now does not wait for a disk
        with self._lock:
            if name not in self._here:
                self._here[name] = new
                self.nbytes += new.nbytes
                self.loads += 1
            return self._use(name, self._here[name])

    def _use(self, name: str, adapter: Prepared) -> Prepared:
        self._here.move_to_end(name)
        self._users[name] = self._users.get(name, 0) + 1
        self._unwanted.discard(name)
        self._shrink()
        return adapter

    def release(self, name: str) -> None:
        with self._lock:
            self._users[name] -= 1
            if not self._users[name]:
                del self._users[name]
                if name in self._unwanted:
                    self.forget(name)
            self._shrink()

    def forget(self, name: str) -> int:
        """Bytes given back now; 0 where it is not here, or still answers and goes when it has answered."""
        with self._lock:
            if name not in self._here:
                return 0
            if name in self._users:
                self._unwanted.add(name)
                return 0
            self._unwanted.discard(name)
            size = self._here.pop(name).nbytes
            self.nbytes -= size
            return size

    def users(self, name: str) -> int:
        return self._users.get(name, 0)

    def holds(self, name: str) -> bool:
        return name in self._here

    def _shrink(self) -> None:
        for name in list(self._here):
            if self.nbytes <= self.budget:
                return
            if name not in self._users:
                self.forget(name)


class Stack:
    """The adapters of one rank that answer in the same step, as one tensor for each A and B.

    `arrange(wanted)` puts them in the first places and copies only those that were not there: a batch whose members
    stay the same copies nothing.
    """

    def __init__(self, shapes: dict[Key, tuple[int, tuple[int, ...]]], rank: int, like: torch.Tensor) -> None:
        """`shapes`: inputs, and the outputs of each module, of each joined projection."""
        self.rank, self._shapes, self._like = rank, shapes, like
        self._tensors: dict[Key, Parts] = {}
        self._packed: dict[Key, PackedParts] = {}
        self._members: list[Prepared] = []
        self._room = self._steady = 0  # steps since the members changed

    def arrange(self, wanted: Sequence[Prepared]) -> list[Prepared]:
        """The members in their order afterwards; `wanted` holds each once."""
        if {w.digest for w in wanted} == {m.digest for m in self._members}:
            self._steady += 1
            if self._steady == PACK_AFTER:
                self._pack()
            return list(self._members)
        self._packed, self._steady = {}, 0
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

    def get(self, key: Key) -> Parts:
        """A [places, k r, in] and the k B's [places, r, out]; a lone member has an idle place beside it."""
        a, bs = self._tensors[key]
        return a[: self.places], tuple(b[: self.places] for b in bs)

    def get_packed(self, key: Key) -> PackedParts:
        """Where `is_packed`: A's rows by module, then by place; B's columns by place."""
        return self._packed[key]

    @property
    def is_packed(self) -> bool:
        return bool(self._packed)

    @property
    def places(self) -> int:
        """At least 2: a stack of one rounds otherwise."""
        return max(2, len(self._members))

    def changes(self, key: Key) -> bool:
        return any(key in m.parts for m in self._members)

    def clear(self) -> None:
        self._tensors, self._packed, self._members, self._room = {}, {}, [], 0

    def _pack(self) -> None:
        size = sum(_size(t) for key in self._tensors for a, bs in (self.get(key),) for t in (a, *bs))
        if size > _PACKED_BYTES or not can_pack(self._like.device, self._like.dtype):
            return
        found: dict[Key, PackedParts] = {}
        for key in filter(self.changes, self._tensors):
            a, bs = self.get(key)
            by_module = a.view(self.places, len(bs), self.rank, -1).transpose(0, 1).flatten(0, 2)
            one, others = packed(by_module), [packed(b.flatten(0, 1).t().contiguous()) for b in bs]
            if one is None or None in others:
                return
            found[key] = one, tuple(b for b in others if b is not None)
        self._packed = found

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


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
