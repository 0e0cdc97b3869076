"""Many short rows -> few full packs, no pad token.

    rows (tokens)   5 9 3 7 4          max_tokens 12
    longest first   9 7 5 4 3
    packs           [9] [7 5] [4 3]    like lengths stand together; the first pack holds the longest row

A pack is one micro-batch. How a step's rows are cut into packs changes no gradient, only speed and memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core import IGNORE, Pack, TokenizedExample
from ..errors import DataError


def pack(rows: Sequence[TokenizedExample], *, max_tokens: int) -> tuple[Pack, ...]:
    """Cut `rows` into packs of at most `max_tokens` tokens; a single longer row stands alone.

    Deterministic: the order depends on the rows' lengths and, for equal lengths, on their order.
    """
    packs: list[Pack] = []
    current: list[TokenizedExample] = []
    tokens = 0
    for row in sorted(rows, key=len, reverse=True):
        if current and tokens + len(row) > max_tokens:
            packs.append(make_pack(current))
            current, tokens = [], 0
        current.append(row)
        tokens += len(row)
    if current:
        packs.append(make_pack(current))
    return tuple(packs)


def make_pack(rows: Sequence[TokenizedExample]) -> Pack:
    """Lay rows end to end (core.Pack draws the picture). Raises DataError for an empty list or an empty row."""
    if not rows or any(len(r) == 0 for r in rows):
        raise DataError(f"a pack needs rows with tokens; got {[len(r) for r in rows]} tokens")
    starts = np.cumsum([0, *(len(r) for r in rows)])
    predict_at, targets = [], []
    for start, row in zip(starts, rows, strict=False):
        taught = np.flatnonzero(row.labels[1:] != IGNORE)  # the token before a taught one predicts it
        predict_at.append(start + taught)
        targets.append(row.labels[1:][taught])
    return Pack(
        input_ids=np.concatenate([r.input_ids for r in rows]).astype(np.int32),
        position_ids=np.concatenate([np.arange(len(r)) for r in rows]).astype(np.int32),
        row_lengths=tuple(len(r) for r in rows),
        predict_at=np.concatenate(predict_at).astype(np.int32),
        targets=np.concatenate(targets).astype(np.int32),
        example_ids=tuple(r.id for r in rows),
    )
