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


# ---- shared prefixes -------------------------------------------------------------------------------------------------

QUESTION = list(range(100, 120))  # 20 tokens: enough to be shared


def answered(number: int, question: list[int], answer: list[int], system: tuple[int, ...] = ()) -> TokenizedExample:
    prompt = [*system, *question]
    labels = np.array([IGNORE] * len(prompt) + answer, np.int32)
    ids = np.array(prompt + answer, np.int32)
    return TokenizedExample(ids, labels, str(number), question_id=str(question))


def unrolled(packed) -> dict[str, tuple[list[int], list[int]]]:
    """Of each row: its tokens and positions, read back along the tree."""
    ends = np.cumsum(packed.row_lengths)
    parents = packed.parents or (-1,) * len(packed.row_lengths)
    out = {}
    for name, leaf in zip(packed.example_ids, (i for i in range(len(parents)) if i not in parents), strict=True):
        line = [leaf]
        while parents[line[0]] >= 0:
            line.insert(0, parents[line[0]])
        places = [t for i in line for t in range(ends[i] - packed.row_lengths[i], ends[i])]
        out[name] = (packed.input_ids[places].tolist(), packed.position_ids[places].tolist())
    return out


def test_the_picture_of_a_pack_with_shared_prefixes() -> None:
    rows = [answered(0, QUESTION, [8, 2]), answered(1, QUESTION, [9, 4, 2])]
    (packed,) = pack(rows, max_tokens=100, shared_prefixes=True)
    assert packed.input_ids.tolist() == [*QUESTION, 8, 2, 9, 4, 2]
    assert packed.row_lengths == (20, 2, 3)
    assert packed.parents == (-1, 0, 0)
    assert packed.position_ids.tolist() == [*range(20), 20, 21, 20, 21, 22]
    assert packed.predict_at.tolist() == [19, 20, 19, 22, 23]
    assert packed.targets.tolist() == [8, 2, 9, 4, 2]
    assert packed.example_ids == ("0", "1")


def test_a_system_prompt_stands_once_before_all_questions() -> None:
    system = tuple(range(200, 216))
    other = [7] * 20
    rows = [
        answered(0, QUESTION, [8, 2], system),
        answered(1, other, [5, 2], system),
        answered(2, QUESTION, [9, 2], system),
    ]
    (packed,) = pack(rows, max_tokens=200, shared_prefixes=True)
    assert packed.tokens == 16 + 20 + 2 + 2 + 22
    assert packed.parents[0] == -1
    assert set(packed.parents[1:]) == {0, 1} or set(packed.parents[1:]) == {0, 2}
    for row in rows:
        assert unrolled(packed)[row.id] == (row.input_ids.tolist(), list(range(len(row))))


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), min_size=1, max_size=20),
    st.integers(10, 200),
    st.booleans(),
)
def test_every_row_can_be_read_back_from_the_tree(drawn, max_tokens: int, has_system: bool) -> None:
    system = tuple(range(300, 320)) if has_system else ()
    questions = [[10 + q] * (5 + 9 * q) for q in range(4)]  # one of them too short to be shared
    rows = [answered(i, questions[q], [400 + i] * n + [2], system) for i, (q, n) in enumerate(drawn)]
    packs = pack(rows, max_tokens=max_tokens, shared_prefixes=True)
    back = {name: what for p in packs for name, what in unrolled(p).items()}
    assert sorted(back) == sorted(r.id for r in rows)
    for r in rows:
        assert back[r.id] == (r.input_ids.tolist(), list(range(len(r))))
    assert sum(p.supervised_tokens for p in packs) == sum(r.supervised_tokens for r in rows)
    assert all(p.tokens <= max_tokens or len(p.example_ids) == 1 for p in packs)
    assert sum(p.tokens for p in packs) <= sum(len(r) for r in rows)


def test_rows_that_share_nothing_lie_as_without() -> None:
    rows = [answered(i, [50 + i] * 20, [8, 2]) for i in range(5)]
    for one, other in zip(pack(rows, max_tokens=50), pack(rows, max_tokens=50, shared_prefixes=True), strict=True):
        assert other.parents == ()
        assert one.input_ids.tolist() == other.input_ids.tolist()
        assert one.predict_at.tolist() == other.predict_at.tolist()
