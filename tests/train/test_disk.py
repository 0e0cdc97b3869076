"""Case 38: a full or read-only disk leaves the last checkpoint whole, says one clear line, exit code 3, resumable."""

from __future__ import annotations

import ctypes
import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from lora_cmqa.cli import main
from lora_cmqa.config import as_yaml
from lora_cmqa.errors import ResourceError
from lora_cmqa.train import checkpoint as ckpt
from lora_cmqa.train import commit, loop
from lora_cmqa.train.checkpoint import damage, list_checkpoints
from lora_cmqa.train.loop import train

from .conftest import in_a_child, outcome

pytestmark = pytest.mark.usefixtures("one_thread")

# <linux/mount.h> and <linux/sched.h>
READ_ONLY, REMOUNT, BIND, RECURSIVE, PRIVATE = 1, 32, 4096, 16384, 1 << 18
NEW_MOUNTS, NEW_USER = 0x20000, 0x10000000


@pytest.fixture
def five(settings):
    return lambda **train: settings(max_steps=5, **train)


@pytest.fixture
def to_the_end(five, tmp_path):
    return outcome(train(five(output_dir=str(tmp_path / "whole"))))


def mount(source: str, target: Path, kind: str, flags: int, data: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), str(target).encode(), kind.encode(), flags, data.encode()):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(target))


def own_mounts() -> None:
    """This process gets mounts of its own, which end with it. Raises OSError where the system does not allow it."""
    user, libc = os.getuid(), ctypes.CDLL(None, use_errno=True)
    if libc.unshare(NEW_MOUNTS | (NEW_USER if user else 0)):
        raise OSError(ctypes.get_errno(), "unshare")
    if user:
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
    mount("none", Path("/"), "none", RECURSIVE | PRIVATE)


def with_own_mounts(work: Callable[[], object]) -> None:
    """`work` in a child that may mount; what it asserts counts here."""
    if in_a_child(own_mounts):
        pytest.skip("needs a mount namespace, which this system does not give")
    assert in_a_child(lambda: (own_mounts(), work())) == 0


def tmpfs(folder: Path, pages: int) -> Path:
    folder.mkdir()
    mount("tmpfs", folder, "tmpfs", 0, f"size={pages * 4096}")
    return folder


def pages(folder: Path) -> int:
    """What the files of `folder` and of all below take on a tmpfs."""
    return sum(-(-p.stat().st_size // 4096) for p in folder.rglob("*") if p.is_file())


@pytest.mark.parametrize("found", ["before the save", "while writing"])
def test_case_38_a_full_tmpfs(five, tmp_path, to_the_end, found):
    whole = tmp_path / "whole"
    one = pages(whole / "checkpoint-4")
    others = pages(whole) - sum(pages(c) for c in list_checkpoints(whole))

    def child():
        disk = tmpfs(tmp_path / "disk", others + one + one // 2)
        config = five(output_dir=str(disk / "run"), save_total_limit=0)
        if found == "while writing":
            commit.check_space = lambda *_: None
        with pytest.raises(ResourceError, match=r"checkpoint-4 could not be written: .*checkpoint-2 is whole") as e:
            train(config)
        assert ("free" if found == "before the save" else "No space left on device") in str(e.value)
        assert e.value.exit_code == 3
        assert damage(disk / "run" / "checkpoint-2") is None
        assert not list((disk / "run").glob(".*"))
        mount("tmpfs", disk, "tmpfs", REMOUNT, f"size={(others + 4 * one) * 4096}")
        ended = outcome(train(config))
        assert {k: v for k, v in ended.items() if k != "files"} == {k: v for k, v in to_the_end.items() if k != "files"}

    with_own_mounts(child)


def test_case_38_older_checkpoints_make_room_for_a_new_one(five, tmp_path, to_the_end):
    """Where the settings allow pruning, a full disk is met by it before the run gives up."""
    whole = tmp_path / "whole"
    one = pages(whole / "checkpoint-4")
    others = pages(whole) - sum(pages(c) for c in list_checkpoints(whole))

    def child():
        disk = tmpfs(tmp_path / "disk", others + 2 * one + one // 2)  # two and a half checkpoints
        pruned, real = [], ckpt.prune
        ckpt.prune = lambda run, keep: (pruned.append(keep), real(run, keep))
        run = train(five(output_dir=str(disk / "run")))
        assert 1 in pruned
        assert outcome(run) | {"files": 0} == to_the_end | {"files": 0}  # one checkpoint fewer is left

    with_own_mounts(child)


def test_case_38_a_folder_that_becomes_read_only(five, tmp_path, to_the_end):
    run = tmp_path / "run"

    def child():
        real, steps = loop.train_step, []

        def step(*args, **kwargs):
            steps.append(1)
            if len(steps) == 3:
                mount(str(run), run, "none", BIND)
                mount("none", run, "none", BIND | REMOUNT | READ_ONLY)
            return real(*args, **kwargs)

        loop.train_step = step
        with pytest.raises(ResourceError, match=r"cannot be written: .*Read-only"):
            train(five())
        assert damage(run / "checkpoint-2") is None
        with pytest.raises(ResourceError, match="run folder cannot be written: Read-only") as e:
            train(five())
        assert e.value.exit_code == 3

    with_own_mounts(child)  # the read-only mount ends with it
    assert outcome(train(five())) == to_the_end


def test_case_38_a_file_size_limit_is_a_full_disk(five, tmp_path, to_the_end, capfd):
    """By the command line: exit code 3, one clear message, no traceback."""
    config = tmp_path / "config.yaml"
    config.write_text(as_yaml(five()))

    def child():
        resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000))
        os._exit(main(["train", str(config)]))

    assert in_a_child(child) == 3
    told = capfd.readouterr().err
    assert told.count("ResourceError: checkpoint-2 could not be written") == 1
    assert "Traceback" not in told
    assert not list((tmp_path / "run").glob(".checkpoint-*"))
    assert outcome(train(five())) == to_the_end


def test_case_38_no_room_for_a_line_of_metrics(five, tmp_path, to_the_end, monkeypatch):
    real, lines = loop.MetricsFile.write, []

    def write(self, metrics):
        lines.append(1)
        if len(lines) == 5:
            self._handle.close()
            self._handle = open("/dev/full", "ab")  # noqa: SIM115
        real(self, metrics)

    with monkeypatch.context() as m:
        m.setattr(loop.MetricsFile, "write", write)
        with pytest.raises(ResourceError, match="No space left"):
            train(five())
    assert outcome(train(five())) == to_the_end


def test_case_38_free_space_is_checked_before_the_run(five, tmp_path, monkeypatch):
    usage = commit.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(commit.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(ResourceError, match=r"MiB are needed, 0\.0 MiB are free"):
        train(five())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
