"""benchmarks/kill.py on a few kills: what it counts is what happened."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def kill(benchmark_script):
    return benchmark_script("kill")


def test_case_37_six_kills_at_random_moments(kill, tmp_path):
    """Whether one of six falls inside a save is the machine's chance; test_exact.py places kills there."""
    values = kill.kill_many(6, seed=1, folder=tmp_path)
    assert values["kills"] == values["identical"] == 6
    assert values["inside_saves"] + values["inside_steps"] + values["before_the_first_step"] == 6
    assert sum(values["killed_after_step"].values()) == 6


def test_a_run_that_ends_otherwise_is_counted(kill, tmp_path, monkeypatch):
    """With dropout's random state not put back the end is another one."""
    monkeypatch.setattr(kill.loop, "restore_rng_state", lambda *_: None)
    moment = kill.Moment("step", kill.STEPS - 1, 0.0)
    monkeypatch.setattr(kill, "draw", lambda *_: moment)
    assert kill.kill_many(1, seed=1, folder=tmp_path)["identical"] == 0
