"""At start every fast function is compared with its plain twin; a wrong one is replaced and named."""

from __future__ import annotations

import time

import pytest
import torch

from lora_cmqa.kernels import table
from lora_cmqa.kernels.table import KERNELS, check_kernels
from lora_cmqa.messages import say

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def as_before():
    yield
    for kernel in KERNELS:
        kernel.way, kernel.library = "fast", None


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_agree_within_a_second_and_draw_no_random_number(dtype):
    state = torch.get_rng_state()
    started = time.process_time()  # of the processor: on a busy machine the clock on the wall says nothing of it
    assert check_kernels(CPU, dtype) == {}
    assert time.process_time() - started < 1
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(kernel.way != "fast" for kernel in KERNELS)


class _WrongBackward(torch.autograd.Function):
    """The right value; gradients off by a tenth."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, upstream):
        return upstream * 1.1


BREAKS = {
    "value": lambda out: out * 1.1,
    "gradient": _WrongBackward.apply,
    "nan": lambda out: out * float("nan"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", [*BREAKS, "raises"])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
def test_a_broken_kernel_is_found_and_its_twin_answers(kernel, how, dtype, monkeypatch):
    right = kernel.fast

    def broken(*args, **kwargs):
        if how == "raises":
            raise RuntimeError("no kernel image is available")
        return BREAKS[how](right(*args, **kwargs))

    monkeypatch.setattr(kernel, "fast", broken)
    found = check_kernels(CPU, dtype)
    assert list(found) == [kernel.name]
    args, kwargs = table._CASES[kernel][0](table._Draw(CPU, dtype))
    twin = kernel.twin(*args, **{k: v for k, v in kwargs.items() if k not in kernel.without})
    assert torch.equal(kernel(*args, **kwargs), twin)
    monkeypatch.undo()
    assert check_kernels(CPU, dtype) == {}  # a later run asks anew
    assert kernel.way == "fast"


@pytest.mark.parametrize(
    ("kernel", "only"),
    [
        (table.packed_attention, lambda *args, parents=(), **kwargs: bool(parents)),
        (table.packed_attention, lambda *args, parents=(), **kwargs: not parents),
        (table.gated, lambda gate_up, activation: activation == "silu"),
        (table.gated, lambda gate_up, activation: activation == "gelu_tanh"),
    ],
    ids=["trees", "rows", "SwiGLU", "GeGLU"],
)
def test_one_of_a_kernels_ways_broken_is_found(kernel, only, monkeypatch):
    right = kernel.fast
    monkeypatch.setattr(kernel, "fast", lambda *a, **k: right(*a, **k) * (1.1 if only(*a, **k) else 1.0))
    assert list(check_kernels(CPU, torch.float32)) == [kernel.name]


def test_a_run_says_which_kernel_it_replaced_and_trains_the_same(tmp_path, monkeypatch, capsys):
    import json

    from lora_cmqa.config import Config, DataConfig, LoraConfig, ModelConfig, TrainConfig
    from lora_cmqa.train.loop import train

    row = {"conversations": [{"from": "user", "value": "头痛怎么办？"}, {"from": "assistant", "value": "多休息。"}]}
    rows = tmp_path / "rows.json"
    rows.write_text(json.dumps([row | {"id": str(i)} for i in range(8)]))

    def losses(name: str) -> list[float]:
        run = train(
            Config(
                model=ModelConfig(name_or_path="tiny", dtype="float32", device="cpu"),
                data=DataConfig(path=str(rows)),
                lora=LoraConfig(r=4),
                train=TrainConfig(
                    output_dir=str(tmp_path / name),
                    max_steps=3,
                    per_device_train_batch_size=2,
                    gradient_accumulation_steps=1,
                    learning_rate=1e-2,
                ),
            )
        )
        return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]

    whole = losses("whole")
    assert "rms_norm" not in capsys.readouterr().err
    right = table.rms_norm.fast
    monkeypatch.setattr(table.rms_norm, "fast", lambda *args, **kwargs: right(*args, **kwargs) * 2)
    assert losses("broken") == pytest.approx(whole, rel=1e-5)
    said = capsys.readouterr().err
    assert say("kernels.plain", kernel="rms_norm", found="@", device="cpu", dtype="torch.float32").split("@")[0] in said
    assert "rotate" not in said
