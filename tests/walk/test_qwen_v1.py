"""The seed's own base model, QWenLMHeadModel with qwen.tiktoken, through every verb; and out again, to plain PEFT."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM

from lora_cmqa.cli import main
from lora_cmqa.engine.run import open_run
from lora_cmqa.models.load import load_model
from lora_cmqa.serve.server import open_service

IDS = torch.tensor([[151644, 872, 198, 104, 105, 106, 151645, 198, 151644, 77091, 198, 9909, 151645]])
CPU = ("--device", "cpu", "--dtype", "float32")


@pytest.fixture(scope="module")
def home(qwen_v1: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, whose name says chat and space: neither decides anything."""
    folder = tmp_path_factory.mktemp("v1") / "a chat folder"
    rows = json.loads((qwen_v1 / "train64.json").read_text(encoding="utf-8"))
    for name, part in (("train", rows[:8]), ("dev", rows[8:10]), ("test", rows[10:16])):
        (folder / "data").mkdir(parents=True, exist_ok=True)
        with (folder / "data" / f"{name}.jsonl").open("w", encoding="utf-8") as f:
            for r in part:
                messages = [{"role": t["from"], "content": t["value"]} for t in r["conversations"]]
                row = {"id": r["id"], "question_id": r["id"], "split": name, "messages": messages}
                f.write(json.dumps(row, ensure_ascii=False) + "\n")
    return folder


def trained(home: Path, base: Path, name: str, *more: str) -> Path:
    words = ["train", "--model", str(base), *CPU, "--data", str(home / "data"), "--output-dir", str(home / name)]
    words += ["--r", "4", "--max-steps", "1", "--learning-rate", "5e-2", "--warmup-ratio", "0", *more]
    assert main(words) == 0
    return home / name


@pytest.fixture(scope="module")
def run(home: Path, qwen_v1: Path) -> Path:
    return trained(home, qwen_v1 / "qwen_v1_tiny", "run")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Computed in float64: what two forms of the same float32 weights differ by is then the weights' own rounding, and
    not the order in which one processor or another adds up (1.2e-5 of the logits' std on one of ours, 9e-6 on others).
    """
    return model.double()(input_ids=IDS).logits[0]


def printed_commands(said: str) -> list[str]:
    return [line.strip() for line in said.splitlines() if line.strip().startswith("cmqa ")]


def follow(commands: list[str]) -> Path:
    """Type what was printed; the folder that the last one wrote."""
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    words = shlex.split(commands[-1])
    return Path(words[words.index("--out") + 1])


def same_in_plain_peft(run: Path, out: Path) -> None:
    ours = logits(open_run(run, device="cpu", dtype="float32").model)
    plain = logits(AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32))
    bare = logits(load_model(json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"])[0])
    assert (plain - ours).abs().max() <= 1e-5 * ours.std()
    assert (bare - ours).abs().max() > 1e-2 * ours.std()  # the adapter is alive


def test_after_the_printed_commands_plain_peft_loads_it(home: Path, qwen_v1: Path, capsys: Any) -> None:
    run = trained(home, qwen_v1 / "qwen_v1_tiny", "printed")
    commands = printed_commands(capsys.readouterr().err)
    assert [c.split()[:2] for c in commands] == [["cmqa", "convert"], ["cmqa", "adapter"]]
    config = json.loads((run / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(qwen_v1 / "qwen_v1_tiny")
    assert config["modules_to_save"] is None  # LoRA only, whatever the folder is called
    card = (run / "README.md").read_text()
    assert "cmqa convert BASE --out NATIVE" in card
    assert str(home) not in card
    same_in_plain_peft(run, follow(commands))


@pytest.mark.slow
def test_so_with_a_cut_base_and_trained_rows(home: Path, qwen_v1: Path, capsys: Any) -> None:
    base = qwen_v1 / "qwen_v1_tiny_sharded"
    rows = ("--trainable-tokens", "<|im_start|>", "<|im_end|>")
    run = trained(home, base, "cut", "--num-hidden-layers", "2", *rows)
    commands = printed_commands(capsys.readouterr().err)
    assert commands[0].endswith("--num-hidden-layers 2")
    out = follow(commands)
    same_in_plain_peft(run, out)
    assert "num_hidden_layers" not in json.loads((out / "fingerprint.json").read_text())  # its base is whole


@pytest.mark.slow
def test_whole_embedding_and_head_only_when_asked_and_with_the_price_first(
    home: Path, qwen_v1: Path, capsys: Any
) -> None:
    run = trained(home, qwen_v1 / "qwen_v1_tiny", "whole", "--modules-to-save", "wte", "lm_head")
    said = capsys.readouterr().err
    # 2 matrices of 151,936 x 32 in float32: the copy, its gradient and two moments
    price = said.index("modules_to_save wte lm_head: 9,723,904 more weights are trained, about 0.14 GiB")
    assert price < said.index("weights are trained beside its")
    assert json.loads((run / "adapter_config.json").read_text())["modules_to_save"] == ["embed_tokens", "lm_head"]
    same_in_plain_peft(run, follow(printed_commands(said)))


@pytest.mark.slow
def test_every_verb(run: Path, home: Path, tmp_path: Path, qwen_v1: Path, capsys: Any, monkeypatch: Any) -> None:
    asked = iter(["头痛怎么办？", "/base", "发烧怎么办？"])
    monkeypatch.setattr("builtins.input", lambda _: next(asked, None) or (_ for _ in ()).throw(EOFError))
    base = str(qwen_v1 / "qwen_v1_tiny")
    assert main(["chat", str(run), "--model", base, *CPU, "--max-new-tokens", "4"]) == 0
    asked = iter(["头痛怎么办？"])
    assert main(["chat", "--model", base, *CPU, "--max-new-tokens", "4"]) == 0  # the base alone
    assert main(["compare", str(run), "头痛怎么办？", *CPU, "--max-new-tokens", "4"]) == 0
    few = ("--quick", "--generate-rows", "2", "--max-new-tokens", "8")
    assert main(["eval", str(run), "--data", str(home / "data"), *few, *CPU, "--json"]) == 0
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["metrics"]["nll"]["difference"] < 0
    assert main(["merge", str(run), "--model", base, "--out", str(tmp_path / "merged"), "--dtype", "float32"]) == 0
    want = logits(open_run(run, device="cpu", dtype="float32").model)
    assert (logits(load_model(tmp_path / "merged")[0]) - want).abs().max() <= 1e-5 * want.std()


@pytest.mark.slow
def test_every_verb_cuts_the_base_as_the_run_knew_it(
    home: Path, tmp_path: Path, qwen_v1: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The seed's 16 of 32 layers, here 2 of 4: said by each verb, written down, and no other depth taken."""
    run = trained(home, qwen_v1 / "qwen_v1_tiny", "of-two", "--num-hidden-layers", "2")
    assert json.loads((run / "fingerprint.json").read_text())["num_hidden_layers"] == 2
    few = ("--quick", "--generate-rows", "1", "--max-new-tokens", "2")
    merged = tmp_path / "merged"
    verbs = (
        ["chat", str(run), *CPU, "--max-new-tokens", "2"],
        ["compare", str(run), "头痛怎么办？", *CPU, "--max-new-tokens", "2"],
        ["eval", str(run), "--data", str(home / "data"), *few, *CPU],
        ["merge", str(run), "--out", str(merged), "--dtype", "float32"],
    )
    assert "Keeping the first 2 of 4 layers" in capsys.readouterr().err
    for words in verbs:
        asked = iter(["发烧怎么办？"])
        monkeypatch.setattr(
            "builtins.input", lambda _, asked=asked: next(asked, None) or (_ for _ in ()).throw(EOFError)
        )
        assert main(words) == 0
        if words[0] != "merge":
            assert "Keeping the first 2 of 4 layers" in capsys.readouterr().err, words[0]
    assert json.loads((merged / "config.json").read_text())["num_hidden_layers"] == 2
    assert main([*verbs[0], "--num-hidden-layers", "4"]) == 2
    assert "the adapter has 2 layers, the base 4" in capsys.readouterr().err
    adapters = tmp_path / "adapters"
    shutil.copytree(run, adapters / "of-two", ignore=shutil.ignore_patterns("checkpoint-*", "eval"))
    service = open_service(adapters, device="cpu", dtype="float32")  # names no base: the adapter does
    assert service.registry.open("of-two")[1].base_check == "fingerprint"
    assert len(service.engine.model.model.layers) == 2
