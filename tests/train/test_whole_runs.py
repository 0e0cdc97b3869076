"""Settings whose effect shows only in a whole run: replay rows, modules_to_save, trackers, the terminal's live line."""

from __future__ import annotations

import io
import json
import os
import signal
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from rich.console import Console

from lora_cmqa.lora.adapter import load_adapter
from lora_cmqa.models.load import load_model
from lora_cmqa.models.tiny import tiny_folder
from lora_cmqa.train import loop
from lora_cmqa.train.loop import train

from .conftest import in_a_child, outcome, without_time

pytestmark = pytest.mark.usefixtures("one_thread")


def test_replay_rows_are_trained_among_the_others(settings, tmp_path, monkeypatch):
    """Every row of both files once an epoch, the replayed ones in no dev set."""
    replay = tmp_path / "general.jsonl"
    turns = [("法国的首都是哪里？", "巴黎。"), ("2+2=?", "4"), ("写一句问候。", "你好！")]
    lines = [
        {"id": f"general-{i}", "messages": [{"role": "user", "content": q}, {"role": "assistant", "content": a}]}
        for i, (q, a) in enumerate(turns)
    ]
    replay.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
    seen: Counter[str] = Counter()
    real = loop.train_step
    monkeypatch.setattr(
        loop, "train_step", lambda m, batch, *a, **k: (seen.update(batch.example_ids), real(m, batch, *a, **k))[1]
    )
    config = settings(num_train_epochs=1.0)
    train(replace(config, data=replace(config.data, replay=str(replay))))
    assert {n for n in seen if n.startswith("general")} == {"general-0", "general-1", "general-2"}
    assert len(seen) == 20 + 3  # of 24 rows 4 are the dev set
    assert set(seen.values()) == {1}


def test_modules_to_save_are_trained_and_load_with_plain_peft(settings):
    """The seed's wte and lm_head: in the adapter, in transformers + PEFT, with the logits of our own loader."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    config = settings(max_steps=4)
    config = replace(
        config,
        model=replace(config.model, name_or_path=str(tiny_folder("llama"))),
        lora=replace(config.lora, modules_to_save=("wte", "lm_head")),
    )
    run = train(config)
    base = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), dtype=torch.float32)
    before = base.get_output_embeddings().weight.detach().clone()
    theirs = PeftModel.from_pretrained(base, run).eval()
    assert not torch.equal(theirs.get_output_embeddings().weight, before)
    model, _ = load_model(str(tiny_folder("llama")), dtype="float32", device="cpu")
    ours = load_adapter(model, run)
    ids = torch.from_numpy(np.random.Generator(np.random.PCG64(0)).integers(0, 256, (1, 40)))
    with torch.no_grad():
        assert torch.equal(theirs(ids).logits, ours(ids).logits)


def test_modules_to_save_resume_exactly(settings, tmp_path):
    def config(**more):
        made = settings(max_steps=4, **more)
        return replace(made, lora=replace(made.lora, modules_to_save=("embed_tokens", "lm_head")))

    to_the_end = outcome(train(config(output_dir=str(tmp_path / "whole"))))
    real = loop.train_step

    def child():
        loop.train_step = lambda m, batch, *a, **k: (
            os.kill(os.getpid(), signal.SIGKILL) if batch.step == 4 else real(m, batch, *a, **k)
        )
        train(config())

    assert in_a_child(child) == -signal.SIGKILL
    assert outcome(train(config())) == to_the_end


# ---- trackers ----------------------------------------------------------------------------------------------------


def scalars(run) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_shows_what_metrics_jsonl_holds(settings):
    run = train(settings(max_steps=4, report_to=("tensorboard",)))
    shown, lines = scalars(run), without_time(run)
    for key in ("loss", "grad_norm", "learning_rate"):
        expected = [(line["step"], pytest.approx(line[key], rel=1e-6)) for line in lines if "loss" in line]
        assert shown[f"train/{key}"] == expected
    expected = [(line["step"], pytest.approx(line["dev_loss"], rel=1e-6)) for line in lines if "dev_loss" in line]
    assert shown["dev/dev_loss"] == expected


def test_tensorboard_shows_each_step_once_after_a_resume(settings, monkeypatch):
    real = loop.train_step

    def breaks_off(model, batch, *args, **kwargs):
        if batch.step == 4:
            raise KeyboardInterrupt
        return real(model, batch, *args, **kwargs)

    config = settings(max_steps=5, report_to=("tensorboard",))
    with monkeypatch.context() as m:
        m.setattr(loop, "train_step", breaks_off)
        with pytest.raises(KeyboardInterrupt):
            train(config)  # step 3 is shown, the checkpoint is of step 2
    run = train(config)
    assert [step for step, _ in scalars(run)["train/loss"]] == [1, 2, 3, 4, 5]


# ---- the terminal ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_terminal", [True, False])
def test_the_terminal_has_a_live_line_and_a_file_has_plain_ones(settings, monkeypatch, is_terminal):
    """In a terminal one line is written over and over, evaluations stand above it; elsewhere no control character."""
    screen = io.StringIO()
    monkeypatch.setattr(
        "rich.console.Console",
        lambda **_: Console(file=screen, force_terminal=is_terminal, width=100, soft_wrap=True, highlight=False),
    )
    train(settings(max_steps=4))
    shown = screen.getvalue()
    assert "4/4" in shown
    assert "step 4: dev loss" in shown
    assert "tokens/s" in shown
    assert ("\x1b[" in shown) == is_terminal
    if not is_terminal:
        assert [line.split()[0] for line in shown.splitlines() if "tokens/s" in line] == ["1/4", "2/4", "3/4", "4/4"]


def test_the_live_line_ends_also_when_the_run_breaks_off(settings, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr("rich.console.Console", lambda **_: Console(file=screen, force_terminal=True, width=100))

    def breaks_off(*_args, **_kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train_step", breaks_off)
    with pytest.raises(KeyboardInterrupt):
        train(settings(max_steps=4))
    assert screen.getvalue().count("\x1b[?25l") == screen.getvalue().count("\x1b[?25h") == 1  # the cursor is back
