"""A run that is stopped in any way and started again ends as the one that never stopped, byte for byte (CPU)."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lora_cmqa.config import as_yaml
from lora_cmqa.errors import ConfigError, Interrupted, ResourceError, RunError
from lora_cmqa.kernels.table import rms_norm
from lora_cmqa.train import commit, loop, step
from lora_cmqa.train.checkpoint import damage, list_checkpoints, newest_whole
from lora_cmqa.train.loop import train
from lora_cmqa.train.run_folder import CUTS, read_cuts

from .conftest import in_a_child, outcome, sha256, without_time

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parents[2]


_seeds: list[int] = []  # the first whose best is not its last, on this processor


@pytest.fixture
def seven(settings, tmp_path):
    """seven() -> settings of a run of 7 steps with dropout, a dev set, and a best that is not the last."""

    def make(**train):
        return settings(**{"max_steps": 7, "learning_rate": 0.2, **train})

    for seed in range(0 if _seeds else 20):
        state = outcome(train(make(seed=seed, output_dir=str(tmp_path / f"seed-{seed}"))))["state"]
        if 0 < state["best_global_step"] < 7:
            _seeds.append(seed)
            break
    return lambda **train: make(**{"seed": _seeds[0], **train})


@pytest.fixture
def to_the_end(seven, tmp_path):
    """What it gives when nobody stops it."""
    ended = outcome(train(seven(output_dir=str(tmp_path / "whole"))))
    assert 0 < ended["state"]["best_global_step"] < 7
    return ended


def killed(config, where: str, count: int) -> None:
    """Train in a child that kills itself with SIGKILL: before its n-th step, in the middle of the n-th file that is
    written into a checkpoint, or when the n-th checkpoint is whole and waits for its rename."""
    owner, name = {"step": (loop, "train_step"), "write": (commit, "_write_synced"), "rename": (commit, "sync_folder")}[
        where
    ]
    real, calls = getattr(owner, name), 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += where == "step" or ".checkpoint-" in str(args[0])
        if calls == count:
            if where == "write":
                Path(args[0]).write_bytes(args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    def child():
        setattr(owner, name, counted)
        train(config)

    assert in_a_child(child) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("where", "count"),
    [("step", 1), ("step", 4), ("step", 7), ("write", 5), ("write", 37), ("rename", 2)],
)
def test_case_37_killed_once_and_started_again(seven, to_the_end, where, count):
    killed(seven(), where, count)
    assert outcome(train(seven())) == to_the_end


def test_case_37_killed_twice_inside_the_same_save(seven, tmp_path, to_the_end):
    run = tmp_path / "run"
    for count in (9, 12):
        killed(seven(), "write", count)
        assert [p.name for p in run.glob(".checkpoint-*")] == [".checkpoint-2.tmp"]
    (run / ".config.yaml.tmp").write_text("what a kill in another write leaves")
    assert outcome(train(seven())) == to_the_end
    assert not list(run.glob(".*"))


def test_case_39_half_the_steps_and_the_other_half_are_all_the_steps(seven, tmp_path, to_the_end):
    """2N steps = N steps, an end, N steps: in processes of their own, by the command line."""
    config = tmp_path / "config.yaml"
    config.write_text(as_yaml(seven()))
    killed(seven(), "step", 5)
    command = [sys.executable, "-m", "lora_cmqa.cli", "train", str(config)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert "checkpoint-4" in done.stderr
    assert outcome(tmp_path / "run") == to_the_end
    before = every_file(tmp_path / "run")
    assert subprocess.run(command, capture_output=True, timeout=120, check=False).returncode == 0  # finished already
    assert every_file(tmp_path / "run") == before


def test_a_run_depends_on_no_random_state_that_is_not_stored(seven, to_the_end, monkeypatch):
    """Python's and numpy's global generators are shaken before each step: outsiders draw from them, we do not."""
    real = loop.train_step

    def shaken(*args, **kwargs):
        random.seed()
        np.random.seed()
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", shaken)
    assert outcome(train(seven())) == to_the_end


def test_deterministic_kernels_are_asked_for_and_given_back(seven, tmp_path, to_the_end, monkeypatch):
    real, asked = loop.train_step, []

    def seen(*args, **kwargs):
        asked.append(torch.are_deterministic_algorithms_enabled())
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", seen)
    killed(seven(deterministic=True), "step", 4)
    ours = outcome(train(seven(deterministic=True)))
    assert asked
    assert all(asked)
    assert not torch.are_deterministic_algorithms_enabled()
    assert {k: v for k, v in ours.items() if k != "card"} == {k: v for k, v in to_the_end.items() if k != "card"}
    monkeypatch.setattr(loop, "train_step", lambda *_, **__: torch.zeros(2).put_(torch.tensor([0]), torch.ones(1)))
    with pytest.raises(ConfigError, match="put_ does not have a deterministic"):
        train(seven(deterministic=True, output_dir=str(tmp_path / "other")))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_case_40_a_signal_leaves_a_checkpoint_at_the_next_step(seven, tmp_path, to_the_end, monkeypatch, number, code):
    real, calls = loop.train_step, []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a second one is harmless
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", signalled)
    with pytest.raises(Interrupted) as stopped:
        train(seven())
    assert stopped.value.exit_code == code
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-3"
    assert outcome(train(seven())) == to_the_end


def test_case_40_a_second_signal_inside_the_save_is_harmless(seven, tmp_path, to_the_end, monkeypatch):
    real, saved = loop.save_checkpoint, []

    def signalled(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        saved.append(real(*args, **kwargs))
        os.kill(os.getpid(), signal.SIGINT)
        return saved[-1]

    with monkeypatch.context() as m:
        m.setattr(loop, "save_checkpoint", signalled)
        with pytest.raises(Interrupted) as stopped:
            train(seven())
    assert stopped.value.exit_code == 143  # the first one counts
    assert [p.name for p in saved] == ["checkpoint-2"]
    assert damage(saved[0]) is None
    assert outcome(train(seven())) == to_the_end


@pytest.mark.parametrize(("at", "steps"), [(1, [1]), (2, [1, 0]), (3, [1, 0, 2])])
def test_case_40_a_signal_during_the_evaluation_does_not_wait_for_its_end(
    seven, tmp_path, to_the_end, monkeypatch, at, steps
):
    """Two dev packs: it comes with the first or the last of the base's evaluation, or with the first of step 2's."""
    real, calls = loop.token_losses, []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "token_losses", signalled)
    with pytest.raises(Interrupted):
        train(seven())
    assert len(calls) == at
    assert [line["step"] for line in without_time(tmp_path / "run")] == steps  # the line that was due is not there yet
    assert outcome(train(seven())) == to_the_end


@pytest.mark.parametrize("how", ["torn", "tampered", "no manifest", "file missing", "emptied manifest"])
def test_case_37_a_damaged_checkpoint_is_named_and_skipped(seven, tmp_path, to_the_end, capsys, how):
    killed(seven(), "step", 6)  # checkpoints 2 and 4 are there
    run = tmp_path / "run"
    newest = run / "checkpoint-4"
    weights = newest / "optimizer.safetensors"
    if how == "torn":
        weights.write_bytes(weights.read_bytes()[:-5])
    elif how == "tampered":
        content = bytearray(weights.read_bytes())
        content[-3] ^= 1
        weights.write_bytes(content)
    elif how == "no manifest":
        (newest / "manifest.json").unlink()
    elif how == "file missing":
        (newest / "data_state.json").unlink()
    else:
        (newest / "manifest.json").write_text('{"files": {}}')
    assert newest_whole(run)[0] == run / "checkpoint-2"
    assert outcome(train(seven())) == to_the_end
    assert "checkpoint-4" in capsys.readouterr().err


# ---- shared prefixes, and a memory that ran out ---------------------------------------------------------------------


@pytest.fixture
def shared(settings, tmp_path):
    """shared() -> settings of 7 steps over questions of one to four answers under a system prompt, computed once."""
    rows = tmp_path / "answers.jsonl"
    lines = []
    for q in range(14):
        for a in range(1 + q % 4):
            question = {"role": "user", "content": f"头痛第{q}天，还伴有低烧和乏力，应该怎么办？"}
            answer = {"role": "assistant", "content": f"第{a}位医生：要多休息。" + "必要时就医。" * (q % 3)}
            about = {"id": f"{q}-{a}", "question_id": f"q-{q}", "split": "dev" if q > 11 else "train"}
            lines.append(about | {"messages": [question, answer]})
    rows.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")

    def make(**train):
        config = settings(**{"max_steps": 7, "learning_rate": 0.05, "per_device_train_batch_size": 6, **train})
        data = replace(config.data, path=str(rows), system="你是一名医生，请简短回答。", dev_fraction=0.0)
        lora = replace(config.lora, lora_dropout=0.0)
        return replace(config, data=data, lora=lora, train=replace(config.train, max_tokens=400))

    return make


@pytest.mark.parametrize(("where", "count"), [("step", 2), ("step", 6), ("write", 30), ("rename", 2)])
def test_case_39_with_shared_prefixes(shared, tmp_path, where, count):
    to_the_end = outcome(train(shared(output_dir=str(tmp_path / "whole"))))
    alone = shared(output_dir=str(tmp_path / "alone"))
    rows = without_time(train(replace(alone, data=replace(alone.data, shared_prefixes=False))))
    computed = [sum(m.get("tokens", 0) for m in metrics if "loss" in m) for metrics in (to_the_end["metrics"], rows)]
    assert computed[0] < 0.8 * computed[1]  # what is resumed below does share
    killed(shared(), where, count)
    assert outcome(train(shared())) == to_the_end


def out_of_memory_in(monkeypatch, step_: int) -> None:
    """The second pack of that step fails once, when the first has drawn its dropout; a smaller cut then fits.
    Step 0: the fullest micro-batch, which is tried before all others."""
    real_step, real_losses, now, packs = step.backward, step.pack_losses, [0], [0]

    def watched(model, batch, *args):
        now[0], packs[0] = batch.step, 0
        return real_step(model, batch, *args)

    def losses(*args, **kwargs):
        packs[0] += 1
        if (now[0], packs[0]) == (step_, 2 if step_ else 1) and not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return real_losses(*args, **kwargs)

    failed: list[bool] = []
    monkeypatch.setattr(loop, "has_ample_memory", lambda *_: False)
    monkeypatch.setattr(step, "backward", watched)
    monkeypatch.setattr(step, "pack_losses", losses)


@pytest.mark.parametrize("kind", ["dropout", "shared prefixes"])
@pytest.mark.parametrize(
    ("out_of_memory", "where", "count"),
    [(0, "step", 2), (1, "step", 6), (3, "step", 4), (3, "write", 30), (1, "retry", 1), (3, "retry", 3)],
    ids=[
        "before step 1",
        "split before the checkpoint",
        "split after it",
        "in the next save",
        "inside the split step",
        "and later",
    ],
)
def test_case_39_after_the_memory_ran_out(seven, shared, tmp_path, monkeypatch, kind, out_of_memory, where, count):
    """The resumed run has all the memory it wants, and cuts as the killed one did, from the same step on."""
    make = (lambda **m: seven(per_device_train_batch_size=8, **m)) if kind == "dropout" else shared
    whole = make(output_dir=str(tmp_path / "whole"))
    plain = outcome(train(make(output_dir=str(tmp_path / "plain"))))
    with monkeypatch.context() as m:
        out_of_memory_in(m, out_of_memory)
        to_the_end = outcome(train(whole))
    cuts = read_cuts(tmp_path / "whole")
    assert [since for since, _ in cuts] == [max(1, out_of_memory)]
    assert to_the_end["state"]["max_tokens"] == cuts[0][1] < plain["state"]["max_tokens"]
    assert to_the_end["adapter"] != plain["adapter"]  # sums of other packs, other dropout: a resume cannot do without
    with monkeypatch.context() as m:
        out_of_memory_in(m, out_of_memory)
        if where == "retry":
            m.setattr(loop, "write_cuts", lambda *a, real=loop.write_cuts: (real(*a), os.kill(os.getpid(), 9)))
            assert in_a_child(lambda: train(make())) == -signal.SIGKILL
        else:
            killed(make(), where, count)
    assert outcome(train(make())) == to_the_end


def test_a_step_that_never_fitted_leaves_no_cut(seven, tmp_path, monkeypatch):
    """The cuts that led nowhere are not taken on: with more memory, the run ends as one that always had it."""
    to_the_end = outcome(train(seven(output_dir=str(tmp_path / "whole"))))
    with monkeypatch.context() as m:
        m.setattr(step, "pack_losses", lambda *_, **__: torch.empty(2**62, dtype=torch.uint8))
        with pytest.raises(ResourceError, match="cannot be cut smaller"):
            train(seven())
    assert read_cuts(tmp_path / "run") == []
    (tmp_path / "run" / CUTS).unlink()
    assert outcome(train(seven())) == to_the_end


@pytest.mark.parametrize(("content", "named"), [("[]", "cut to 128"), ('{"a"', "how micro-batches were cut")])
def test_cuts_that_were_lost_are_named(seven, tmp_path, monkeypatch, content, named):
    with monkeypatch.context() as m:
        out_of_memory_in(m, 1)
        killed(seven(per_device_train_batch_size=8), "step", 4)
    assert read_cuts(tmp_path / "run") != []
    (tmp_path / "run" / CUTS).write_text(content)
    with pytest.raises(RunError, match=named.replace("128", r"\d+")):
        train(seven(per_device_train_batch_size=8))


# ---- what a resume takes as it was ----------------------------------------------------------------------------------


def every_file(run: Path) -> dict[Path, tuple[int, str]]:
    return {p: (p.stat().st_mtime_ns, sha256(p)) for p in run.rglob("*") if p.is_file()}


def test_a_finished_run_started_again_changes_no_byte(settings):
    run = train(settings(max_steps=3))
    before = every_file(run)
    started = time.perf_counter()
    assert train(settings(max_steps=3)) == run
    assert time.perf_counter() - started < 1
    assert every_file(run) == before


def test_other_settings_are_refused_by_name(settings):
    train(settings(max_steps=3))
    with pytest.raises(RunError, match=r"learning-rate 0.005 then, 0.001 now, --train.seed 42 then, 7 now\)"):
        train(settings(max_steps=3, learning_rate=1e-3, seed=7))
    train(settings(max_steps=3, logging_steps=5))  # changes nothing that is computed


@pytest.mark.parametrize(
    ("place", "then", "named"),
    [
        (("versions", "torch"), "1.0", r"\(versions: torch 1\.0 then, torch 2\.\S+ now\)"),
        (("processor",), "abacus", r"\(processor: abacus then, .+ now\)"),
        (("device",), "NVIDIA X", r"\(device: NVIDIA X then, cpu now\)"),
        (("float32_matmul_precision",), "high", r"\(float32_matmul_precision: high then, highest now\)"),
    ],
)
def test_another_machine_is_refused_by_name_and_taken_anyway(seven, tmp_path, place, then, named):
    killed(seven(), "step", 4)
    file = tmp_path / "run" / "environment.json"
    stored = json.loads(file.read_text())
    (stored["versions"] if len(place) == 2 else stored)[place[-1]] = then
    file.write_text(json.dumps(stored))
    with pytest.raises(RunError, match=named):
        train(seven())
    train(seven(resume="anyway"))
    noted = json.loads(file.read_text())
    assert {k: v for k, v in noted.items() if k != "resumed_elsewhere"} == stored
    assert (noted["resumed_elsewhere"][0] | {"threads": 1})["dtype"] == "float32"


def test_the_thread_count_is_taken_as_it_was(seven, to_the_end, monkeypatch):
    killed(seven(), "step", 4)
    real, seen = loop.train_step, []
    monkeypatch.setattr(loop, "train_step", lambda *a, **k: (seen.append(torch.get_num_threads()), real(*a, **k))[1])
    torch.set_num_threads(2)
    assert outcome(train(seven())) == to_the_end
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2


def test_the_dtype_that_auto_chose_is_taken_as_it_was(settings, tmp_path, monkeypatch):
    config = settings(max_steps=4)
    config = replace(config, model=replace(config.model, dtype="auto"))
    real = loop.pick_dtype
    for auto, where in (("bfloat16", "killed"), ("float32", "resumed")):  # what auto would choose at each start
        monkeypatch.setattr(
            loop, "pick_dtype", lambda name, device, auto=auto: real(auto if name == "auto" else name, device)
        )
        if where == "killed":
            killed(config, "step", 3)
        else:
            train(config)
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["dtype"] == "bfloat16"


def test_the_kernels_that_were_chosen_are_taken_as_they_were(seven, tmp_path, to_the_end, monkeypatch):
    """A fast kernel that failed its check at the first start stays out, also where a later check would take it; one
    that passed and now fails is named."""

    def raises(*_args, **_kwargs):
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(rms_norm, "way", "fast")
    with monkeypatch.context() as m:
        m.setattr(rms_norm, "fast", raises)
        plain = outcome(train(seven(output_dir=str(tmp_path / "plain"))))
        killed(seven(), "step", 4)
    assert outcome(train(seven())) == plain
    assert rms_norm.way == "plain"
    stored = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert {name for name, way in stored["kernels"].items() if way != "fast"} == {"rms_norm"}

    other = seven(output_dir=str(tmp_path / "other"))
    killed(other, "step", 4)
    monkeypatch.setattr(rms_norm, "fast", raises)
    with pytest.raises(RunError, match=r"\(kernels: rms_norm fast then, rms_norm plain now\)"):
        train(other)
    train(replace(other, train=replace(other.train, resume="anyway")))


def test_other_rows_are_refused(settings, tmp_path, rows_file):
    """Under the same path: the training rows by the stream's place, the dev rows by their hash."""
    dev = tmp_path / "dev.json"
    rows = json.loads(rows_file.read_text())
    dev.write_text(json.dumps(rows[:4]))
    config = settings(max_steps=4)
    config = replace(config, data=replace(config.data, dev_path=str(dev), dev_fraction=0.0))
    killed(config, "step", 3)
    dev.write_text(json.dumps(rows[1:5]))
    with pytest.raises(RunError, match="dev rows are not those"):
        train(config)
    dev.write_text(json.dumps(rows[:4]))
    rows_file.write_text(json.dumps(rows[:-1]))
    with pytest.raises(RunError, match="rows: 24 then, 23 now"):
        train(config)


def test_a_start_that_was_killed_before_its_settings_were_written_binds_nobody(settings, tmp_path):
    def child():
        loop.write_settings = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        train(replace(settings(), model=replace(settings().model, dtype="float64")))

    assert in_a_child(child) == -signal.SIGKILL
    train(settings(max_steps=2))
    assert json.loads((tmp_path / "run" / "environment.json").read_text())["dtype"] == "float32"


def test_a_broken_environment_file_is_named(seven, tmp_path):
    killed(seven(), "step", 4)
    (tmp_path / "run" / "environment.json").write_text("{}")
    with pytest.raises(RunError, match=r"environment\.json: it does not tell"):
        train(seven())


# ---- one process at a time ------------------------------------------------------------------------------------------


def test_the_lock_of_a_running_process_names_it(settings, tmp_path):
    """Another process holds the folder: refused with its pid, host and start; killed, it keeps nobody out."""
    run, ready = tmp_path / "run", tmp_path / "ready"
    holder = os.fork()
    if holder == 0:
        loop.train_step = lambda *_, **__: (ready.touch(), time.sleep(60))
        train(settings(max_steps=2))
        os._exit(1)
    try:
        while not ready.exists():
            time.sleep(0.01)
        about = json.loads((run / "run.lock").read_text())
        assert (about["pid"], about["host"]) == (holder, socket.gethostname())
        assert time.strptime(about["started"], "%Y-%m-%dT%H:%M:%S%z")
        with pytest.raises(RunError, match=f'"pid": {holder}.*"host".*"started"'):
            train(settings(max_steps=2))
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    assert (run / "run.lock").exists()  # stale: nobody holds it
    train(settings(max_steps=2))
    assert not (run / "run.lock").exists()
