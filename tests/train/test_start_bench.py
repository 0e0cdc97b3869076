"""benchmarks/start.py with the tiny model: it stops each run at its first step, and says why one never came there."""

from __future__ import annotations

import pytest


@pytest.fixture
def bench(benchmark_script):
    return benchmark_script("start")


def test_it_times_the_first_step_of_a_run(bench, monkeypatch):
    seen = []
    real = bench.first_step

    def kept(model, data, run):
        seconds = real(model, data, run)
        seen.append((seconds, (run / "metrics.jsonl").read_text().count('"loss"')))
        return seconds

    monkeypatch.setattr(bench, "first_step", kept)
    line = bench.main(["--dry", "--model", "tiny", "--rounds", "1"])
    assert len(seen) == 2  # the first fills the caches
    assert line["values"]["seconds_to_first_step"]["median"] == seen[1][0] > 0.5  # python and torch alone take longer
    assert 1 <= seen[1][1] < 100


def test_a_run_that_ends_before_says_why(bench, tmp_path):
    with pytest.raises(SystemExit, match=r"(?s)ended with 2: .*no train.jsonl here"):
        bench.first_step("no-such-model", tmp_path, tmp_path / "run")
