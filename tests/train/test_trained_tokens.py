"""--trainable-tokens through a whole run: said, trained, resumed to the byte, loaded by plain PEFT, evaluated."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from lora_cmqa.config import Config, parse
from lora_cmqa.engine.chat import Chat
from lora_cmqa.engine.run import open_run
from lora_cmqa.engine.sampling import SamplingParams
from lora_cmqa.models.tiny import tiny_model
from lora_cmqa.train import loop
from lora_cmqa.train.loop import train

from .conftest import outcome

pytestmark = pytest.mark.usefixtures("one_thread")
TURNS = ("<|im_start|>", "<|im_end|>")


@pytest.fixture
def with_rows(settings):
    def make(**more) -> Config:
        made = settings(max_steps=4, **more)
        return replace(made, lora=replace(made.lora, trainable_tokens=TURNS))

    return make


def test_rows_are_trained_and_load_everywhere(with_rows, capsys):
    run = train(with_rows())
    said = capsys.readouterr().err
    assert "<|im_start|> <|im_end|>: their 2 rows of embedding and head are trained too" in said
    assert "not in the portable profile" in said
    assert "trained by rows: <|im_start|> <|im_end|>" in (run / "README.md").read_text()
    assert json.loads((run / "adapter_config.json").read_text())["trainable_token_indices"]["lm_head"] == [257, 258]
    tensors = load_file(run / "adapter_model.safetensors")
    for place in ("model.embed_tokens", "lm_head"):
        rows = tensors[f"base_model.model.{place}.token_adapter.trainable_tokens_delta"]
        moved = (rows - tiny_model().get_submodule(place).weight[[257, 258]]).abs().amax(1)
        assert (moved > 1e-3).all(), place
    ids = torch.tensor([[257, 104, 258, 10]])
    opened = open_run(run, dtype="float32", device="cpu").model
    with torch.no_grad():
        ours, plain = opened(ids).logits, AutoPeftModelForCausalLM.from_pretrained(run)(ids).logits
        with opened.disable_adapter():
            base = opened(ids).logits
    chat = Chat(open_run(run, dtype="float32", device="cpu"))
    assert "TrainableTokensWrapper" in chat.engine.why_plain  # base rows of a batch must not read the trained ones
    few = SamplingParams(max_new_tokens=8)
    assert chat.ask("头痛", sampling=few) != chat.ask("头痛", adapter=False, sampling=few)
    assert chat.ask("头痛", adapter=False, sampling=few) == Chat("tiny", dtype="float32").ask("头痛", sampling=few)
    assert (ours - plain).abs().max() <= 1e-5 * plain.std()
    assert (base - tiny_model()(ids).logits).abs().max() <= 1e-5 * plain.std()


def test_they_resume_exactly(with_rows, tmp_path, monkeypatch):
    to_the_end = outcome(train(with_rows(output_dir=str(tmp_path / "whole"))))
    real = loop.train_step

    def stops(model, batch, *args, **kwargs):
        if batch.step == 4:
            raise RuntimeError("stopped")
        return real(model, batch, *args, **kwargs)

    monkeypatch.setattr(loop, "train_step", stops)
    with pytest.raises(RuntimeError, match="stopped"):
        train(with_rows())
    monkeypatch.setattr(loop, "train_step", real)
    assert outcome(train(with_rows())) == to_the_end


def test_the_flag_as_it_is_typed():
    assert parse(Config, []).lora.trainable_tokens == ()
    assert parse(Config, ["--trainable-tokens", "auto"]).lora.trainable_tokens == ("auto",)
    assert parse(Config, ["--trainable-tokens", "none"]).lora.trainable_tokens == ()
    assert parse(Config, ["--lora.trainable-tokens", *TURNS]).lora.trainable_tokens == TURNS
