"""Adapters of an engine: thousands on disk, those in use in memory, those of a step added to the base's products.

    AdapterStore   name -> LowRank -> Prepared (in the base's dtype, on its device), within a budget
    Adding         Prepared, and whose each row is -> y += what the rows' adapters change

Two ways of adding: row by row on a CPU (row_wise.py), stacked side by side elsewhere (stacked.py).

Projections that read the same input share one A, its rows below each other; each keeps a B of its own:

    qkv   A = [A_q; A_k; A_v]      x A' = [s_q  s_k  s_v]      y_q += s_q B_q'   y_k += s_k B_k'   y_v += s_v B_v'

(One block diagonal B for all would be one product, but two thirds of what it reads are zeros.)
"""

from __future__ import annotations

import functools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from ..errors import AdapterError
from ..lora.low_rank import LowRank

# Name of the joined projection -> its modules in a decoder's layer, in the order of the joined weight's rows.
JOINED = {
    "qkv": ("q_proj", "k_proj", "v_proj"),
    "out": ("o_proj",),
    "gate_up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}
_PLACE = re.compile(r"(?:^|\.)layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)$")
Key = tuple[int, str]  # layer, name of the joined projection
Shapes = Mapping[Key, tuple[int, tuple[int, ...]]]  # inputs, and the outputs of each module, of each joined projection
Matrices = tuple[torch.Tensor, tuple[torch.Tensor, ...]]  # A [modules r, in], a B [r, out] of each module


@dataclass(frozen=True, slots=True)
class Prepared:
    """One adapter ready for use. `parts`: its matrices of each joined projection that it changes, as the way of adding
    wants them; zeros for a module of it that it does not."""

    digest: str
    rank: int
    parts: Mapping[Key, Any]
    pairs: LowRank  # by module, for the plain way; empty where `parts` serve
    nbytes: int


class Adding(Protocol):
    """How a step's adapters are added to the base's products. What `of_rows` and `alone` give is `whose` of `add`."""

    def prepare(self, digest: str, pairs: LowRank) -> Prepared: ...

    def places(self, adapters: Sequence[Prepared]) -> dict[str, Any]:
        """Digest -> where its rows stand in a step, to be sorted by; `adapters` holds each once."""

    def of_rows(self, adapters: Sequence[Prepared]) -> Any:
        """Of a step whose first rows have these adapters, in the order of `places`."""

    def alone(self, adapter: Prepared, count: int) -> Any:
        """Of `count` rows of a prompt."""

    def add(self, y: torch.Tensor, x: torch.Tensor, key: Key, whose: Any) -> torch.Tensor:
        """To y [rows, out], in place, what the adapters make of x [rows, in]."""

    def clear(self) -> None:
        """Give back what only running requests need."""


def joined_matrices(pairs: LowRank, shapes: Shapes) -> tuple[int, dict[Key, Matrices]]:
    """The largest rank, to which all are filled up with zeros, and the matrices by joined projection; float32, or
    float64 where a pair is. Raises AdapterError for a module that is no projection of a decoder's layer."""
    rank = max(len(pair.a) for pair in pairs.values())
    grouped: dict[Key, dict[str, Any]] = {}
    for path, pair in pairs.items():
        found = _PLACE.search(path)
        joined = next((j for j, modules in JOINED.items() if found and found[2] in modules), None)
        if found is None or joined is None:
            raise AdapterError(f"{path} is no projection of a decoder's layer")
        grouped.setdefault((int(found[1]), joined), {})[found[2]] = pair
    matrices = {}
    for key, modules in grouped.items():
        inner, outs = shapes[key]
        dtypes = [m.dtype for pair in modules.values() for m in (pair.a, pair.b)]
        like = torch.empty(0, dtype=functools.reduce(torch.promote_types, dtypes, torch.float32))
        a, bs = like.new_zeros(len(outs) * rank, inner), tuple(like.new_zeros(rank, out) for out in outs)
        for i, (name, b) in enumerate(zip(JOINED[key[1]], bs, strict=True)):
            if name in modules:
                pair = modules[name]
                a[i * rank : i * rank + len(pair.a)] = pair.a
                b[: len(pair.a)] = pair.b.T
        matrices[key] = a, bs
    return rank, matrices


def prepare_plain(digest: str, pairs: LowRank, dtype: torch.dtype, device: torch.device) -> Prepared:
    moved = {p: type(pair)(pair.a.to(device, dtype), pair.b.to(device, dtype)) for p, pair in pairs.items()}
    rank = max(len(pair.a) for pair in pairs.values())
    return Prepared(digest, rank, {}, moved, sum(size_of(t) for pair in moved.values() for t in pair))


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


def size_of(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
