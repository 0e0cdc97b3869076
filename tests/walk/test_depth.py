"""A base cut to its first layers, through every verb: told once, at training, and then known from the fingerprint."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

import lora_cmqa
from lora_cmqa.cli import main
from lora_cmqa.config import parse
from lora_cmqa.engine.run import open_run
from lora_cmqa.errors import AdapterError, ModelError, RunError
from lora_cmqa.lora.adapter_import import rebase
from lora_cmqa.lora.fingerprint import kept_layers
from lora_cmqa.models.load import load_model

IDS = torch.arange(40, 90)[None]


def conversations(file, count=12):
    turns = [[{"from": "user", "value": f"头痛{i}"}, {"from": "assistant", "value": "休息。"}] for i in range(count)]
    rows = [{"id": str(i), "conversations": t} for i, t in enumerate(turns)]
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")


def held_out(folder, count=6):
    """A prepared folder; only its test rows are read."""
    turns = [
        [{"role": "user", "content": f"头痛{i}"}, {"role": "assistant", "content": "休息。"}] for i in range(count)
    ]
    rows = [{"id": str(i), "question_id": str(i), "split": "test", "messages": t} for i, t in enumerate(turns)]
    folder.mkdir()
    for name in ("train", "test"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return folder


def words(home, kind="tiny"):
    return [
        *("--model", kind, "--num-hidden-layers", "2", "--dtype", "float32", "--device", "cpu"),
        *("--data", str(home / "rows.json"), "--dev-fraction", "0.3", "--output-dir", str(home / "run")),
        *("--r", "4", "--max-steps", "2", "--learning-rate", "2e-2", "--warmup-ratio", "0", "--save-steps", "1"),
    ]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Two steps on the first 2 of the tiny model's 3 layers."""
    home = tmp_path_factory.mktemp("cut")
    conversations(home / "rows.json")
    return lora_cmqa.train(parse(lora_cmqa.Config, words(home)))


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.fixture(scope="module")
def expected(run):
    cut = load_model("tiny", num_hidden_layers=2)[0]
    return logits(lora_cmqa.load_adapter(cut, run))


def test_the_fingerprint_and_the_card_say_so(run):
    assert json.loads((run / "fingerprint.json").read_text())["num_hidden_layers"] == 2
    assert "its first 2 layers" in (run / "README.md").read_text()
    assert kept_layers(run) == kept_layers(run / "checkpoint-1") == 2


@pytest.mark.parametrize("place", ["", "checkpoint-2"])
def test_opened_without_being_told(run, expected, place, capsys):
    opened = open_run(run / place, dtype="float32")
    assert len(opened.model.get_base_model().model.layers) == 2
    assert "Keeping the first 2 of 3 layers" in capsys.readouterr().err
    if not place:
        assert torch.equal(logits(opened.model), expected)


def test_every_verb_works_without_being_told(run, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda _: (_ for _ in ()).throw(EOFError))
    assert main(["chat", str(run), "--dtype", "float32"]) == 0
    assert main(["compare", str(run), "头痛", "--dtype", "float32", "--max-new-tokens", "4"]) == 0
    rows = ["--data", str(held_out(tmp_path / "data"))]
    few = [
        "--generate-rows",
        "0",
        "--no-red-flags",
        "--no-general-chat",
        "--bootstrap-samples",
        "100",
        "--dtype",
        "float32",
    ]
    assert main(["eval", str(run), *rows, *few]) == 0
    assert main(["merge", str(run), "--out", str(tmp_path / "merged")]) == 0
    capsys.readouterr()
    merged, _ = load_model(tmp_path / "merged")
    assert len(merged.model.layers) == merged.config.num_hidden_layers == 2
    assert (logits(merged) - expected).abs().max() <= 1e-5 * expected.std()
    assert json.loads((tmp_path / "merged" / "certificate.json").read_text())["num_hidden_layers"] == 2
    assert not capsys.readouterr().err  # the merged model is what it is: nothing is cut from it


def test_gemmas_kinds_of_layers_are_cut_with_them(tmp_path):
    conversations(tmp_path / "rows.json")
    run = lora_cmqa.train(parse(lora_cmqa.Config, words(tmp_path, "tiny-gemma3")))
    lora_cmqa.merge(run, tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (config["num_hidden_layers"], len(config["layer_types"])) == (2, 2)


def test_a_resume_keeps_to_it(run):
    before = (run / "adapter_model.safetensors").read_bytes()
    again = parse(lora_cmqa.Config, yaml_file=run / "config.yaml")
    assert again.model.num_hidden_layers == 2
    assert lora_cmqa.train(again) == run
    assert (run / "adapter_model.safetensors").read_bytes() == before
    with pytest.raises(RunError, match="num-hidden-layers 2 then, 1 now"):
        lora_cmqa.train(parse(lora_cmqa.Config, [*words(run.parent), "--num-hidden-layers", "1"]))


def without_its_fingerprint(run, folder):
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(run / name, folder / name)
    return folder


def test_fewer_layers_than_the_base_are_refused_with_the_cure(run, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_cmqa.lora.merge._write", lambda *_, **__: pytest.fail("weights were written first"))
    bare = without_its_fingerprint(run, tmp_path / "bare")
    verbs = (
        lambda: lora_cmqa.load_adapter(load_model("tiny")[0], bare),
        lambda: open_run(bare),
        lambda: lora_cmqa.merge(bare, tmp_path / "no"),
        lambda: rebase(bare, "tiny", tmp_path / "no"),
    )
    for verb in verbs:
        with pytest.raises(AdapterError, match="the adapter has 2 layers, the base 3") as caught:
            verb()
        assert "--num-hidden-layers 2" in str(caught.value)
    assert not (tmp_path / "no").exists()


def test_the_cure_works(run, expected, tmp_path):
    bare = without_its_fingerprint(run, tmp_path / "bare")
    told = open_run(bare, dtype="float32", num_hidden_layers=2)
    assert torch.equal(logits(told.model), expected)
    report = rebase(bare, "tiny", tmp_path / "noted", num_hidden_layers=2)
    assert report["out"] == str(tmp_path / "noted")
    assert torch.equal(logits(open_run(tmp_path / "noted", dtype="float32").model), expected)
    rebase(tmp_path / "noted", "tiny", tmp_path / "kept")  # what a fingerprint notes goes along
    assert kept_layers(tmp_path / "kept") == 2


def test_more_layers_than_the_base_are_refused(run, tmp_path):
    bare = without_its_fingerprint(run, tmp_path / "bare")
    with pytest.raises(AdapterError, match="the adapter has 2 layers, the base 1"):
        open_run(bare, num_hidden_layers=1)


def test_a_depth_that_is_none(run, tmp_path):
    with pytest.raises(ModelError, match="num_hidden_layers is 7; the model has 3"):
        open_run("tiny", num_hidden_layers=7)
    bare = without_its_fingerprint(run, tmp_path / "bare")
    for content, says in (({"num_hidden_layers": "16"}, "'16' is no number of layers"), (None, "not a fingerprint")):
        stored = json.loads((run / "fingerprint.json").read_text())
        (bare / "fingerprint.json").write_text(json.dumps(stored | content if content else content))
        with pytest.raises(AdapterError, match=says):
            open_run(bare)
