"""Ranking at each evaluation of a run, the best adapter by it, and stopping early."""

import json
from dataclasses import replace

import pytest

from lora_cmqa.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
from lora_cmqa.data.prepare import load_split, prepare
from lora_cmqa.demo import SAMPLE
from lora_cmqa.engine.run import open_run
from lora_cmqa.errors import ConfigError
from lora_cmqa.train import loop
from lora_cmqa.train.dev_ranking import dev_ranking
from lora_cmqa.train.loop import train


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The embedded sample, four dev rows of it."""
    folder = tmp_path_factory.mktemp("ranked")
    prepare(SAMPLE, folder)
    lines = (folder / "dev.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "dev.jsonl").write_text("".join(lines[:4]), encoding="utf-8")
    return folder


def settings(data, run, **changes):
    base = TrainConfig(
        output_dir=str(run),
        max_steps=3,
        eval_steps=1,
        save_steps=100,
        eval_rank_questions=3,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=1,
        learning_rate=5e-3,
        warmup_ratio=0.0,
        lr_scheduler_type="constant",
    )
    return Config(
        model=ModelConfig(name_or_path="tiny", dtype="float32", device="cpu"),
        data=DataConfig(path=str(data), model_max_length=2048),
        lora=LoraConfig(r=4),
        train=replace(base, **changes),
    )


def lines(run, key):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {m["step"]: m[key] for m in rows if key in m}


def test_each_evaluation_ranks_and_the_best_adapter_is_the_one_that_ranks_best(data, tmp_path):
    run = train(settings(data, tmp_path / "run", metric_for_best_model="dev_mrr"))
    mrr = lines(run, "dev_mrr")
    assert list(mrr) == list(lines(run, "dev_top1")) == list(lines(run, "dev_loss")) == [0, 1, 2, 3]
    state = json.loads((run / "trainer_state.json").read_text())
    best = max((1, 2, 3), key=lambda step: (mrr[step], -step))
    assert (state["best_global_step"], state["best_metric"]) == (best, mrr[best])
    opened = open_run(run, device="cpu")
    ranking = dev_ranking(data, load_split(data, "dev"), opened.template, questions=3, seed=42, system=None)
    assert ranking.measure(opened.model)[1] == pytest.approx(mrr[best])
    assert ranking.measure(opened.model, stop=lambda: True) is None
    assert f"best dev_mrr | {mrr[best]:.4f}, step {best}" in (run / "README.md").read_text()


def test_a_run_that_gets_no_better_stops_and_stays_stopped(data, tmp_path, monkeypatch):
    config = settings(data, tmp_path / "run", max_steps=9, learning_rate=0.0, early_stopping_patience=2)
    finish = loop._Run._finish
    monkeypatch.setattr(loop._Run, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):  # killed after the last checkpoint, before the end was written
        train(config)
    monkeypatch.setattr(loop._Run, "_finish", finish)
    run = train(config)
    assert list(lines(run, "loss")) == [1, 2, 3]
    state = json.loads((run / "trainer_state.json").read_text())
    assert (state["finished"], state["global_step"], state["best_global_step"]) == (True, 3, 1)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    train(config)
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_a_run_without_candidates_ranks_nothing(data, tmp_path):
    run = train(settings(data / "train.jsonl", tmp_path / "run", max_steps=1))
    assert not lines(run, "dev_mrr")


def test_what_is_not_measured_cannot_be_gone_by(data, tmp_path):
    with pytest.raises(ConfigError, match="dev_mrr is not measured"):
        train(settings(data, tmp_path / "a", metric_for_best_model="dev_mrr", eval_rank_questions=0))
    with pytest.raises(ConfigError, match="early stopping needs dev rows"):
        train(settings(data / "train.jsonl", tmp_path / "b", early_stopping_patience=1))
