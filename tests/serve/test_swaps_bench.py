"""benchmarks/swaps.py with the tiny model: nothing lost where nothing is, and what is lost or mixed is counted."""

from __future__ import annotations

import argparse

import pytest


@pytest.fixture
def bench(benchmark_script):
    return benchmark_script("swaps")


def test_moves_under_streams_of_the_tiny_model(bench):
    asked = [
        "--model",
        "tiny",
        "--dtype",
        "float32",
        "--moves",
        "12",
        "--streams",
        "3",
        "--tokens",
        "6",
        "--pause",
        "0.02",
    ]
    found = bench.measure(bench.arguments(asked))
    assert (found["failed"], found["mixed"], found["moves_refused"], found["exit_code"]) == (0, 0, 0, 0)
    assert found["answers"] >= 3
    assert sum(found["answers_by_adapter"]) == found["answers"]


class Fake:
    """Adapters answer with their names; every stream of the alias gives `told`."""

    def __init__(self, *told):
        self.told = list(told)

    def stream(self, name, tokens):
        return ({f"digest-{name}"}, name, True) if name != "prod" else self.told.pop() if self.told else self.fine

    fine = ({"digest-a"}, "a", True)

    def move(self, name):
        return name != "b"


def test_a_lost_a_mixed_and_a_wrong_answer_are_counted(bench, capsys):
    args = argparse.Namespace(tokens=4, moves=3, streams=1, pause=0.05)
    two, wrong, cut = ({"digest-a", "digest-b"}, "a", True), ({"digest-b"}, "a", True), ({"digest-c"}, "c", False)
    found = bench.under_load(Fake(two, wrong, cut), args)
    assert (found["failed"], found["mixed"], found["moves_refused"]) == (1, 2, 1)
    assert "failed: c" in capsys.readouterr().err
