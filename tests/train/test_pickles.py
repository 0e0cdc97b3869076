"""No file of a run holds a pickle, and none that lies in one is opened: cases 1, 2 and 21.

The traps fire on unpickling: they are what optimizer.pt, rng_state.pth (CVE-2026-1839) and training_args.bin are to HF
Trainer, and value_head.bin (CVE-2025-53002) to LLaMA-Factory.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import zipfile
from pathlib import Path

import pytest
import torch

from lora_cmqa.errors import AdapterError
from lora_cmqa.lora.adapter import load_adapter
from lora_cmqa.models.load import load_model
from lora_cmqa.train import loop
from lora_cmqa.train.loop import train

from .conftest import in_a_child, outcome

pytestmark = pytest.mark.usefixtures("one_thread")

NAMES = ("optimizer.pt", "scheduler.pt", "rng_state.pth", "rng_state_0.pth", "training_args.bin", "dataloader.pt")
NAMES += ("adapter_model.bin", "pytorch_model.bin", "value_head.bin", "metrics.pkl", "trainer_state.pt")
CODE = ("modeling.py", "train.py", "sitecustomize.py", "lora_cmqa.py", "conftest.py")


class Trap:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return (Path.touch, (self.canary,))


def set_traps(folder: Path, canary: Path) -> None:
    for i, name in enumerate(NAMES):
        if i % 2:
            torch.save(Trap(canary), folder / name)  # the zip that holds a pickle
        else:
            (folder / name).write_bytes(pickle.dumps(Trap(canary)))
    for name in CODE:
        (folder / name).write_text(f"open({str(canary)!r}, 'w').write('ran')\n")


def test_the_traps_fire_where_they_are_opened(tmp_path):
    """Else the tests below would show nothing."""
    for name, opened in (("optimizer.pt", pickle.loads), ("scheduler.pt", None)):
        canary = tmp_path / f"canary-{name}"
        set_traps(tmp_path, canary)
        if opened:
            opened((tmp_path / name).read_bytes())
        else:
            torch.load(tmp_path / name, weights_only=False)
        assert canary.exists()


def killed_before_step_4(config) -> None:
    def child():
        real = loop.train_step
        loop.train_step = lambda model, batch, *a, **k: (
            os.kill(os.getpid(), signal.SIGKILL) if batch.step == 4 else real(model, batch, *a, **k)
        )
        train(config)

    assert in_a_child(child) == -signal.SIGKILL


def test_case_01_and_21_booby_traps_in_a_run_never_fire(settings, tmp_path):
    canary, run = tmp_path / "canary", tmp_path / "run"
    to_the_end = outcome(train(settings(max_steps=5, output_dir=str(tmp_path / "whole"))))
    killed_before_step_4(settings(max_steps=5))
    for folder in (run, run / "checkpoint-2"):
        set_traps(folder, canary)
    ended = outcome(train(settings(max_steps=5)))
    assert {k: v for k, v in ended.items() if k != "files"} == {k: v for k, v in to_the_end.items() if k != "files"}
    base, _ = load_model("tiny", dtype="float32", device="cpu")
    with pytest.raises(AdapterError, match="holds none"):  # an adapter folder with code or pickles is refused whole
        load_adapter(base, run)
    assert not canary.exists()


def test_case_02_a_resume_reads_json_and_safetensors_only(settings, tmp_path, capfd):
    """Python's own audit events tell each file that is opened and each name that a pickle asks for."""
    run = tmp_path / "run"
    killed_before_step_4(settings(max_steps=5))
    set_traps(run / "checkpoint-2", tmp_path / "canary")
    told = tmp_path / "opened.txt"

    def child():
        opened: set[str] = set()

        def listen(event, args):
            if event == "pickle.find_class":
                os._exit(9)
            if event == "open" and isinstance(args[0], str) and args[0].startswith(str(run)):
                file, to_read = Path(args[0]), args[2] & os.O_ACCMODE == os.O_RDONLY
                opened.update([file.suffix] if to_read and file.is_file() else [])

        sys.addaudithook(listen)
        train(settings(max_steps=5))
        told.write_text(" ".join(opened))

    assert in_a_child(child) == 0, capfd.readouterr().err
    kinds = set(told.read_text().split())
    assert {".json", ".jsonl", ".safetensors"} <= kinds <= {".json", ".jsonl", ".safetensors", ".yaml", ".jinja", ".md"}


def test_case_01_no_file_of_a_run_holds_a_pickle(settings):
    run = train(settings(max_steps=3, report_to=("tensorboard",)))
    files = [p for p in run.rglob("*") if p.is_file()]
    assert {p.suffix for p in files if "tensorboard" not in p.parts} <= {
        *(".json", ".jsonl", ".safetensors", ".yaml", ".jinja", ".md")
    }
    assert len([p for p in files if "checkpoint-3" in p.parts]) >= 12
    for file in files:
        assert not file.read_bytes().startswith(b"\x80"), file  # how every pickle of protocol 2 and later begins
        assert not zipfile.is_zipfile(file), file  # torch.save
