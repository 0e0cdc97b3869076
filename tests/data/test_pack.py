"""Packs hold every token of every row once, in order, and know what is taught."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_cmqa.core import IGNORE, TokenizedExample
from lora_cmqa.data.pack import make_pack, pack
from lora_cmqa.errors import DataError


def row(ids: list[int], labels: list[int], name: str = "r") -> TokenizedExample:
    return TokenizedExample(np.array(ids, np.int32), np.array(labels, np.int32), name, name)


@st.composite
def row_lists(draw: st.DrawFn) -> list[TokenizedExample]:
    lengths = draw(st.lists(st.integers(1, 30), min_size=1, max_size=25))
    out = []
    for number, length in enumerate(lengths):
        ids = draw(st.lists(st.integers(0, 500), min_size=length, max_size=length))
        taught = draw(st.lists(st.booleans(), min_size=length, max_size=length))
        out.append(row(ids, [i if t else IGNORE for i, t in zip(ids, taught, strict=True)], str(number)))
    return out


def test_the_picture_of_core_pack() -> None:
    made = make_pack([row([5, 6, 7, 8, 2], [IGNORE] * 3 + [8, 2], "a"), row([5, 9, 4, 2], [IGNORE, IGNORE, 4, 2], "b")])
    assert made.input_ids.tolist() == [5, 6, 7, 8, 2, 5, 9, 4, 2]
    assert made.position_ids.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3]
    assert made.row_lengths == (5, 4)
    assert made.predict_at.tolist() == [2, 3, 6, 7]
    assert made.targets.tolist() == [8, 2, 4, 2]
    assert made.example_ids == ("a", "b")
    assert {made.input_ids.dtype, made.position_ids.dtype, made.predict_at.dtype, made.targets.dtype} == {
        np.dtype(np.int32)
    }


def test_the_first_token_of_a_row_is_predicted_by_nothing() -> None:
    made = make_pack([row([5, 6], [5, 6]), row([7, 8], [7, 8])])
    assert made.predict_at.tolist() == [0, 2]  # never 1, which stands in the row before
    assert made.targets.tolist() == [6, 8]


@given(rows=row_lists(), max_tokens=st.integers(1, 60))
def test_nothing_is_lost_padded_or_moved(rows: list[TokenizedExample], max_tokens: int) -> None:
    packs = pack(rows, max_tokens=max_tokens)
    assert sorted(i for p in packs for i in p.example_ids) == sorted(r.id for r in rows)
    assert sum(p.tokens for p in packs) == sum(len(r) for r in rows)  # computed / real = 1.000
    assert sum(p.supervised_tokens for p in packs) == sum(r.supervised_tokens for r in rows)
    lengths = [n for p in packs for n in p.row_lengths]
    assert lengths == sorted(lengths, reverse=True)
    by_id = {r.id: r for r in rows}
    for p in packs:
        assert p.tokens <= max_tokens or len(p.row_lengths) == 1
        starts = np.cumsum([0, *p.row_lengths])
        for name, start, length in zip(p.example_ids, starts, p.row_lengths, strict=False):
            part = slice(start, start + length)
            assert p.input_ids[part].tolist() == by_id[name].input_ids.tolist()
            assert p.position_ids[part].tolist() == list(range(length))
            mine = (p.predict_at >= start) & (p.predict_at < start + length)
            labels = np.full(length, IGNORE)
            labels[p.predict_at[mine] - start + 1] = p.targets[mine]
            assert labels[1:].tolist() == by_id[name].labels[1:].tolist()


@given(rows=row_lists())
def test_the_same_rows_make_the_same_packs(rows: list[TokenizedExample]) -> None:
    first, second = pack(rows, max_tokens=40), pack(rows, max_tokens=40)
    assert [p.example_ids for p in first] == [p.example_ids for p in second]


def test_no_rows_no_pack() -> None:
    assert pack([], max_tokens=8) == ()
    with pytest.raises(DataError):
        make_pack([])
    with pytest.raises(DataError, match="tokens"):
        make_pack([row([], [])])
