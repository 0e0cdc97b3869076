"""Many short rows -> few full packs, no pad token.

    rows (tokens)   5 9 3 7 4          max_tokens 12
    longest first   9 7 5 4 3
    packs           [9] [7 5] [4 3]    like lengths stand together; the first pack holds the longest row

A pack is one micro-batch. How a step's rows are cut into packs changes no gradient, only speed and memory.

With shared prefixes the rows of one question keep together, and what they have in common is computed once:

    question 5, answers 4 and 3 (tokens)      [5 + 4 + 3] in place of [9] [8]
    a system prompt that all rows of a pack begin with stands once before all of it
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..core import IGNORE, Pack, TokenizedExample
from ..errors import DataError

Rows = Sequence[TokenizedExample]

_LEAST_SHARED = 16  # tokens: a shorter common beginning costs more in attention calls than it spares


def pack(rows: Rows, *, max_tokens: int, shared_prefixes: bool = False) -> tuple[Pack, ...]:
    """Cut `rows` into packs of at most `max_tokens` tokens; a single longer row stands alone.

    Deterministic: the order depends on the rows' lengths and, for equal lengths, on their order.
    """
    units = _units(rows, max_tokens) if shared_prefixes else [[row] for row in rows]
    lay = _lay_tree if shared_prefixes else make_pack
    packs: list[Pack] = []
    current: list[TokenizedExample] = []
    tokens = 0
    for unit in sorted(units, key=_unit_tokens, reverse=True):
        size = _unit_tokens(unit)
        if current and tokens + size > max_tokens:
            packs.append(lay(current))
            current, tokens = [], 0
        current += unit
        tokens += size
    if current:
        packs.append(lay(current))
    return tuple(packs)


def make_pack(rows: Rows) -> Pack:
    """Lay rows end to end (core.Pack draws the picture). Raises DataError for an empty list or an empty row."""
    _check(rows)
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


def _check(rows: Rows) -> None:
    if not rows or any(len(r) == 0 for r in rows):
        raise DataError(f"a pack needs rows with tokens; got {[len(r) for r in rows]} tokens")


# ---- shared prefixes -------------------------------------------------------------------------------------------------


def by_question(rows: Rows) -> list[list[int]]:
    """Places of the rows of each question, in the order in which the questions come. (No id: a question of its own.)"""
    groups: dict[str | int, list[int]] = {}
    for i, row in enumerate(rows):
        groups.setdefault(row.question_id or i, []).append(i)
    return list(groups.values())


def _units(rows: Rows, max_tokens: int) -> list[list[TokenizedExample]]:
    """Rows that are laid down together: those of a question, as long as they fit into one pack."""
    units: list[list[TokenizedExample]] = []
    for places in by_question(rows):
        unit: list[TokenizedExample] = []
        for row in (rows[i] for i in places):
            if unit and (not _shared([*unit, row]) or _unit_tokens([*unit, row]) > max_tokens):
                units.append(unit)
                unit = []
            unit.append(row)
        units.append(unit)
    return units


def _unit_tokens(unit: Rows) -> int:
    return sum(len(r) for r in unit) - (len(unit) - 1) * _shared(unit)


def _shared(rows: Rows) -> int:
    """How many tokens all rows begin with, before the first taught one; 0 where it is too few to be worth it."""
    if len(rows) < 2:
        return 0
    first = rows[0].input_ids
    common = min(int(np.argmax(r.labels != IGNORE)) if (r.labels != IGNORE).any() else len(r) - 1 for r in rows)
    for row in rows[1:]:
        differs = first[:common] != row.input_ids[:common]
        common = int(np.argmax(differs)) if differs.any() else common
    return common if common >= _LEAST_SHARED else 0


def _lay_tree(rows: Rows) -> Pack:
    """Rows of one pack with what they share laid down once: the beginning of all, then that of each question."""
    _check(rows)
    tree = _Tree()
    of_all = _shared(rows)
    root = tree.add(rows[0].input_ids[:of_all], -1, 0) if of_all else -1
    for places in by_question(rows):
        unit = [rows[i] for i in places]
        begin = max(_shared(unit), of_all)
        trunk = tree.add(unit[0].input_ids[of_all:begin], root, of_all) if begin > of_all else root
        for row in unit:
            tree.add_row(row, begin, trunk)
    return tree.pack()


class _Tree:
    """Parts in the order they are laid down; each knows the part that it continues."""

    def __init__(self) -> None:
        self.ids: list[np.ndarray] = []
        self.positions: list[np.ndarray] = []
        self.parents: list[int] = []
        self.ends: list[int] = []  # where each part ends in the pack
        self.predict_at: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.example_ids: list[str] = []

    def add(self, ids: np.ndarray, parent: int, position: int) -> int:
        self.ids.append(ids)
        self.positions.append(np.arange(position, position + len(ids)))
        self.parents.append(parent)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(ids))
        return len(self.ids) - 1

    def add_row(self, row: TokenizedExample, begin: int, trunk: int) -> None:
        """The rest of `row` from `begin` on. What is before it is not taught, but its last token may predict."""
        part = self.add(row.input_ids[begin:], trunk, begin)
        taught = np.flatnonzero(row.labels[1:] != IGNORE)
        start = self.ends[part] - (len(row) - begin)
        at_trunk = self.ends[trunk] - 1 if trunk >= 0 else -1
        self.predict_at.append(np.where(taught >= begin, start + taught - begin, at_trunk))
        self.targets.append(row.labels[1:][taught])
        self.example_ids.append(row.id)

    def pack(self) -> Pack:
        shares = any(parent >= 0 for parent in self.parents)
        return Pack(
            input_ids=np.concatenate(self.ids).astype(np.int32),
            position_ids=np.concatenate(self.positions).astype(np.int32),
            row_lengths=tuple(len(ids) for ids in self.ids),
            predict_at=np.concatenate(self.predict_at).astype(np.int32),
            targets=np.concatenate(self.targets).astype(np.int32),
            example_ids=tuple(self.example_ids),
            parents=tuple(self.parents) if shares else (),
        )
