"""A run on a quantised base from its command to its merge: what it says of itself, and what it takes and gives."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from lora_cmqa.engine.chat import Chat, compare
from lora_cmqa.engine.run import open_run
from lora_cmqa.engine.sampling import SamplingParams
from lora_cmqa.errors import AdapterError, ConfigError
from lora_cmqa.kernels import quantized
from lora_cmqa.lora.decoder import why_plain
from lora_cmqa.lora.fingerprint import trained_quantization
from lora_cmqa.lora.merge import merge
from lora_cmqa.models.load import load_model
from lora_cmqa.models.quantized import quantization_of
from lora_cmqa.train.ledger import peak, weights
from lora_cmqa.train.loop import train

from .conftest import examples

FEW = SamplingParams(max_new_tokens=8)


def on(config, quantization, **model):
    return replace(config, model=replace(config.model, quantization=quantization, **model))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 8 steps on the tiny model in NF4."""
    from lora_cmqa.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig

    place = tmp_path_factory.mktemp("nf4")
    rows = [
        {"id": e.id, "conversations": [{"from": m.role, "value": m.content} for m in e.messages]} for e in examples(24)
    ]
    (place / "rows.json").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    return train(
        Config(
            model=ModelConfig("tiny", dtype="float32", device="cpu", quantization="nf4"),
            data=DataConfig(path=str(place / "rows.json"), dev_fraction=0.2),
            lora=LoraConfig(r=4),
            train=TrainConfig(
                output_dir=str(place / "run"),
                max_steps=8,
                per_device_train_batch_size=4,
                gradient_accumulation_steps=1,
                learning_rate=5e-3,
                max_tokens=256,
            ),
        )
    )


def losses(run) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def test_it_learns_and_says_on_what(finished, capsys):
    seen = losses(finished)
    assert seen[-1] < seen[0] - 0.5
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["quantization"] == "nf4"
    assert environment["versions"]["bitsandbytes"][0].isdigit()
    assert json.loads((finished / "fingerprint.json").read_text())["quantization"] == "nf4"
    assert trained_quantization(finished) == "nf4"
    assert "nf4" in (finished / "README.md").read_text()
    assert "quantization: nf4" in (finished / "config.yaml").read_text()


def test_a_16_bit_run_says_nothing_of_it(settings):
    run = train(settings(max_steps=1))
    assert "quantization" not in json.loads((run / "environment.json").read_text())
    assert trained_quantization(run) == "none"


def test_the_loss_follows_that_of_the_plain_base(settings, tmp_path):
    """Rows, steps and draws are the same; only the base is rounded."""
    curves = {}
    for kind in ("none", "nf4", "int8"):
        config = settings(max_steps=8, output_dir=str(tmp_path / kind))
        curves[kind] = losses(train(on(config, kind)))
    assert curves["nf4"] != curves["none"]
    assert curves["int8"] != curves["none"]
    assert max(abs(a - b) for a, b in zip(curves["nf4"], curves["none"], strict=True)) < 0.3
    assert max(abs(a - b) for a, b in zip(curves["int8"], curves["none"], strict=True)) < 0.03


def test_it_resumes_to_the_same_adapter(settings, finished, tmp_path):
    config = on(settings(max_steps=4, output_dir=str(tmp_path / "whole")), "nf4")
    whole = (train(config) / "adapter_model.safetensors").read_bytes()
    part = replace(config, train=replace(config.train, output_dir=str(tmp_path / "part")))
    from lora_cmqa.train import loop

    def stop(self):
        if self.step == 2:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop._Run, "_obey_signal", stop)
        with pytest.raises(KeyboardInterrupt):
            train(part)
    assert (train(part) / "adapter_model.safetensors").read_bytes() == whole


def test_open_chat_and_compare_take_the_base_as_it_was_trained(finished):
    opened = open_run(finished, device="cpu", dtype="float32")
    assert quantization_of(opened.model) == "nf4"
    assert why_plain(opened.model) is None
    chat = Chat(opened)
    assert chat.engine.why_plain is None
    packed = chat.ask("头痛怎么办？", sampling=FEW)
    assert packed == Chat(open_run(finished, device="cpu", dtype="float32")).ask("头痛怎么办？", sampling=FEW)
    answers = compare(finished, ["头痛怎么办？"], device="cpu", dtype="float32", sampling=FEW)
    assert answers[0]["adapter"] == packed.strip()
    assert answers[0]["base"] != answers[0]["adapter"]
    wide = open_run(finished, device="cpu", dtype="float32", quantization="none")
    assert quantization_of(wide.model) == "none"
    assert quantization_of(open_run(finished, device="cpu", dtype="float32", quantization="int8").model) == "int8"


def test_eval_says_it(finished, tmp_path):
    from lora_cmqa.config import EvaluateConfig
    from lora_cmqa.evaluate.evaluation import evaluate

    rows = [
        {
            "messages": [{"role": m.role, "content": m.content} for m in e.messages],
            "id": e.id,
            "question_id": e.question_id,
        }
        for e in examples(9)
    ]
    dev = tmp_path / "dev.jsonl"
    dev.write_text("".join(json.dumps(r | {"split": "dev"}) + "\n" for r in rows), encoding="utf-8")
    few = EvaluateConfig(
        split="dev",
        generate_rows=1,
        max_new_tokens=4,
        rank_questions=0,
        general_chat=False,
        red_flags=False,
        bootstrap_samples=100,
    )
    report = evaluate(finished, dev, few, device="cpu", dtype="float32")
    assert report["metrics"]["nll"]["difference"] < 0
    assert report["signature"]["quantization"] == "nf4"


def test_merge_goes_into_the_16_bit_base(finished, tmp_path):
    certificate = merge(finished, tmp_path / "merged")
    assert certificate["trained_on"] == "nf4"
    assert certificate["max_difference_in_std"] <= 1e-4  # against base + adapter, both unquantised
    model, _ = load_model(tmp_path / "merged")
    assert quantization_of(model) == "none"
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_merge_into_a_4_bit_base_is_refused_with_the_reason(finished, tmp_path):
    import shutil

    from lora_cmqa.models.tiny import tiny_folder

    base = shutil.copytree(tiny_folder(), tmp_path / "base-4bit")
    config = json.loads((base / "config.json").read_text())
    packed = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": packed}))
    with pytest.raises(AdapterError, match=r"quantised \(bitsandbytes\).*rounded"):
        merge(finished, tmp_path / "merged", base=str(base))
    assert not (tmp_path / "merged").exists()


def test_without_bitsandbytes_no_run_is_begun(settings, tmp_path, monkeypatch):
    quantized.bitsandbytes_library.cache_clear()
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lora-cmqa\[gpu\]"):
        train(on(settings(max_steps=1), "nf4"))
    monkeypatch.undo()
    quantized.bitsandbytes_library.cache_clear()


@pytest.mark.parametrize("kind", ["none", "nf4", "int8"])
def test_the_ledger_counts_the_weights_there_are(kind, tmp_path):
    """A random Qwen2 shape, its matrices no whole number of groups; exact but for a last block or group not full."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from lora_cmqa.models.quantized import QuantizedLinear
    from lora_cmqa.models.sizes import shape_of
    from lora_cmqa.models.tiny import byte_tokenizer

    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=136,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=300,
        tie_word_embeddings=False,
    )
    config.head_dim = 34
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    model, _ = load_model(tmp_path, dtype="bfloat16", quantization=kind)
    there = sum(p.numel() * p.element_size() for p in model.parameters())
    packed = [m.quantized for m in model.modules() if isinstance(m, QuantizedLinear)]
    there += sum(q.nbytes - q.values.numel() for q in packed)
    said = sum(row.bytes for row in weights(shape=shape_of(str(tmp_path)), value_bytes=2, quantization=kind))
    assert len(packed) == (0 if kind == "none" else 21)
    assert 0 <= there - said <= len(packed) * 9  # a constant of the last block, one of the last group, the mean


def test_the_plan_is_that_of_the_setting():
    from lora_cmqa.config import Config, ModelConfig
    from lora_cmqa.models.sizes import shape_of
    from lora_cmqa.train.plan import plan, setup_of

    def at(kind):
        config = Config(model=ModelConfig("Qwen/Qwen2.5-7B", dtype="bfloat16", quantization=kind))
        return config, setup_of(config, shape_of("Qwen/Qwen2.5-7B"), on_gpu=True)

    sizes = {kind: peak(at(kind)[1]).bytes for kind in ("none", "int8", "nf4")}
    assert sizes["none"] > sizes["int8"] > sizes["nf4"]
    result = plan(at("nf4")[0], gpu_memory="8GiB")
    assert result["recipe"]["model.quantization"] == "nf4"
    assert {row["name"] for row in result["ledger"]} >= {
        "weights: layers in NF4, constants included",
        "one weight dequantised",
    }
    offered = {s["flag"]: s for s in plan(at("none")[0], gpu_memory="24GiB")["switches"]}["--quantization nf4"]
    assert offered["changes_gradient"]
    assert offered["frees_bytes"] > 8 * 2**30
