"""The stream gives every row once an epoch, in an order that only the seed decides, and goes on exactly."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_cmqa.core import IGNORE, Batch, TokenizedExample
from lora_cmqa.data.stream import BatchStream
from lora_cmqa.errors import DataError, RunError


def rows(count: int, seed: int = 0) -> list[TokenizedExample]:
    random = np.random.default_rng(seed)
    out = []
    for number in range(count):
        ids = random.integers(0, 99, random.integers(2, 20)).astype(np.int32)
        labels = np.where(np.arange(len(ids)) < len(ids) // 2, IGNORE, ids).astype(np.int32)
        out.append(TokenizedExample(ids, labels, str(number), str(number)))
    return out


def stream(count: int = 23, **settings: Any) -> BatchStream:
    return BatchStream(rows(count), **{"rows_per_step": 4, "max_tokens": 32, "seed": 7, **settings})


def as_bytes(batch: Batch) -> tuple:
    parts = [
        (p.input_ids.tobytes(), p.position_ids.tobytes(), p.predict_at.tobytes(), p.targets.tobytes(), p.example_ids)
        for p in batch.packs
    ]
    return batch.step, batch.epoch, batch.step_supervised_tokens, parts


def test_every_row_once_an_epoch_and_each_epoch_in_another_order() -> None:
    batches = [b for b, _ in stream(num_train_epochs=2)]
    ids = [b.example_ids for b in batches]
    assert len(ids) == 12
    for epoch in (ids[:6], ids[6:]):
        assert sorted(int(i) for step in epoch for i in step) == list(range(23))
    assert [sorted(s) for s in ids[:6]] != [sorted(s) for s in ids[6:]]
    assert [len(s) for s in ids[:6]] == [4, 4, 4, 4, 4, 3]
    assert [b.step for b in batches] == list(range(1, 13))
    assert [b.epoch for b in batches][5::6] == [1.0, 2.0]


def test_the_order_is_numpys_permutation_of_seed_and_epoch() -> None:
    expected = np.random.Generator(np.random.PCG64([7, 1])).permutation(23)
    batches = [b for b, _ in stream(num_train_epochs=2)]
    assert set(batches[6].example_ids) == {str(i) for i in expected[:4]}


@pytest.mark.parametrize(
    ("epochs", "max_steps", "steps"), [(1, -1, 6), (0.5, -1, 3), (1.1, -1, 7), (2.5, -1, 15), (5, 4, 4), (1, 9, 9)]
)
def test_total_steps(epochs: float, max_steps: int, steps: int) -> None:
    s = stream(num_train_epochs=epochs, max_steps=max_steps)
    assert s.total_steps == steps == len(list(s))


@settings(deadline=None, max_examples=40)
@given(count=st.integers(1, 30), per_step=st.integers(1, 9), stop=st.integers(0, 30), seed=st.integers(0, 2**32))
def test_resumed_equals_uninterrupted(count: int, per_step: int, stop: int, seed: int) -> None:
    def fresh() -> BatchStream:
        return stream(count, rows_per_step=per_step, num_train_epochs=2.5, seed=seed)

    whole = list(fresh())
    stop = min(stop, len(whole) - 1)
    state = json.loads(json.dumps(whole[stop][1]))
    second = fresh()
    second.resume(state)
    rest = list(second)
    assert [as_bytes(b) for b, _ in rest] == [as_bytes(b) for b, _ in whole[stop + 1 :]]
    assert [s for _, s in rest] == [s for _, s in whole[stop + 1 :]]


@settings(deadline=None, max_examples=40)
@given(world_size=st.integers(1, 4), count=st.integers(1, 30), max_tokens=st.integers(8, 200))
def test_the_union_over_ranks_is_the_step(world_size: int, count: int, max_tokens: int) -> None:
    one = [b for b, _ in stream(count)]
    ranks = [
        [b for b, _ in stream(count, rank=r, world_size=world_size, max_tokens=max_tokens)] for r in range(world_size)
    ]
    for step, parts in zip(one, zip(*ranks, strict=True), strict=True):
        assert sorted(i for b in parts for i in b.example_ids) == sorted(step.example_ids)
        assert sum(b.supervised_tokens for b in parts) == step.supervised_tokens
        assert {b.step_supervised_tokens for b in parts} == {step.supervised_tokens}


def test_an_order_given_by_hand() -> None:
    ids = [set(b.example_ids) for b, _ in stream(4, rows_per_step=2, order=[3, 1, 0, 2], num_train_epochs=2)]
    assert ids == [{"3", "1"}, {"0", "2"}] * 2


def test_a_state_of_other_rows_is_refused() -> None:
    _, state = next(iter(stream()))
    with pytest.raises(RunError, match="23 then, 22 now"):
        stream(22).resume(state)
    with pytest.raises(RunError, match="seed"):
        stream(seed=8).resume(state)
    other = BatchStream([*rows(22), rows(23, seed=1)[22]], rows_per_step=4, max_tokens=32, seed=7)
    with pytest.raises(RunError):
        other.resume(state)
    same_lengths = [TokenizedExample(r.input_ids[::-1].copy(), r.labels, r.id, r.question_id) for r in rows(23)]
    with pytest.raises(RunError, match="sha256"):
        BatchStream(same_lengths, rows_per_step=4, max_tokens=32, seed=7).resume(state)


def test_what_cannot_be_streamed() -> None:
    with pytest.raises(DataError):
        BatchStream([], rows_per_step=4, max_tokens=32)
    with pytest.raises(DataError, match="5 ranks"):
        stream(world_size=5)


# ---- shared prefixes -------------------------------------------------------------------------------------------------


def questions(answers: list[int]) -> list[TokenizedExample]:
    return [
        TokenizedExample(np.array([*range(20), n, q]), np.array([IGNORE] * 20 + [n, q]), f"{q}.{n}", f"q{q}")
        for q, count in enumerate(answers)
        for n in range(count)
    ]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=30), st.integers(1, 6), st.integers(1, 3))
def test_a_question_stays_in_one_step_and_no_step_is_empty(answers, rows_per_step, epochs) -> None:
    rows_ = questions(answers)
    shared = BatchStream(
        rows_, rows_per_step=rows_per_step, max_tokens=100, num_train_epochs=epochs, shared_prefixes=True
    )
    plain = BatchStream(rows_, rows_per_step=rows_per_step, max_tokens=100, num_train_epochs=epochs)
    assert shared.total_steps == plain.total_steps
    ids = [b.example_ids for b, _ in shared]
    assert all(ids)
    for epoch in range(epochs):
        steps = ids[epoch * shared.steps_per_epoch : (epoch + 1) * shared.steps_per_epoch]
        assert sorted(i for step in steps for i in step) == sorted(r.id for r in rows_)
        for q, count in enumerate(answers):
            if count <= rows_per_step:
                assert sum(any(i.startswith(f"{q}.") for i in step) for step in steps) == 1
        assert all(len(step) < 2 * rows_per_step for step in steps)


def test_a_resume_goes_on_exactly_with_shared_prefixes_too() -> None:
    settings = {"rows_per_step": 4, "max_tokens": 60, "num_train_epochs": 2, "shared_prefixes": True}
    rows_ = questions([1, 3, 2, 1, 4, 2, 2])
    whole = [as_bytes(b) for b, _ in BatchStream(rows_, **settings)]
    for stop in range(1, len(whole)):
        first = BatchStream(rows_, **settings)
        *_, (_, state) = zip(range(stop), first, strict=False)
        second = BatchStream(rows_, **settings)
        second.resume(json.loads(json.dumps(state[1])))
        assert [as_bytes(b) for b, _ in second] == whole[stop:]
    with pytest.raises(RunError, match="shared_prefixes"):
        BatchStream(rows_, **settings | {"shared_prefixes": False}).resume(state[1])
