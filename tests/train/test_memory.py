"""Out of memory: the rows of the step are cut smaller, the gradient stays, nothing is lost or repeated."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lora_cmqa.config import bytes_of
from lora_cmqa.data.stream import BatchStream
from lora_cmqa.errors import ConfigError, ResourceError
from lora_cmqa.lora import decoder
from lora_cmqa.lora.inject import lora_parameters
from lora_cmqa.train import loop, step
from lora_cmqa.train.memory import is_out_of_memory, memory_limit
from lora_cmqa.train.optim import Schedule, adamw

from .test_step import encoded, with_lora

CPU_TEXT = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."
PACK_LOSSES, BLOCK = step.pack_losses, decoder._block
CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def run(monkeypatch, fail_when=lambda call, pack: None, steps: int = 3, max_tokens: int = 400):
    """Train three steps in float64; `fail_when(call, pack)` returns the error of the backward of that pack, or None.
    -> weights, metrics, what was recut."""
    rows, model = encoded(24), with_lora()
    stream = BatchStream(rows, rows_per_step=8, max_tokens=max_tokens, max_steps=steps)
    calls, recuts = [0], []
    real = PACK_LOSSES

    class Fails(torch.autograd.Function):
        """Breaks off in the backward, when the layers above have their gradient already."""

        @staticmethod
        def forward(ctx, x, error):
            ctx.error = error
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            raise ctx.error

    def losses(model, pack, **kwargs):
        calls[0] += 1
        error = fail_when(calls[0], pack)
        if error is None:
            return real(model, pack, **kwargs)
        blocks = []

        def breaks_after_the_second(x, **settings):
            blocks.append(1)
            out = BLOCK(x, **settings)
            return Fails.apply(out, error) if len(blocks) == 2 else out

        with monkeypatch.context() as patch:
            patch.setattr(decoder, "_block", breaks_after_the_second)
            return real(model, pack, **kwargs)

    monkeypatch.setattr(step, "pack_losses", losses)
    metrics = list(
        loop.train_steps(
            model,
            stream,
            adamw(lora_parameters(model)),
            Schedule("constant", 1e-2, 0, steps),
            on_recut=lambda at, cut: recuts.append((at, cut)),
        )
    )
    weights = torch.cat([p.detach().flatten() for p in lora_parameters(model).values()])
    return weights, metrics, recuts


@pytest.mark.parametrize("error", [CUDA, RuntimeError(CPU_TEXT)], ids=["cuda", "cpu"])
def test_out_of_memory_at_a_random_pack_changes_nothing_but_the_cut(monkeypatch, error):
    expected, plain, _ = run(monkeypatch)
    draw = random.Random(7)
    for _ in range(3):
        at = draw.randrange(1, 10)
        got, metrics, recuts = run(monkeypatch, lambda call, pack, at=at: error if call == at else None)
        assert len(recuts) == 1
        assert recuts[0][1] < 400
        assert (got - expected).norm() <= 1e-10 * expected.norm()
        assert [m.step for m in metrics] == [1, 2, 3]
        assert [m.tokens for m in metrics] == [m.tokens for m in plain]
        assert [m.loss for m in metrics] == pytest.approx([m.loss for m in plain], rel=1e-12)


def test_it_is_cut_again_and_again_until_it_fits_and_stays_so(monkeypatch):
    largest = []

    def too_large(call, pack):
        largest.append(pack.tokens)
        return CUDA if pack.tokens > 120 and len(pack.row_lengths) > 1 else None

    expected, _, _ = run(monkeypatch)
    got, _, recuts = run(monkeypatch, too_large)
    assert len(recuts) >= 2
    assert {at for at, _ in recuts} == {1}  # later steps start with the smaller cut
    assert (got - expected).norm() <= 1e-10 * expected.norm()


def test_a_resume_keeps_the_smaller_cut(settings, monkeypatch, tmp_path):
    def adapter(name: str, stop_at: int) -> bytes:
        config = settings(output_dir=str(tmp_path / name), per_device_train_batch_size=8, max_steps=5)
        packs, calls = [], []

        def out_of_memory_once(*args, **kwargs):
            packs.append(1)
            if len(packs) == 2:
                raise CUDA
            return PACK_LOSSES(*args, **kwargs)

        def stopped(*args, **kwargs):
            calls.append(1)
            if len(calls) == stop_at:
                raise ValueError("stopped")
            return step.train_step(*args, **kwargs)

        monkeypatch.setattr(step, "pack_losses", out_of_memory_once)
        monkeypatch.setattr(loop, "train_step", stopped)
        if stop_at:
            with pytest.raises(ValueError, match="stopped"):
                loop.train(config)
            monkeypatch.setattr(step, "pack_losses", PACK_LOSSES)
        folder = loop.train(config)
        assert json.loads((folder / "trainer_state.json").read_text())["max_tokens"] < config.train.max_tokens
        return (folder / "adapter_model.safetensors").read_bytes()

    assert adapter("stopped", 4) == adapter("whole", 0)


def test_single_rows_that_do_not_fit_and_other_errors_are_raised(monkeypatch):
    with pytest.raises(ResourceError, match="which cannot be cut smaller"):
        run(monkeypatch, lambda call, pack: CUDA)
    with pytest.raises(RuntimeError, match="shape"):
        run(monkeypatch, lambda call, pack: RuntimeError("a shape is wrong"))


def test_the_cpu_allocators_error_is_known_by_its_real_text():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**62, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_the_limit_makes_an_error_and_is_taken_back():
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_DATA)
    with pytest.raises(ResourceError, match="can't allocate memory"), memory_limit(2**30, torch.device("cpu")):
        torch.empty(2**33, dtype=torch.uint8)
    assert resource.getrlimit(resource.RLIMIT_DATA) == before
    torch.empty(2**33, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("text", "value"),
    [("24GiB", 24 * 2**30), ("24G", 24 * 2**30), ("24GB", 24 * 10**9), ("1.5gib", 1610612736), ("7", 7)],
)
def test_amounts_of_memory(text, value):
    assert bytes_of(text, "gpu-memory") == value


@pytest.mark.parametrize("text", ["", "much", "-1GiB", "0", "24 GiBs"])
def test_amounts_that_are_none(text):
    with pytest.raises(ConfigError, match="--gpu-memory"):
        bytes_of(text, "gpu-memory")


CHILD = """
import sys, json, re
from pathlib import Path
from dataclasses import replace
import torch
from lora_cmqa.config import Config, parse
from lora_cmqa.train.loop import train
config = parse(Config, yaml_file=Path(sys.argv[1]))
warm = replace(config, train=replace(config.train, output_dir=sys.argv[2] + "-warm", max_steps=1, max_tokens=256))
train(warm)  # libraries read, threads started: what is left is the run's own
data = int(re.search(r"VmData:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
limit = str(data + int(sys.argv[3])) if int(sys.argv[3]) else None
train(replace(config, train=replace(config.train, output_dir=sys.argv[2], memory_limit=limit, fit="off")))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")
@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-5), ("float64", 1e-10)])
def test_a_run_under_a_limit_that_would_kill_it_ends_with_the_same_adapter(settings, tmp_path, dtype, bound):
    from lora_cmqa.config import as_yaml

    config = settings(max_tokens=8192, per_device_train_batch_size=16, max_steps=3, eval_steps=3, save_steps=3)
    config = replace(config, model=replace(config.model, dtype=dtype), lora=replace(config.lora, lora_dropout=0.0))
    rows = json.loads(Path(config.data.path or "").read_text(encoding="utf-8"))
    for row in rows:  # a micro-batch of some hundred MB
        row["conversations"][1]["value"] *= 8
    Path(config.data.path or "").write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    (tmp_path / "c.yaml").write_text(as_yaml(config))

    def child(name: str, room: int) -> subprocess.CompletedProcess[str]:
        args = [sys.executable, "-c", CHILD, str(tmp_path / "c.yaml"), str(tmp_path / name), str(room)]
        return subprocess.run(args, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})

    done = child("free", 0)
    assert done.returncode == 0, done.stderr
    assert "out of memory" not in done.stderr
    for room in (60, 80, 110, 150, 200, 270, 360):  # MiB: how much a single row needs is the machine's
        name = f"within-{room}"
        done = child(name, room * 2**20)
        if done.returncode == 0:
            break
        assert "the memory does not hold a micro-batch" in done.stderr or "ResourceError: out of memory" in done.stderr
    assert done.returncode == 0, done.stderr
    assert "out of memory; its rows" in done.stderr  # without cuts this would have been the end of it
    free, cut = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("free", name))
    difference = sum(float((free[k].double() - cut[k].double()).square().sum()) for k in free) ** 0.5
    size = sum(float(free[k].double().square().sum()) for k in free) ** 0.5
    assert difference <= bound * size
    state = json.loads((tmp_path / name / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["max_tokens"] < 8192
