"""The seed's two scripts, unchanged in use."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from lora_cmqa.config import Config, parse
from lora_cmqa.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]

# The seed's own command, word for word but for the three paths.
LINE = (
    "--model_name_or_path M --data_path D.json --bf16 True --output_dir O --num_train_epochs 5 "
    "--per_device_train_batch_size 2 --per_device_eval_batch_size 1 --gradient_accumulation_steps 8 "
    "--evaluation_strategy no --save_strategy steps --save_steps 1000 --save_total_limit 10 --learning_rate 3e-4 "
    "--weight_decay 0.1 --adam_beta2 0.95 --warmup_ratio 0.01 --lr_scheduler_type cosine --logging_steps 1 "
    "--report_to none --model_max_length 512 --lazy_preprocess True --gradient_checkpointing --use_lora"
)
SEED = LINE.split()


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("finetune", ROOT / "finetune.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def settings(*words: str) -> tuple[Config, list[str]]:
    ours, notes = script().cmqa_words(words)
    return parse(Config, ours), notes


def test_the_seeds_command_is_understood_whole():
    c, notes = settings(*SEED)
    assert (c.model.name_or_path, c.data.path, c.train.output_dir) == ("M", "D.json", "O")
    assert c.model.dtype == "bfloat16"
    assert (c.data.model_max_length, c.data.dev_path) == (512, None)
    t, lora = c.train, c.lora
    assert (t.num_train_epochs, t.per_device_train_batch_size, t.gradient_accumulation_steps) == (5, 2, 8)
    assert (t.learning_rate, t.weight_decay, t.adam_beta2, t.warmup_ratio) == (3e-4, 0.1, 0.95, 0.01)
    assert (t.save_steps, t.save_total_limit, t.logging_steps) == (1000, 10, 1)
    assert (t.lr_scheduler_type, t.gradient_checkpointing, t.report_to) == ("cosine", True, ())
    assert (lora.r, lora.lora_alpha, lora.lora_dropout) == (64, 16, 0.05)
    assert lora.target_modules == ("c_attn", "c_proj", "w1", "w2")
    assert len(notes) == 1
    assert "lazy_preprocess" in notes[0]


def test_the_seeds_edit_of_the_depth_is_a_flag():
    assert settings(*SEED)[0].model.num_hidden_layers is None
    assert settings(*SEED, "--num_hidden_layers", "16")[0].model.num_hidden_layers == 16


def test_what_is_not_given_is_as_qwens_script_had_it():
    t = settings("--use_lora")[0].train
    assert (t.learning_rate, t.num_train_epochs, t.lr_scheduler_type, t.save_steps) == (5e-5, 3, "linear", 500)
    assert (t.per_device_train_batch_size, t.gradient_accumulation_steps, t.warmup_ratio) == (8, 1, 0)
    assert settings("--use_lora")[0].model.dtype == "float32"


@pytest.mark.parametrize("on", [["--bf16"], ["--bf16", "True"], ["--bf16=true"], ["--bf16", "1"]])
def test_booleans_as_hf_takes_them(on):
    assert settings("--use_lora", *on)[0].model.dtype == "bfloat16"
    assert settings("--use_lora", "True", "--bf16", "False")[0].model.dtype == "float32"
    with pytest.raises(ConfigError, match="True or False"):
        settings("--use_lora", "--bf16", "maybe")


@pytest.mark.parametrize("words", ["--deepspeed ds.json", "--q_lora", "--fp16 True", "--report_to wandb"])
def test_a_flag_without_meaning_gets_one_line(words):
    notes = settings("--use_lora", *words.split())[1]
    assert len(notes) == 1
    assert words.split()[0].strip("-") in notes[0]


def test_an_evaluation_takes_its_rows_and_its_rhythm():
    c = settings("--use_lora", "--eval_data_path", "E.json", "--evaluation_strategy", "steps", "--eval_steps", "50")[0]
    assert (c.data.dev_path, c.train.eval_steps) == ("E.json", 50)
    assert settings("--use_lora", "--eval_data_path", "E.json")[0].data.dev_path is None  # HF's default is no


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--model_name_or_path", "M"], "Add --use_lora"),
        (["--use_lora", "False"], "Add --use_lora"),
        (["--use_lora", "--lerning_rate", "1"], "Did you mean --learning_rate"),
        (["--use_lora", "--learning_rate"], "needs a value"),
        (["stray", "--use_lora"], "unexpected 'stray'"),
    ],
)
def test_bad_words_exit_with_2(words, said):
    done = subprocess.run([sys.executable, ROOT / "finetune.py", *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


def test_it_trains_as_cmqa_train_does_and_plain_peft_answers(tmp_path):
    """Same rows, same settings, two front ends: the same losses and the same adapter, byte for byte."""
    data = tmp_path / "rows.json"
    rows = [
        {
            "id": str(i),
            "conversations": [
                {"from": "user", "value": f"头痛{i}天"},
                {"from": "assistant", "value": "多休息。" * (1 + i % 3)},
            ],
        }
        for i in range(12)
    ]
    data.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    seed = dict(zip(("M", "D.json", "O"), ("tiny", str(data), str(tmp_path / "seed")), strict=True))
    words = [seed.get(w, w) for w in SEED]
    done = subprocess.run([sys.executable, ROOT / "finetune.py", *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    ours = (
        f"train --model tiny --data {data} --output-dir {tmp_path / 'ours'} --model.dtype bfloat16 "
        "--num-train-epochs 5 "
        "--per-device-train-batch-size 2 --gradient-accumulation-steps 8 --save-steps 1000 --learning-rate 3e-4 "
        "--weight-decay 0.1 --adam-beta2 0.95 --warmup-ratio 0.01 --lora-dropout 0.05 --gradient-checkpointing"
    ).split()
    code = "import sys; from lora_cmqa.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *ours], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    names = ("adapter_model.safetensors", "generation_config.json", "fingerprint.json")
    for name in names:
        assert (tmp_path / "seed" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()

    for run in (tmp_path / "seed", next((tmp_path / "seed").glob("checkpoint-*"))):
        done = subprocess.run(
            [sys.executable, ROOT / "load_lora_adapter.py", str(run), "--max-new-tokens", "3"],
            capture_output=True,
            timeout=120,
            encoding="utf-8",
            errors="replace",
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("基座 base：") == done.stdout.count("适配器 adapter：") == 2
        assert "我家宝宝六个月" in done.stdout
