"""--fit auto: the plan's settings are the run's, what a person set is kept, and no result depends on the choice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_cmqa.config import Config, as_yaml, parse
from lora_cmqa.core import Pack
from lora_cmqa.data.stream import BatchStream
from lora_cmqa.errors import ResourceError, RunError
from lora_cmqa.kernels.head import CHUNK
from lora_cmqa.models.sizes import SHAPES
from lora_cmqa.train import fit, loop, step
from lora_cmqa.train import plan as planning
from lora_cmqa.train.ledger import Setup, growth, peak, phases
from lora_cmqa.train.plan import HEAD_CHUNK, Memory, by_hand, choose, plan, setup_of

from .test_step import encoded

MIB, CUDA = 2**20, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def left_open(config: Config) -> Config:
    return replace(config, train=replace(config.train, max_tokens=None, head_chunk=None, gradient_checkpointing=None))


def memory_json(folder: Path) -> dict:
    return json.loads((folder / "memory.json").read_text())


def adapter(folder: Path) -> torch.Tensor:
    tensors = load_file(folder / "adapter_model.safetensors")
    return torch.cat([tensors[k].double().flatten() for k in sorted(tensors)])


@pytest.fixture
def free(monkeypatch):
    """Set what this machine has free."""

    def to(count: int) -> None:
        monkeypatch.setattr(planning, "_free_of_machine", lambda: count)

    return to


def between(config: Config) -> int:
    """Free memory into which `config` fits, but not as it would be taken with all memory of the world."""
    shape = SHAPES["tiny-qwen2"]
    whole = setup_of(config, shape, on_gpu=False)
    least = min(peak(s).bytes for s in planning._candidates(whole))
    most = peak(whole).bytes
    assert least < most * (1 - planning.MARGIN)
    return round((least + most * 0.98) / 2 / (1 - planning.MARGIN))


def test_the_plans_settings_are_the_runs(settings, free):
    config = left_open(settings(max_steps=2))
    free(between(config))
    expected = plan(config)
    assert not expected["asked"]["fits"] or expected["recipe"]["train.checkpoint_layers"] > 0
    folder = loop.train(config)
    found = memory_json(folder)
    assert found["by_hand"] == []
    assert {k: found["settings"][k] for k in found["settings"]} == {k: expected["recipe"][k] for k in found["settings"]}
    assert found["predicted_peak_bytes"] == expected["predicted_peak_bytes"] <= found["memory"]["bytes"]


def test_no_result_depends_on_the_choice(settings, free, tmp_path):
    """float64, without dropout (its masks are drawn by micro-batch): little memory, much memory, and --fit off."""
    free(16 * 2**30)
    base = left_open(settings(max_steps=3))
    base = replace(base, model=replace(base.model, dtype="float64"), lora=replace(base.lora, lora_dropout=0.0))

    def run(name: str, **changes) -> Path:
        return loop.train(replace(base, train=replace(base.train, output_dir=str(tmp_path / name), **changes)))

    much, off = run("much"), run("off", fit="off")
    assert memory_json(much)["settings"] == memory_json(off)["settings"]
    assert adapter(much).equal(adapter(off))
    free(between(base))
    little = run("little")
    assert memory_json(little)["settings"] != memory_json(much)["settings"]
    assert (adapter(little) - adapter(much)).norm() <= 1e-10 * adapter(much).norm()


def test_what_was_set_by_hand_is_kept(settings, free):
    config = left_open(settings(max_steps=1))
    config = replace(config, train=replace(config.train, gradient_checkpointing=False))
    free(between(config))
    folder = loop.train(config)
    found = memory_json(folder)
    assert found["by_hand"] == ["train.gradient_checkpointing"]
    assert found["settings"]["train.gradient_checkpointing"] is False
    assert found["settings"]["train.checkpoint_layers"] == 0


def test_what_cannot_fit_is_refused_in_words_before_the_base_is_loaded(settings, free, monkeypatch):
    monkeypatch.setattr(loop, "load_model", lambda *args, **kwargs: pytest.fail("the base was loaded"))
    config = left_open(settings())
    by_hand_too_large = replace(config, train=replace(config.train, max_tokens=2048, gradient_checkpointing=False))
    free(between(config))
    with pytest.raises(ResourceError, match=r"with --gradient-checkpointing False  --max-tokens 2048") as caught:
        loop.train(by_hand_too_large)
    assert "--checkpoint-layers" in (caught.value.hint or "")
    assert "--fit off" in (caught.value.hint or "")
    free(100 * MIB)
    with pytest.raises(ResourceError, match="Python, torch and other libraries") as caught:
        loop.train(config)
    assert "a smaller base" in (caught.value.hint or "")


def test_a_4_bit_base_is_proposed_and_never_taken():
    config = Config(model=replace(Config().model, name_or_path="Qwen-7B", dtype="bfloat16"))
    card = Memory(10 * 2**30, "RTX 3090", free=False)
    choice = choose(config, SHAPES["Qwen-7B"], card)
    assert choice.chosen.quantization == "none"
    assert peak(choice.chosen).bytes > card.bytes
    refused = fit._refused(config, choice.asked, choice.chosen, card)
    assert "--quantization nf4" in (refused.hint or "")


def test_a_resume_takes_the_stored_choice(settings, free, monkeypatch):
    config = left_open(settings(max_steps=4, save_steps=1))
    free(between(config))
    calls = []

    def stopped(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise ValueError("stopped")
        return step.train_step(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", stopped)
    with pytest.raises(ValueError, match="stopped"):
        loop.train(config)
    chosen = memory_json(Path(config.train.output_dir))["settings"]
    free(16 * 2**30)  # would be chosen otherwise now
    whole = loop.train(config)
    assert memory_json(whole)["settings"] == chosen
    free(between(config))
    straight = loop.train(
        replace(config, train=replace(config.train, output_dir=config.train.output_dir + "-straight"))
    )
    assert adapter(whole).equal(adapter(straight))


def test_settings_left_open_are_those_that_were_chosen(settings, free):
    free(16 * 2**30)
    config = left_open(settings(max_steps=1))
    folder = loop.train(config)
    before = (folder / "trainer_state.json").read_bytes()
    chosen = memory_json(folder)["settings"]["train.max_tokens"]
    loop.train(replace(config, train=replace(config.train, max_tokens=chosen)))  # the same, said by hand
    assert (folder / "trainer_state.json").read_bytes() == before
    with pytest.raises(RunError, match="max-tokens"):
        loop.train(replace(config, train=replace(config.train, max_tokens=chosen // 2)))
    (folder / "memory.json").write_text("{}")
    with pytest.raises(RunError, match="does not tell what this run has chosen"):
        loop.train(config)


# ---- the fullest micro-batch -----------------------------------------------------------------------------------------


@pytest.fixture
def little_memory(free, settings):
    """Enough for the plan, not twice as much: the fullest micro-batch is tried."""
    fullest = planning.plan(settings())["predicted_peak_bytes"]
    free(round(1.5 * fullest / (1 - planning.MARGIN)))


def heavier_packs(monkeypatch) -> list[Pack]:
    """Each pack takes 64 MiB more (what the tiny model takes lies in the heap); the packs in their order."""
    seen: list[Pack] = []
    real = step.pack_losses

    def heavier(model, p, **more):
        seen.append(p)
        return real(model, p, **more) + torch.ones(MIB * 16).sum() * 0

    monkeypatch.setattr(step, "pack_losses", heavier)
    return seen


@pytest.mark.parametrize(("times", "tried"), [(1.5, True), (3, False)])
def test_the_fullest_is_tried_where_the_memory_is_not_ample(settings, free, monkeypatch, times, tried):
    fullest = planning.plan(settings())["predicted_peak_bytes"]
    free(round(times * fullest / (1 - planning.MARGIN)))
    steps, real = [], step.backward

    def seen(model, batch, *args):
        steps.append(batch.step)
        return real(model, batch, *args)

    monkeypatch.setattr(step, "backward", seen)
    loop.train(settings(max_steps=2))
    assert steps == ([0, 1, 2] if tried else [1, 2])


def test_without_a_trial_the_fullest_pack_of_the_first_step_is_compared(settings, free, monkeypatch):
    free(16 * 2**30)
    seen = heavier_packs(monkeypatch)
    folder = loop.train(settings(max_steps=1, per_device_train_batch_size=8))
    assert len(seen) > 1
    assert memory_json(folder)["first_step"]["tokens"] == max(p.tokens for p in seen)


def test_predicted_and_measured_are_stored_and_said_once(settings, little_memory, capsys, monkeypatch):
    seen = heavier_packs(monkeypatch)
    config = settings(max_steps=2)
    folder = loop.train(config)
    assert seen[0].tokens == max(p.tokens for p in seen)  # the fullest comes first
    found = memory_json(folder)["first_step"]
    assert found["tokens"] == seen[0].tokens
    assert found["measured_bytes"] >= 60 * MIB
    assert found["error"] == pytest.approx(found["predicted_bytes"] / found["measured_bytes"] - 1, abs=1e-4)
    said = capsys.readouterr().err
    assert said.count("GiB planned") == 1  # without --memory-limit the C library's share is not there yet
    assert "Off most" not in said
    assert found["row"]  # the ledger knows nothing of those 64 MiB


def test_out_of_memory_in_the_fullest_one_is_cut_before_the_first_step(settings, little_memory, monkeypatch):
    calls, real = [], step.pack_losses

    def once(*args, **kwargs):
        calls.append(1)
        if len(calls) == 1:
            raise CUDA
        return real(*args, **kwargs)

    config = settings(max_steps=2)
    config = replace(config, lora=replace(config.lora, lora_dropout=0.0))  # masks are drawn by micro-batch
    plain = loop.train(config)
    config = replace(config, train=replace(config.train, output_dir=str(plain) + "-cut"))
    monkeypatch.setattr(step, "pack_losses", once)
    folder = loop.train(config)
    assert json.loads((folder / "trainer_state.json").read_text())["max_tokens"] < config.train.max_tokens
    assert (adapter(folder) - adapter(plain)).norm() <= 1e-4 * adapter(plain).norm()


def test_the_fullest_micro_batch_is_as_full_as_any_of_the_run():
    rows = encoded(40)
    stream = BatchStream(rows, rows_per_step=8, max_tokens=300, max_steps=10)
    fullest = stream.largest().packs[0]
    assert len(fullest.example_ids) <= 8
    assert fullest.tokens >= 0.95 * max(p.tokens for batch, _ in stream for p in batch.packs)
    few = BatchStream(rows, rows_per_step=2, max_tokens=10**6, max_steps=1).largest().packs[0]
    assert few.tokens == sum(sorted(map(len, rows))[-2:])


@pytest.mark.parametrize(
    ("kept", "peak_more", "after_more", "row"),
    [
        (2.0, 0, 0, "activations: layers"),
        (1.0, 10**9, 0, "head: logits of a chunk"),
        (1.0, 0, 10**9, "LoRA optimizer states"),
    ],
)
def test_the_row_that_is_off_most_is_named(kept, peak_more, after_more, row):
    setup = Setup(SHAPES["Qwen3-0.6B"], dtype="float32", on_gpu=True, max_tokens=2048)
    predicted = growth(setup, first_step=True)
    rows = {r.name: r.bytes for r in {p.name: p for p in phases(setup)}["forward"].rows}
    keeps = sum(v for k, v in rows.items() if k.startswith(("activations", "LoRA A in", "head: states")))
    after = rows["LoRA optimizer states"]
    readings = fit.Readings(torch.device("cpu"), 0, resets=True)
    readings.kept, readings.after = round(keeps * kept), after + after_more
    readings.peak = predicted.bytes + round(keeps * (kept - 1)) + peak_more
    if not peak_more and kept == 1.0:
        readings.peak = round(predicted.bytes * 1.12)  # off, but by less than what stays after the step
    assert fit.compare(setup, readings)["row"] == row


def test_nothing_is_named_within_a_tenth():
    setup = Setup(SHAPES["Qwen3-0.6B"], on_gpu=True)
    readings = fit.Readings(
        torch.device("cpu"), 0, resets=True, peak=round(growth(setup, first_step=True).bytes * 1.05)
    )
    assert "row" not in fit.compare(setup, readings)


def test_defaults_by_hand_and_left_open_are_told_apart(tmp_path):
    assert by_hand(Config()) == frozenset()
    assert HEAD_CHUNK == CHUNK
    for flag, value in (("--max-tokens 2048", "max_tokens"), ("--no-gradient-checkpointing", "gradient_checkpointing")):
        config = parse(Config, flag.split())
        assert by_hand(config) == {value}
        (tmp_path / "c.yaml").write_text(as_yaml(config))
        assert parse(Config, yaml_file=tmp_path / "c.yaml") == config
    assert parse(Config, ["--gradient-checkpointing"]).train.gradient_checkpointing is True
    assert parse(Config, ["--gradient-checkpointing", "False"]).train.gradient_checkpointing is False
