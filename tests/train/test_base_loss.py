"""The base's own dev loss: after the first step, with the adapter off, and with no trace in the run."""

import json
from dataclasses import replace

import pytest

from lora_cmqa.data.pack import pack
from lora_cmqa.data.prepare import load_split
from lora_cmqa.data.template import ChatTemplate
from lora_cmqa.models.load import load_model
from lora_cmqa.train import loop
from lora_cmqa.train.loop import dev_loss, train


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "lora",
    [{}, {"modules_to_save": ("lm_head",)}, {"trainable_tokens": "5,6,7"}, {"target_modules": ("q_proj", "down_proj")}],
    ids=["lora", "a whole head", "tokens", "two modules"],
)
def test_it_is_the_loss_of_the_base_alone(settings, lora):
    config = settings(max_steps=2, eval_steps=1, warmup_ratio=0.0)
    config = replace(config, lora=replace(config.lora, lora_dropout=0.0, **lora))
    run = train(config)
    found = lines(run)
    assert [(m["step"], "dev_loss" in m) for m in found] == [(1, False), (0, True), (1, True), (2, False), (2, True)]
    model, tokenizer = load_model(config.model.name_or_path, dtype="float32")
    template = ChatTemplate.from_tokenizer(tokenizer)
    dev = load_split(config.data.path, "dev", dev_fraction=config.data.dev_fraction, seed=config.train.seed)
    rows = loop._encode(dev, "dev", config, template)
    alone = dev_loss(model, pack(rows, max_tokens=config.train.max_tokens))
    assert found[1]["dev_loss"] == pytest.approx(alone, rel=1e-6)
    assert found[2]["dev_loss"] != pytest.approx(alone, rel=1e-4)  # one step moves it


def test_training_goes_on_as_if_it_had_not_been(settings, tmp_path, monkeypatch):
    """Every weight is trained after it, the same random state is drawn from: the adapter is the same bits."""
    measured = train(settings(max_steps=3))
    monkeypatch.setattr(loop, "dev_loss", lambda *_, **__: 1.0)
    unmeasured = train(settings(max_steps=3, output_dir=str(tmp_path / "unmeasured")))
    last = [(run / "checkpoint-3" / "adapter_model.safetensors").read_bytes() for run in (measured, unmeasured)]
    assert last[0] == last[1]
    assert [m["loss"] for m in lines(measured) if "loss" in m] == [m["loss"] for m in lines(unmeasured) if "loss" in m]
