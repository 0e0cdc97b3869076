"""The walk a stranger takes, on the tiny model: CSV -> prepare -> train -> evaluate -> ask -> merge; plain PEFT too."""

import csv
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM

import lora_cmqa
from lora_cmqa import Chat, Config
from lora_cmqa.config import EvaluateConfig, parse
from lora_cmqa.models.load import load_model

FEW = EvaluateConfig(generate_rows=2, max_new_tokens=8, general_chat=False, red_flags=False)
DISEASES = ("感冒", "胃痛", "头痛", "湿疹", "失眠", "咳嗽", "便秘", "贫血", "近视", "扭伤")


def write_csv(file, rows):
    with file.open("w", encoding="utf-8", newline="") as f:
        csv.writer(f).writerows(rows)


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    """A finished run of six steps: (source, data, run)."""
    home = tmp_path_factory.mktemp("walk")
    source, data, run = home / "cmqa", home / "data", home / "runs" / "walk"
    source.mkdir()
    asked = [(i, f"{d}第{i}天了，应该怎么办呢？") for i, d in enumerate(DISEASES * 3, start=1)]
    write_csv(source / "questions.csv", [("question_id", "content"), *asked])
    told = [(100 + i, i, f"您好，{q[:2]}要注意休息，第{i}种办法是多喝温水。") for i, q in asked]
    write_csv(source / "answers.csv", [("ans_id", "question_id", "content"), *told])
    report = lora_cmqa.prepare(source, data)
    assert report["kept"] + report["rejected"] == report["read"] == 30
    settings = ["--model", "tiny", "--dtype", "float32", "--data", str(data), "--output-dir", str(run)]
    settings += ["--r", "4", "--lora-alpha", "8", "--max-steps", "6", "--learning-rate", "2e-2", "--save-steps", "3"]
    assert lora_cmqa.train(parse(Config, settings)) == run
    return source, data, run


def logits(model, ids):
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("place", ["", "checkpoint-3", "checkpoint-6"])
def test_plain_peft_loads_the_run_and_each_checkpoint_with_our_logits(walk, place):
    folder = walk[2] / place
    base, tokenizer = load_model("tiny", dtype="float32")
    ours = lora_cmqa.load_adapter(base, folder)
    ids = torch.tensor([tokenizer("头痛怎么办？").input_ids])
    want = logits(ours, ids)
    plain = logits(AutoPeftModelForCausalLM.from_pretrained(folder), ids)
    assert (plain - want).abs().max() <= 1e-5 * want.std()
    bare = logits(load_model("tiny", dtype="float32")[0], ids)
    assert (bare - want).abs().max() > 1e-3 * want.std()  # the adapter is alive


def test_the_run_folder_holds_what_it_promises(walk):
    names = {p.name for p in walk[2].iterdir()}
    promised = {"config.yaml", "environment.json", "metrics.jsonl", "adapter_config.json", "adapter_model.safetensors"}
    promised |= {"generation_config.json", "chat_template.jinja", "fingerprint.json", "README.md", "tokenizer.json"}
    promised |= {"trainer_state.json", "checkpoint-3", "checkpoint-6"}
    assert promised <= names


def test_evaluation_says_how_sure_it_is(walk):
    report = lora_cmqa.evaluate(walk[2], walk[1], replace(FEW, bootstrap_samples=500))
    loss = report["metrics"]["nll"]
    assert loss["difference"] == pytest.approx(loss["adapter"] - loss["base"])
    assert loss["ci95"][0] <= loss["difference"] <= loss["ci95"][1]
    assert loss["difference"] < 0  # six large steps on thirty like rows do move it
    for name in ("report.json", "report.md", "report.html", "predictions.jsonl"):
        assert (walk[2] / "eval" / "test" / name).stat().st_size > 0


def test_evaluation_twice_gives_the_same_bytes(walk):
    both = []
    for name in ("once", "twice"):
        lora_cmqa.evaluate(walk[2], walk[1], replace(FEW, bootstrap_samples=200), name=name)
        folder = walk[2] / "eval" / name
        both.append({p.name: p.read_bytes() for p in folder.iterdir()})
    assert both[0] == both[1]


def test_chat_and_compare_answer(walk):
    chat = Chat(walk[2], dtype="float32")
    sampling = lora_cmqa.engine.sampling.SamplingParams(max_new_tokens=12)
    answer = chat.ask("头痛怎么办？", sampling=sampling)
    assert "".join(chat.stream("头痛怎么办？", sampling=sampling)) == answer
    (pair,) = lora_cmqa.compare(chat, ["头痛怎么办？"], sampling=sampling)
    assert pair["adapter"] == answer.strip()
    assert pair["base"] == chat.ask("头痛怎么办？", adapter=False, sampling=sampling).strip()


def test_merged_equals_unmerged(walk, tmp_path):
    out = tmp_path / "merged"
    lora_cmqa.merge(walk[2], out)
    assert (out / "certificate.json").is_file()
    ids = torch.arange(40, 90)[None]
    want = logits(lora_cmqa.load_adapter(load_model("tiny", dtype="float32")[0], walk[2]), ids)
    merged = logits(load_model(out, dtype="float32")[0], ids)
    assert (merged - want).abs().max() <= 1e-5 * want.std()


def test_a_finished_run_started_again_changes_no_byte(walk):
    run = walk[2]
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    lora_cmqa.train(parse(Config, yaml_file=run / "config.yaml"))
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before
