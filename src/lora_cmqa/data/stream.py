"""Rows -> the batches of a run, each with the place it stands at.

order of epoch e = permutation(PCG64(seed, e))         every row once an epoch
step             = the next rows_per_step rows         the last step of an epoch may hold fewer
batch            = this rank's share of them, packed   rank r takes rows r, r + world_size, ...

for batch, state in BatchStream(...): ...      saving `state` is enough to go on exactly

With shared prefixes a question with all its answers is what is shuffled, and stays in one step:

    rows_per_step 4     questions of 1 3 2 1 1 answers, in the epoch's order
    rows up to each     1 4 6 7 8
    step of each        0 0 1 1 1      the one in which its last row falls: there are as many steps as without
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from ..core import Batch, TokenizedExample
from ..errors import DataError, RunError
from .pack import by_question, pack

_LOOKED_AT = 1024  # longest rows, among which the fullest micro-batch is sought


class BatchStream:
    """`rows_per_step` = per_device_train_batch_size x gradient_accumulation_steps x world_size.

    num_train_epochs  may be a fraction; max_steps > 0 wins over it
    order             rows of every epoch in this order instead of the seeded one (for comparisons with other trainers)
    shared_prefixes   what rows of a pack have in common is computed once; not with `order`
    cuts              (step, max_tokens): from that step on, packs are at most so large; `recut` adds to it
    """

    def __init__(
        self,
        rows: Sequence[TokenizedExample],
        *,
        rows_per_step: int,
        max_tokens: int,
        num_train_epochs: float = 1.0,
        max_steps: int = -1,
        seed: int = 42,
        rank: int = 0,
        world_size: int = 1,
        order: Sequence[int] | None = None,
        shared_prefixes: bool = False,
    ) -> None:
        if not rows:
            raise DataError("no row is left to train on", hint="See the counts of dropped rows above.")
        if rows_per_step < world_size:
            raise DataError(f"a step of {rows_per_step} rows cannot be shared by {world_size} ranks")
        self.rows, self.rows_per_step, self.max_tokens = rows, rows_per_step, max_tokens
        self.seed, self.rank, self.world_size, self.order = seed, rank, world_size, order
        self.shared_prefixes = shared_prefixes and order is None
        self.steps_per_epoch = math.ceil(len(rows) / rows_per_step)
        by_epochs = math.ceil(num_train_epochs * self.steps_per_epoch - 1e-9)
        self.total_steps = max_steps if max_steps > 0 else max(1, by_epochs)
        self.cuts: list[tuple[int, int]] = []
        self._step = 0  # steps given out so far

    @property
    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON; `rows_sha256` ties it to the very tokens and labels."""
        return {
            "step": self._step,
            "seed": self.seed,
            "rows": len(self.rows),
            "rows_per_step": self.rows_per_step,
            "shared_prefixes": self.shared_prefixes,
            "rows_sha256": self._rows_sha256,
        }

    @cached_property
    def _rows_sha256(self) -> str:
        return rows_sha256(self.rows)

    def resume(self, state: dict[str, Any]) -> None:
        """Go on after the batch that was given out with `state`. Raises RunError when the rows are other rows."""
        mine = self.state
        differing = [k for k in mine if k != "step" and mine[k] != state.get(k)]
        if differing:
            named = ", ".join(f"{k}: {state.get(k)} then, {mine[k]} now" for k in differing)
            raise RunError(f"the stored place belongs to other data ({named})", hint="Train into another --output-dir.")
        self._step = int(state["step"])

    def __iter__(self) -> Iterator[tuple[Batch, dict[str, Any]]]:
        while self._step < self.total_steps:
            batch = self._batch(self._step)
            self._step += 1
            yield batch, self.state

    def recut(self, max_tokens: int) -> Batch:
        """The batch given out last once more, and all later ones, in packs of at most `max_tokens`: the same rows."""
        self.cuts.append((self._step, max_tokens))
        return self._batch(self._step - 1)

    def max_tokens_at(self, step: int) -> int:
        """The largest pack of that step: the setting, or less from the step on in which the memory ran out."""
        return min([self.max_tokens, *(most for since, most in self.cuts if since <= step)])

    def largest(self) -> Batch:
        """One micro-batch of the fewest, longest rows: about the fullest that any step of the run can hold."""
        longest = sorted(self.rows, key=len, reverse=True)[: max(_LOOKED_AT, self.rows_per_step)]
        packs = [
            p
            for rows in (longest, longest[: self.rows_per_step])
            for p in pack(rows, max_tokens=self.max_tokens_at(1), shared_prefixes=self.shared_prefixes)
            if len(p.example_ids) <= self.rows_per_step
        ]
        fullest = max(packs, key=lambda p: p.tokens)
        return Batch((fullest,), step=0, epoch=0.0, step_supervised_tokens=fullest.supervised_tokens)

    def _batch(self, index: int) -> Batch:
        epoch, place = divmod(index, self.steps_per_epoch)
        steps, rows_done = self._steps_of(epoch)
        units = [[self.rows[i] for i in unit] for unit in steps[place]]
        mine = [row for unit in units[self.rank :: self.world_size] for row in unit]
        return Batch(
            packs=pack(mine, max_tokens=self.max_tokens_at(index + 1), shared_prefixes=self.shared_prefixes),
            step=index + 1,
            epoch=epoch + rows_done[place] / len(self.rows),
            step_supervised_tokens=sum(row.supervised_tokens for unit in units for row in unit),
        )

    def _steps_of(self, epoch: int) -> tuple[list[list[list[int]]], list[int]]:
        """Of each step of an epoch: its units (rows that stay together), and the rows done after it."""
        cached = getattr(self, "_cached_steps", None)
        if cached is None or cached[0] != epoch:
            steps: list[list[list[int]]] = [[] for _ in range(self.steps_per_epoch)]
            done, rows_done = 0, [0] * self.steps_per_epoch
            for unit in self._units_of(epoch):
                done += len(unit)
                place = (done - 1) // self.rows_per_step
                steps[place].append(unit)
                rows_done[place] = done
            cached = self._cached_steps = (epoch, steps, rows_done)
        return cached[1], cached[2]

    def _units_of(self, epoch: int) -> list[list[int]]:
        if self.order is not None:
            return [[i] for i in self.order]
        units = self._questions if self.shared_prefixes else [[i] for i in range(len(self.rows))]
        generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
        return [units[i] for i in generator.permutation(len(units))]

    @cached_property
    def _questions(self) -> list[list[int]]:
        """Rows of each question, at most a step's: with larger units a step could stay empty."""
        most = self.rows_per_step
        return [places[i : i + most] for places in by_question(self.rows) for i in range(0, len(places), most)]


def rows_sha256(rows: Iterable[TokenizedExample]) -> str:
    """Of the very tokens and labels, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.input_ids.tobytes())
        digest.update(row.labels.tobytes())
    return digest.hexdigest()
