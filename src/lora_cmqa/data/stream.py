"""Rows -> the batches of a run, each with the place it stands at.

order of epoch e = permutation(PCG64(seed, e))         every row once an epoch
step             = the next rows_per_step rows         the last step of an epoch may hold fewer
batch            = this rank's share of them, packed   rank r takes rows r, r + world_size, ...

for batch, state in BatchStream(...): ...      saving `state` is enough to go on exactly
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
from .pack import pack


class BatchStream:
    """`rows_per_step` = per_device_train_batch_size x gradient_accumulation_steps x world_size.

    num_train_epochs  may be a fraction; max_steps > 0 wins over it
    order             rows of every epoch in this order instead of the seeded one (for comparisons with other trainers)
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
    ) -> None:
        if not rows:
            raise DataError("no row is left to train on", hint="See the counts of dropped rows above.")
        if rows_per_step < world_size:
            raise DataError(f"a step of {rows_per_step} rows cannot be shared by {world_size} ranks")
        self.rows, self.rows_per_step, self.max_tokens = rows, rows_per_step, max_tokens
        self.seed, self.rank, self.world_size, self.order = seed, rank, world_size, order
        self.steps_per_epoch = math.ceil(len(rows) / rows_per_step)
        by_epochs = math.ceil(num_train_epochs * self.steps_per_epoch - 1e-9)
        self.total_steps = max_steps if max_steps > 0 else max(1, by_epochs)
        self._step = 0  # steps given out so far

    @property
    def state(self) -> dict[str, Any]:
        """Where the stream stands, as JSON; `rows_sha256` ties it to the very tokens and labels."""
        return {
            "step": self._step,
            "seed": self.seed,
            "rows": len(self.rows),
            "rows_per_step": self.rows_per_step,
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
        self.max_tokens = max_tokens
        return self._batch(self._step - 1)

    def _batch(self, index: int) -> Batch:
        epoch, place = divmod(index, self.steps_per_epoch)
        order = self._order_of(epoch)
        chosen = order[place * self.rows_per_step : (place + 1) * self.rows_per_step]
        step_rows = [self.rows[i] for i in chosen]
        mine = step_rows[self.rank :: self.world_size]
        return Batch(
            packs=pack(mine, max_tokens=self.max_tokens),
            step=index + 1,
            epoch=epoch + min((place + 1) * self.rows_per_step, len(self.rows)) / len(self.rows),
            step_supervised_tokens=sum(r.supervised_tokens for r in step_rows),
        )

    def _order_of(self, epoch: int) -> Sequence[int]:
        if self.order is not None:
            return self.order
        cached = getattr(self, "_cached_order", None)
        if cached is None or cached[0] != epoch:
            generator = np.random.Generator(np.random.PCG64([self.seed, epoch]))
            cached = self._cached_order = (epoch, generator.permutation(len(self.rows)).tolist())
        return cached[1]


def rows_sha256(rows: Iterable[TokenizedExample]) -> str:
    """Of the very tokens and labels, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(len(row).to_bytes(8, "little"))
        digest.update(row.input_ids.tobytes())
        digest.update(row.labels.tobytes())
    return digest.hexdigest()
