"""A run that is stopped in any way and started again ends as the one that never stopped, byte for byte (CPU)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lora_cmqa.errors import Interrupted, ResourceError, RunError
from lora_cmqa.train import checkpoint as ckpt
from lora_cmqa.train import commit
from lora_cmqa.train.checkpoint import damage, list_checkpoints, newest_whole
from lora_cmqa.train.loop import train

# Trains as the command line does, and kills itself with SIGKILL at a chosen moment: before its n-th step, in the middle
# of the n-th file that is written into a checkpoint, or when the n-th checkpoint waits for its rename.
CHILD = """
import os, signal, sys
from pathlib import Path
from lora_cmqa.config import Config, parse
from lora_cmqa.train import commit, loop

where, count = sys.argv[2], int(sys.argv[3])
owner, name = {
    "step": (loop, "train_step"),
    "write": (commit, "_write_synced"),
    "rename": (commit, "sync_folder"),
}[where]
real, calls = getattr(owner, name), 0

def counted(*args, **kwargs):
    global calls
    calls += where == "step" or ".checkpoint-" in str(args[0])
    if calls == count:
        if where == "write":  # torn in the middle
            Path(args[0]).write_bytes(args[1][: len(args[1]) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)

setattr(owner, name, counted)
loop.train(parse(Config, yaml_file=sys.argv[1]))
"""


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def without_time(run: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "time"} for line in lines]


def outcome(run: Path) -> dict:
    """All that must not depend on how often a run was stopped."""
    last = list_checkpoints(run)[-1]
    return {
        "adapter": sha256(run / "adapter_model.safetensors"),
        "optimizer": sha256(last / "optimizer.safetensors"),
        # Python's own generator is stored too, but a library's first import in a fresh process may draw from it.
        "rng": {k: v for k, v in json.loads((last / "rng_state.json").read_text()).items() if k != "python"},
        "state": json.loads((run / "trainer_state.json").read_text()),
        "metrics": without_time(run),
        "card": (run / "README.md").read_text(),
    }


@pytest.fixture
def to_the_end(settings, tmp_path):
    """What a run of 7 steps that nobody stops gives; with dropout, a dev set, and a best that is not the last."""
    config = settings(output_dir=str(tmp_path / "whole"), max_steps=7, learning_rate=0.05)
    return outcome(train(config))


def config_file(settings, tmp_path) -> Path:
    from lora_cmqa.config import as_yaml

    file = tmp_path / "config.yaml"
    file.write_text(as_yaml(settings(max_steps=7, learning_rate=0.05)))
    return file


def killed(file: Path, where: str, count: int) -> None:
    done = subprocess.run([sys.executable, "-c", CHILD, str(file), where, str(count)], capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()[-2000:]


@pytest.mark.parametrize(
    ("where", "count"),
    [("step", 1), ("step", 4), ("step", 6), ("write", 5), ("write", 37), ("rename", 2)],
)
def test_killed_once_and_started_again(settings, tmp_path, to_the_end, where, count):
    killed(config_file(settings, tmp_path), where, count)
    assert outcome(train(settings(max_steps=7, learning_rate=0.05))) == to_the_end


def test_killed_twice_inside_the_same_save(settings, tmp_path, to_the_end):
    file = config_file(settings, tmp_path)
    killed(file, "write", 9)
    run = tmp_path / "run"
    assert [p.name for p in run.glob(".checkpoint-*")] == [".checkpoint-2.tmp"]
    killed(file, "write", 12)
    assert [p.name for p in run.glob(".checkpoint-*")] == [".checkpoint-2.tmp"]
    assert outcome(train(settings(max_steps=7, learning_rate=0.05))) == to_the_end
    assert not list(run.glob(".checkpoint-*"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_a_checkpoint_at_the_next_step(settings, tmp_path, to_the_end, monkeypatch, number, code):
    from lora_cmqa.train import loop

    real, calls = loop.train_step, []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), number)
            os.kill(os.getpid(), number)  # a second one is harmless
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "train_step", signalled)
    with pytest.raises(Interrupted) as stopped:
        train(settings(max_steps=7, learning_rate=0.05))
    assert stopped.value.exit_code == code
    assert list_checkpoints(tmp_path / "run")[-1].name == "checkpoint-3"
    assert outcome(train(settings(max_steps=7, learning_rate=0.05))) == to_the_end


def test_a_signal_during_the_evaluation_does_not_wait_for_its_end(settings, tmp_path, to_the_end, monkeypatch):
    from lora_cmqa.train import loop

    real, calls = loop.token_losses, []

    def signalled(*args, **kwargs):
        calls.append(1)
        if len(calls) == packs + 1:  # the first pack of the evaluation after step 2
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    packs = 2
    monkeypatch.setattr(loop, "token_losses", signalled)
    with pytest.raises(Interrupted):
        train(settings(max_steps=7, learning_rate=0.05))
    assert len(calls) == packs + 1
    assert [line["step"] for line in without_time(tmp_path / "run")] == [0, 1, 2]  # no dev line of step 2 yet
    assert outcome(train(settings(max_steps=7, learning_rate=0.05))) == to_the_end


@pytest.mark.parametrize("how", ["torn", "tampered", "no manifest", "file missing", "emptied manifest"])
def test_a_damaged_checkpoint_is_named_and_skipped(settings, tmp_path, to_the_end, capsys, how):
    killed(config_file(settings, tmp_path), "step", 6)  # checkpoints 2 and 4 are there
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
    assert outcome(train(settings(max_steps=7, learning_rate=0.05))) == to_the_end
    assert "checkpoint-4" in capsys.readouterr().err


def test_a_finished_run_started_again_changes_no_byte(settings, capsys):
    run = train(settings(max_steps=3))
    before = {p: (p.stat().st_mtime_ns, sha256(p)) for p in run.rglob("*") if p.is_file()}
    started = time.perf_counter()
    assert train(settings(max_steps=3)) == run
    assert time.perf_counter() - started < 1
    assert {p: (p.stat().st_mtime_ns, sha256(p)) for p in run.rglob("*") if p.is_file()} == before


def test_other_settings_are_refused_by_name(settings):
    train(settings(max_steps=3))
    with pytest.raises(RunError, match=r"learning-rate 0.005 then, 0.001 now"):
        train(settings(max_steps=3, learning_rate=1e-3))
    train(settings(max_steps=3, logging_steps=5))  # changes nothing that is computed


def test_another_environment_is_refused_by_name_and_taken_anyway(settings, tmp_path):
    killed(config_file(settings, tmp_path), "step", 4)
    file = tmp_path / "run" / "environment.json"
    stored = json.loads(file.read_text())
    stored["versions"]["torch"] = "1.0"
    file.write_text(json.dumps(stored))
    with pytest.raises(RunError, match=r"torch 1\.0"):
        train(settings(max_steps=7, learning_rate=0.05))
    train(settings(max_steps=7, learning_rate=0.05, resume="anyway"))
    assert json.loads(file.read_text())["resumed_elsewhere"][0]["versions"]["torch"] != "1.0"


def test_two_runs_in_one_folder(settings, tmp_path):
    from lora_cmqa.train.run_folder import RunLock, open_run_folder

    run = tmp_path / "run"
    open_run_folder(run)
    with RunLock(run), pytest.raises(RunError, match=str(os.getpid())):
        train(settings(max_steps=2))
    assert not (run / "run.lock").exists()
    (run / "run.lock").write_text('{"pid": 1, "host": "gone"}')  # of a killed run: nobody holds it
    train(settings(max_steps=2))


# ---- out of disk -------------------------------------------------------------------------------------------------


def test_a_full_disk_leaves_the_last_checkpoint_whole_and_is_resumable(settings, tmp_path, to_the_end, monkeypatch):
    real = commit._write_synced

    def full(file, content):
        if ".checkpoint-4.tmp" in str(file) and file.name == "optimizer.safetensors":
            with open("/dev/full", "wb", buffering=0) as f:
                f.write(content)
        real(file, content)

    with monkeypatch.context() as m:
        m.setattr(commit, "_write_synced", full)
        with pytest.raises(ResourceError, match="checkpoint-2 is whole") as failed:
            train(settings(max_steps=7, learning_rate=0.05))
    assert failed.value.exit_code == 3
    run = tmp_path / "run"
    assert damage(run / "checkpoint-2") is None
    assert not list(run.glob(".checkpoint-*"))
    assert outcome(train(settings(max_steps=7, learning_rate=0.05))) == to_the_end


def test_a_file_size_limit_is_a_full_disk(settings, tmp_path):
    """The real thing, in a child under RLIMIT_FSIZE: exit code 3, one clear line, no traceback."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000));"
        "from lora_cmqa.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    words = ["train", str(config_file(settings, tmp_path))]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "checkpoint-2 could not be written" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "run").glob(".checkpoint-*"))


def test_older_checkpoints_make_room_for_a_new_one(settings, monkeypatch, tmp_path):
    """Where the settings allow pruning, a full disk is met by it before the run gives up."""
    real, removed = commit.check_space, []

    def full_once(folder, needed):
        if len(list_checkpoints(folder)) > 1:
            raise OSError(28, "No space left on device")
        real(folder, needed)

    monkeypatch.setattr(commit, "check_space", full_once)
    monkeypatch.setattr(ckpt, "prune", lambda run, keep, real=ckpt.prune: (removed.append(keep), real(run, keep)))
    train(settings(max_steps=7, save_steps=1))
    assert 1 in removed
    assert damage(list_checkpoints(tmp_path / "run")[-1]) is None


def test_nothing_that_is_written_is_a_pickle_and_none_is_read(settings, tmp_path, monkeypatch):
    """Booby-trapped files of HF Trainer's names lie in the checkpoint; a resume never opens them."""
    import pickle

    config = config_file(settings, tmp_path)
    killed(config, "step", 4)
    canary = tmp_path / "canary"

    class Trap:
        def __reduce__(self):
            return (Path.touch, (canary,))

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "adapter_model.bin"):
        (tmp_path / "run" / "checkpoint-2" / name).write_bytes(pickle.dumps(Trap()))
    run = train(settings(max_steps=7, learning_rate=0.05))
    assert not canary.exists()
    written = {p.name for p in (run / "checkpoint-7").iterdir()}
    assert written >= {"manifest.json", "optimizer.safetensors", "scheduler.json", "rng_state.json", "data_state.json"}
    assert {Path(n).suffix for n in written} <= {".json", ".safetensors", ".md", ".jinja"}
