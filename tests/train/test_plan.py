"""The plan: quick, without torch, adding up; true to Qwen's published table; the fastest settings that fit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from lora_cmqa.cli import main
from lora_cmqa.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig, parse
from lora_cmqa.core import TokenizedExample
from lora_cmqa.data.pack import make_pack
from lora_cmqa.errors import ConfigError, ModelError
from lora_cmqa.kernels import attention
from lora_cmqa.lora.decoder import checkpoint_activations, pack_losses, why_plain
from lora_cmqa.lora.inject import inject_lora
from lora_cmqa.messages import set_language
from lora_cmqa.models.sizes import SHAPES, Shape
from lora_cmqa.train import plan as planning
from lora_cmqa.train import qwen_recipe
from lora_cmqa.train.ledger import Setup, kept, last_layer_keeps, peak, phases
from lora_cmqa.train.plan import Memory, cost, explain, plan, solve

GIB = 2**30
CARD = Memory(24 * GIB, "gpu", free=False)
# Qwen-7B, 32 layers, r 64, length 512, 16 rows a step, as the README that this project began from.
SEED = Config(
    model=ModelConfig(name_or_path="models/Qwen-7B"),
    data=DataConfig(model_max_length=512),
    lora=LoraConfig(r=64),
    train=TrainConfig(per_device_train_batch_size=2, gradient_accumulation_steps=8, bf16=True),
)


def test_without_torch_in_under_two_seconds():
    argv = ["plan", "--model", "Qwen-7B", "--gpu-memory", "24GiB", "--json"]
    code = f"from lora_cmqa.cli import main; main({argv}); import sys; assert 'torch' not in sys.modules"
    before = os.times()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    spent = os.times()
    # Of the processor: on a busy machine the clock counts others' work too.
    assert spent.children_user + spent.children_system - before.children_user - before.children_system < 2
    result = json.loads(done.stdout)
    assert {"predicted_peak_bytes", "fits", "recipe", "ledger"} <= result.keys()
    assert all(row.keys() == {"name", "bytes"} for row in result["ledger"])


@pytest.mark.parametrize("recipe", ["ours", "qwen-finetune"])
@pytest.mark.parametrize("model", SHAPES)
def test_the_ledger_adds_up_for_every_shape(model, recipe):
    config = replace(SEED, model=ModelConfig(name_or_path=model))
    result = plan(config, gpu_memory="24GiB", recipe=recipe)
    assert sum(row["bytes"] for row in result["ledger"]) == result["predicted_peak_bytes"]
    for phase in result["phases"]:
        assert sum(row["bytes"] for row in phase["ledger"]) == phase["bytes"]
        assert all(row["bytes"] > 0 for row in phase["ledger"])
    assert result["predicted_peak_bytes"] == max(p["bytes"] for p in result["phases"] if not p["on_host"])
    assert result["fits"] == (result["predicted_peak_bytes"] <= 24 * GIB)


# ---- the seed --------------------------------------------------------------------------------------------------------

# QwenLM/Qwen, README, "Profiling of Memory and Speed": one A100-80G, FlashAttention 2, batch 1. (length, GB).
PUBLISHED = {
    "lora": {512: 20.4, 1024: 21.5},
    "lora with embeddings": {512: 34.1, 1024: 35.2},
    "q-lora": {512: 11.5, 1024: 12.3},
}


@pytest.mark.parametrize(("kind", "length"), [(k, n) for k, row in PUBLISHED.items() for n in row])
def test_the_recipes_ledger_is_within_a_tenth_of_the_published_table_in_gb_and_in_gib(kind, length):
    predicted = qwen_recipe.peak(
        SHAPES["Qwen-7B"],
        r=64,
        length=length,
        batch=1,
        embeddings=kind == "lora with embeddings",
        quantised=kind == "q-lora",
        foreach_lists=2,
    ).bytes
    published = PUBLISHED[kind][length]
    assert abs(predicted / 1e9 / published - 1) < 0.1
    assert abs(predicted / GIB / published - 1) < 0.1


def test_the_seeds_settings_fit_with_all_layers_and_take_less_than_its_own_script():
    ours, theirs = (plan(SEED, gpu_memory="24GiB", recipe=r) for r in ("ours", "qwen-finetune"))
    assert ours["fits"]
    assert ours["predicted_peak_bytes"] < 24 * GIB < theirs["predicted_peak_bytes"]
    assert not theirs["fits"]


def test_the_seeds_failure_and_its_cure_are_named():
    result = plan(SEED, gpu_memory="24GiB", recipe="qwen-finetune")
    assert result["why"]["embedding_parameters"] == 1_244_659_712
    assert any(row["name"].startswith("modules_to_save wte, lm_head") for row in result["ledger"])
    assert result["why"]["without_embeddings_bytes"] < 24 * GIB
    assert result["why"]["half_of_the_layers_bytes"] < 24 * GIB  # why the seed's user got away with 16 layers
    text = explain(result)
    for word in ("chat", "wte", "lm_head", "16"):
        assert word in text
    chat = replace(SEED, model=ModelConfig(name_or_path="models/Qwen-7B-Chat"))
    cured = plan(chat, gpu_memory="24GiB", recipe="qwen-finetune")
    assert cured["fits"]
    assert cured["predicted_peak_bytes"] == result["why"]["without_embeddings_bytes"]


def test_a_base_cut_to_its_first_layers():
    whole, half = (
        plan(replace(SEED, model=replace(SEED.model, num_hidden_layers=n)), gpu_memory="80GiB") for n in (None, 16)
    )
    assert whole["model"]["parameters"] - half["model"]["parameters"] == 16 * 202_395_648
    assert half["predicted_peak_bytes"] < whole["predicted_peak_bytes"] - 6 * GIB


def test_training_whole_modules_has_its_own_rows():
    whole = replace(SEED, lora=LoraConfig(modules_to_save=("wte", "lm_head")))
    result = plan(whole, gpu_memory="80GiB")
    rows = {row["name"]: row["bytes"] for row in result["ledger"]}
    assert rows["modules_to_save: copies"] == 2 * 1_244_659_712
    assert rows["modules_to_save: optimizer states"] == 4 * 1_244_659_712
    assert any(s["flag"] == "--modules-to-save none" and s["frees_bytes"] > 9 * GIB for s in result["switches"])


# ---- presets: configs/ named by model and memory ---------------------------------------------------------------------

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PRESETS = {"qwen-7b-24gb": "24GiB", "qwen2.5-7b-8gb": "8GiB", "qwen3-8b-24gb": "24GiB", "qwen3-0.6b-cpu": None}


@pytest.mark.parametrize("name", PRESETS)
def test_each_preset_fits_as_it_is_written(name, monkeypatch):
    monkeypatch.setattr(planning, "_free_of_machine", lambda: 16 * GIB)
    result = plan(parse(Config, yaml_file=CONFIGS / f"{name}.yaml"), gpu_memory=PRESETS[name])
    assert result["fits"]
    assert result["asked"]["fits"]
    assert all(result["asked"][k] == v for k, v in result["recipe"].items() if k != "name")  # nothing had to change
    assert sum(row["bytes"] for row in result["ledger"]) == result["predicted_peak_bytes"]


def test_every_config_that_names_a_memory_is_planned():
    named = {f.stem for f in CONFIGS.glob("*.yaml") if f.stem.rsplit("-", 1)[-1].endswith(("gb", "cpu"))}
    assert named == set(PRESETS)


def test_a_limit_on_a_cpu_bounds_the_plan():
    free = replace(SEED, model=ModelConfig("embedded", device="cpu", dtype="float32"))
    bound = replace(free, train=replace(free.train, memory_limit="3GiB"))
    rows = {row["name"] for row in plan(free)["ledger"]}
    assert "freed, and held by the C library" in rows
    result = plan(bound)
    assert result["memory"]["bytes"] <= 3 * GIB
    assert "freed, and held by the C library" not in {row["name"] for row in result["ledger"]}


# ---- the solver ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["Qwen-7B", "Qwen3-8B", "Qwen2.5-7B", "Qwen3-4B", "embedded"])
@pytest.mark.parametrize("memory", [2, 8, 12, 16, 24, 80])
def test_what_is_chosen_is_the_fastest_that_fits(model, memory):
    asked, room = Setup(SHAPES.get(model) or planning.shape_of(model)), Memory(memory * GIB, "RTX 3090", free=False)
    chosen = solve(asked, room)
    assert chosen.max_tokens <= asked.max_tokens
    assert chosen.longest_row == asked.longest_row
    every = list(planning._candidates(asked))
    fitting = [s for s in every if peak(s).bytes <= room.bytes * (1 - planning.MARGIN)]
    if asked in fitting:
        assert chosen == asked
    elif fitting:
        assert cost(chosen, room) == min(cost(s, room) for s in fitting)
        assert chosen in fitting
    else:
        assert peak(chosen).bytes == min(peak(s).bytes for s in every)


def test_each_switch_moves_memory_the_way_it_says():
    setup = Setup(SHAPES["Qwen-7B"], max_tokens=2048)
    now = peak(setup).bytes
    for change in (
        {"max_tokens": 1024},
        {"checkpoint_layers": 8},
        {"checkpoint_layers": 32},
        {"r": 16},
        {"head_chunk": 64},
    ):
        assert peak(replace(setup, **change)).bytes < now, change
    for switch in planning.switches(setup, CARD):
        if switch.flag == "--gradient-checkpointing":
            assert switch.time == pytest.approx(0.5, abs=0.1)  # 4 operations a parameter become 6
    assert peak(replace(setup, trained_whole=10**9)).bytes > now + 8 * 10**9


def test_a_micro_batch_is_never_larger_than_a_step():
    small = replace(SEED, train=replace(SEED.train, gradient_accumulation_steps=1, max_tokens=8192))
    assert planning.setup_of(small, SHAPES["Qwen-7B"], on_gpu=True).tokens == 2 * 512


def test_the_memory_of_the_card_it_sees(tmp_path, monkeypatch):
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'NVIDIA GeForce RTX 3090, 23900'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    result = plan(SEED)
    assert result["memory"] == {"bytes": 23900 * 2**20, "device": "NVIDIA GeForce RTX 3090", "free": True}
    assert plan(replace(SEED, model=ModelConfig("Qwen-7B", device="cpu")))["memory"]["device"] == "cpu"


# ---- data, printing, bad input ---------------------------------------------------------------------------------------


def test_operations_and_time_of_an_epoch(tmp_path):
    file = tmp_path / "rows.json"
    rows = [
        {
            "id": str(i),
            "conversations": [{"from": "user", "value": "问" * 60}, {"from": "assistant", "value": "答" * 90}],
        }
        for i in range(10)
    ]
    file.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    config = replace(SEED, data=replace(SEED.data, path=str(file)))
    epoch = plan(config, gpu_memory="24GiB", gpu="RTX 3090")["epoch"]
    assert epoch["rows"] == 10
    assert epoch["tokens"] == pytest.approx(10 * (0.67 * 150 + 10), abs=10)
    body = 32 * SHAPES["Qwen-7B"].linear_parameters
    assert 4 * body * epoch["tokens"] < epoch["flops"] < 5 * body * epoch["tokens"]
    assert epoch["seconds"] == pytest.approx(epoch["flops"] / 71e12 / epoch["assumed_mfu"])


@pytest.fixture
def language_afterwards():
    yield
    set_language(None)


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_the_table_and_the_page(lang, tmp_path, capsys, language_afterwards):
    page = tmp_path / "plan.html"
    argv = ["--lang", lang, "plan", "--model", "models/Qwen-7B", "--gpu-memory", "24GiB", "--html", str(page)]
    assert main(argv) == 0
    out = capsys.readouterr().out
    assert "LoRA optimizer states" in out
    assert "--gradient-checkpointing" in out
    assert main([*argv, "--recipe", "qwen-finetune"]) == 0
    assert "chat" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert f'lang="{lang}"' in text
    assert "modules_to_save wte, lm_head" in text
    assert not re.search(r"""(src|href)=["']?https?:""", re.sub(r"(?s)(<script[^>]*>).*?</script>", r"\1", text))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"gpu_memory": "lots"}, ConfigError, "24GiB"),
        ({"gpu": "RTX 9000", "gpu_memory": "24GiB"}, ConfigError, "RTX 3090"),
        ({"model": "Qwen-8B", "gpu_memory": "24GiB"}, ModelError, "Qwen-7B"),
        ({"targets": ("q_prj",), "gpu_memory": "24GiB"}, ConfigError, "q_proj"),
        ({"whole": ("wtf",), "gpu_memory": "24GiB"}, ConfigError, "embed_tokens"),
    ],
)
def test_bad_input_is_said(change, error, says):
    config = replace(
        SEED,
        model=ModelConfig(name_or_path=change.pop("model", "Qwen-7B")),
        lora=LoraConfig(target_modules=change.pop("targets", ("all-linear",)), modules_to_save=change.pop("whole", ())),
    )
    with pytest.raises(error) as caught:
        plan(config, **change)
    assert says in str(caught.value)


def test_rows_of_all_phases_are_named_once():
    for phase in phases(Setup(SHAPES["Qwen3-8B"], checkpoint_layers=4, trained_whole=5)):
        names = [row.name for row in phase.rows]
        assert len(names) == len(set(names))


def test_gradients_lie_beside_the_forward_where_a_step_has_several_micro_batches():
    several = Setup(SHAPES["Qwen-7B"], r=64, max_tokens=1024, step_tokens=8192)
    alone = replace(several, step_tokens=1024)

    def rows(setup: Setup, name: str) -> dict[str, int]:
        return {row.name: row.bytes for row in {p.name: p for p in phases(setup)}[name].rows}

    for moment in ("forward", "backward"):
        assert rows(several, moment)["LoRA gradients"] == 4 * several.shape.lora_parameters(64)
        assert "LoRA gradients" not in rows(alone, moment)
    for setup in (several, alone):
        assert "LoRA gradients" in rows(setup, "optimizer")
    assert peak(alone).bytes < peak(several).bytes
    config = replace(SEED, train=replace(SEED.train, max_tokens=16 * 512))
    whole_step = planning.setup_of(config, SHAPES["Qwen-7B"], on_gpu=True)
    assert not whole_step.accumulates
    assert replace(whole_step, max_tokens=1024).accumulates  # as the solver cuts it


def test_recomputed_layers_come_when_the_others_are_gone():
    setup = Setup(SHAPES["Qwen3-8B"], checkpoint_layers=4, max_tokens=1024, longest_row=512)
    by_name = {p.name: {row.name: row.bytes for row in p.rows} for p in phases(setup)}
    assert "activations: layers" not in by_name["recomputed"]
    assert "activations: the layer that is recomputed" not in by_name["backward"]
    assert by_name["recomputed"]["activations: inputs of recomputed layers"] == 3 * 1024 * 4096 * 2
    assert not any(row.name.startswith("activations") for row in phases(replace(setup, checkpoint_layers=0))[4].rows)


# ---- the ledger against what processes took: benchmarks/results/memory.jsonl -----------------------------------------


def test_the_ledger_is_within_a_tenth_of_what_was_measured(benchmark_script):
    """By the ledger as it is now, on every configuration of 500 MB and more; the odd ones no constant has seen."""
    found = {n: (p, m) for n, (p, m) in benchmark_script("memory").predicted_and_measured().items() if p >= 500e6}
    assert len(found) >= 20
    assert len([n for n in found if n % 2]) >= 10
    assert {n: p / m - 1 for n, (p, m) in found.items() if abs(p / m - 1) > 0.1} == {}


# ---- the ledger against what autograd keeps --------------------------------------------------------------------------

KINDS = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM),
}


def built(kind: str, kv_heads: int, layers: int = 4) -> tuple[torch.nn.Module, Shape]:
    shape = Shape("x", kind, 1000, 256, layers, 4, kv_heads, 64, 700, False)
    config, model = KINDS[kind]
    made = model(
        config(
            vocab_size=shape.vocab,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=kv_heads,
            head_dim=shape.head_dim,
            tie_word_embeddings=shape.tied,
        )
    )
    return made.requires_grad_(False), shape


def bytes_kept(model: torch.nn.Module, pack) -> int:
    """Of all storages that the graph of the losses holds, but weights and buffers."""
    why_plain(model)  # joins the weights first
    own = {x.untyped_storage().data_ptr() for x in (*model.parameters(), *model.buffers())}
    kept: dict[int, torch.Tensor] = {}

    def remember(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor):
        losses = pack_losses(model, pack, chunk=64)
    assert losses.requires_grad
    return sum(t.untyped_storage().nbytes() for address, t in kept.items() if address not in own)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("layers_recomputed", [0, 2])
@pytest.mark.parametrize("as_on_a_card", [False, True])
def test_what_a_layer_keeps_is_what_the_ledger_says(kind, kv_heads, layers_recomputed, as_on_a_card, monkeypatch):
    """Rows of unlike length, as real ones are; with recomputation only what the other layers keep is counted here.
    Attention as on a card: on a CPU short rows keep their weights in place of what torch's attention keeps."""
    if as_on_a_card:
        monkeypatch.setattr(attention, "_PRODUCTS_WIDTH", 0)
    model, shape = built(kind, kv_heads)
    model = inject_lora(model, r=16).train()
    if layers_recomputed:
        checkpoint_activations(model, layers_recomputed)
    rows = []
    for i, length in enumerate((128, 120, 115, 100, 90, 60, 30, 20)):
        ids = (torch.arange(length) * 7 % shape.vocab).numpy().astype("int32")
        labels = ids.copy()
        labels[: length // 2] = -100
        rows.append(TokenizedExample(ids, labels, str(i), str(i)))
    pack = make_pack(rows)
    setup = Setup(
        shape,
        dtype="float32",
        r=16,
        max_tokens=pack.tokens,
        longest_row=max(pack.row_lengths),
        mean_row=sum(n * n for n in pack.row_lengths) / pack.tokens,
        supervised=pack.supervised_tokens / pack.tokens,
        checkpoint_layers=layers_recomputed,
        on_gpu=as_on_a_card,
    )
    head_keeps = 2 * pack.supervised_tokens * shape.hidden * setup.value_bytes  # last norm's input, the gradient
    predicted = sum(row.bytes for row in (*kept(setup), last_layer_keeps(setup))) + head_keeps
    assert predicted == pytest.approx(bytes_kept(model, pack), rel=0.03)
