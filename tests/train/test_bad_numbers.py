"""A loss or a gradient that is not finite, and one that is far too large."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal

import pytest

from lora_cmqa.errors import RunError
from lora_cmqa.train import loop
from lora_cmqa.train.checkpoint import list_checkpoints
from lora_cmqa.train.loop import train
from lora_cmqa.train.tracking import LossSpikes

from .conftest import in_a_child, outcome, without_time

pytestmark = pytest.mark.usefixtures("one_thread")
REAL = loop.train_step


def poisoned(*steps: int, kill_before: int = 0):
    """train_step whose model has an infinite weight in `steps`."""

    def step(model, batch, *args, **kwargs):
        if batch.step == kill_before:
            os.kill(os.getpid(), signal.SIGKILL)
        if batch.step not in steps:
            return REAL(model, batch, *args, **kwargs)
        head = model.get_base_model().get_output_embeddings().weight
        kept = head.data.clone()
        head.data[7, 0] = math.inf
        result = REAL(model, batch, *args, **kwargs)
        head.data.copy_(kept)
        return result

    return step


def test_a_bad_step_is_not_applied_its_rows_are_named_and_the_run_goes_on(settings, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "train_step", poisoned(3))
    run = train(settings(max_steps=6, save_total_limit=0))
    noted = json.loads((run / "bad-batches" / "step-3.json").read_text())
    assert (noted["step"], len(noted["rows"])) == (3, 4)
    assert set(noted["rows"]) < {f"row-{i}" for i in range(24)}
    assert "step-3.json" in capsys.readouterr().err
    lines = [line for line in without_time(run) if "loss" in line]
    assert [line["loss"] is None for line in lines] == [False, False, True, False, False, False]
    assert json.loads((run / "trainer_state.json").read_text())["bad_steps_in_a_row"] == 0

    monkeypatch.setattr(loop, "train_step", poisoned(2))  # the same run but for the adapter after step 2
    other = train(settings(max_steps=2, output_dir=str(tmp_path / "other")))
    monkeypatch.setattr(loop, "train_step", poisoned())
    good = train(settings(max_steps=2, output_dir=str(tmp_path / "good")))
    assert outcome(other)["adapter"] != outcome(good)["adapter"]


def test_a_run_with_a_bad_step_resumes_exactly(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", poisoned(3, 5))
    to_the_end = outcome(train(settings(max_steps=6, output_dir=str(tmp_path / "whole"))))

    def child():
        loop.train_step = poisoned(3, 5, kill_before=6)
        train(settings(max_steps=6))

    assert in_a_child(child) == -signal.SIGKILL
    assert outcome(train(settings(max_steps=6))) == to_the_end


def test_too_many_bad_steps_in_a_row_end_the_run_at_a_good_checkpoint(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "train_step", poisoned(2, 4, 5, 6, 7))
    config = settings(max_steps=8, max_bad_steps=2, save_total_limit=0)
    with pytest.raises(RunError, match="3 steps in a row"):  # one at 2 did not count
        train(config)
    run = tmp_path / "run"
    assert sorted(p.name for p in (run / "bad-batches").iterdir()) == [f"step-{i}.json" for i in (2, 4, 5, 6)]
    assert [c.name for c in list_checkpoints(run)] == ["checkpoint-2", "checkpoint-4"]
    monkeypatch.setattr(loop, "train_step", REAL)
    train(config)  # the cause mended, it goes on from there
    assert [line["step"] for line in without_time(run) if "loss" in line] == list(range(1, 9))


def test_bad_steps_in_a_row_are_counted_across_a_resume(settings):
    """Of 4, 5 and 6 the first is in the checkpoint that is resumed."""

    def child():
        loop.train_step = poisoned(4, 5, 6, kill_before=6)
        train(settings(max_steps=8, max_bad_steps=2))

    def resumed():
        loop.train_step = poisoned(4, 5, 6)
        train(settings(max_steps=8, max_bad_steps=2))

    assert in_a_child(child) == -signal.SIGKILL
    assert in_a_child(resumed) == RunError.exit_code


# ---- spikes ------------------------------------------------------------------------------------------------------


def test_a_spike_stands_far_above_the_last_losses():
    spikes = LossSpikes([3.0, None] * 15)
    assert spikes.see(50.0) is None  # 15 losses are too few to call one unusual
    spikes = LossSpikes([3.0 + 0.1 * (i % 3) for i in range(20)])
    assert [spikes.see(x) for x in (3.3, 3.9, 4.1, math.nan, 2.0)] == [None, None, pytest.approx(3.1), None, None]
    falling = LossSpikes([5.0 - 0.1 * i for i in range(30)])
    assert falling.see(2.2) is None
    assert LossSpikes([2.0] * 40).see(2.2) is None  # a flat start is no reason to call 10 % a spike
    assert LossSpikes([2.0] * 40).see(2.3) == 2.0


def test_a_spike_is_told_once_and_also_after_a_resume(settings, monkeypatch, capfd):
    def spiking(model, batch, *args, **kwargs):
        result = REAL(model, batch, *args, **kwargs)
        return dataclasses.replace(result, loss=30.0) if batch.step == 5 else result

    def child():
        loop.train_step = lambda model, batch, *a, **k: (
            os.kill(os.getpid(), signal.SIGKILL) if batch.step == 5 else spiking(model, batch, *a, **k)
        )
        train(settings(max_steps=6))

    monkeypatch.setattr(LossSpikes, "NEEDED", 4)
    assert in_a_child(child) == -signal.SIGKILL
    capfd.readouterr()
    monkeypatch.setattr(loop, "train_step", spiking)
    train(settings(max_steps=6))
    told = [line for line in capfd.readouterr().err.splitlines() if "30.0000 where" in line]
    assert len(told) == 1
    assert told[0].startswith("step 5:")
