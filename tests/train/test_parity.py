"""benchmarks/parity.py with the tiny model: both trainers learn, and learn the same."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture
def parity(benchmark_script):
    return benchmark_script("parity")


@pytest.mark.usefixtures("one_thread")
def test_both_trainers_learn_and_learn_the_same(parity, monkeypatch, capsys):
    monkeypatch.setattr(parity, "LEARNING_RATE", 5e-3)  # the tiny model's
    widened, real = [], parity.of_float64_logits

    def seen(*args, **more):
        widened.append(real(*args, **more))
        return widened[-1]

    monkeypatch.setattr(parity, "of_float64_logits", seen)
    asked = ["--dry", "--model", "tiny", "--rows", "48", "--steps", "2", "--dev-rows", "8", "--threads", "1"]
    exact, wider, rounded = parity.main(asked)
    assert [line["way"] for line in (exact, wider, rounded)] == ["float32", "float32-loss64", "bfloat16"]
    assert [line["values"]["steps"] for line in (exact, wider, rounded)] == [2, 2, 3]  # in bfloat16 the whole epoch
    assert len(widened) == 2 * 4  # steps x micro-batches of the second one
    assert all(loss.dtype == torch.float64 for loss in widened)
    for line in (exact, wider, rounded):
        dev = line["values"]["dev_loss"]
        assert dev["ours"] < dev["base"] - 0.02
        assert dev["trainer"] < dev["base"] - 0.02
    for line in (exact, wider):
        assert line["values"]["loss_apart_most"] <= parity.BARS["float32"]
    assert rounded["values"]["dev_loss_apart"] <= parity.BARS["bfloat16"]
    assert rounded["values"]["loss_apart_most"] > exact["values"]["loss_apart_most"]  # they are not one run's numbers
    assert "NOT within" not in capsys.readouterr().out


def test_another_training_is_not_within(parity, monkeypatch, capsys):
    """A bar that cannot be missed proves nothing: with another clip on our side only, it is."""
    real = parity.train_steps
    monkeypatch.setattr(parity, "train_steps", lambda *args, **more: real(*args, **more | {"max_grad_norm": 0.01}))
    monkeypatch.setattr(parity, "ADAM", parity.ADAM | {"adam_epsilon": 1e-2})  # else Adam divides the clip away
    monkeypatch.setattr(parity, "LEARNING_RATE", 5e-3)
    monkeypatch.setattr(parity, "BARS", {"float32": parity.BARS["float32"]})
    asked = ["--dry", "--model", "tiny", "--rows", "32", "--steps", "2", "--dev-rows", "8", "--threads", "1"]
    parity.main(asked)
    assert "NOT within" in capsys.readouterr().out
