"""The arithmetic of a step: any cut into packs gives one gradient; losses are HF Trainer's."""

from __future__ import annotations

import math

import pytest
import torch

from lora_cmqa.core import Batch, TokenizedExample
from lora_cmqa.data.pack import make_pack, pack
from lora_cmqa.data.stream import BatchStream
from lora_cmqa.data.template import ChatTemplate, encode_all
from lora_cmqa.lora.decoder import checkpoint_activations
from lora_cmqa.lora.inject import inject_lora, lora_parameters
from lora_cmqa.models.tiny import byte_tokenizer, tiny_model
from lora_cmqa.train.loop import train_steps
from lora_cmqa.train.optim import Schedule, adamw, clip_by_global_norm, warmup_steps_of
from lora_cmqa.train.step import backward, train_step

from .conftest import examples

KINDS = ("qwen2", "qwen3", "llama", "gemma3")


def encoded(count: int = 12) -> list[TokenizedExample]:
    rows, _ = encode_all(examples(count), ChatTemplate.from_tokenizer(byte_tokenizer()), max_length=512)
    return rows


def with_lora(kind: str = "qwen2", dtype: torch.dtype = torch.float64):
    """A tiny model with a LoRA whose B is not zero, so that A has a gradient too."""
    model = inject_lora(tiny_model(kind, dtype), r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(1)
    for weight in lora_parameters(model).values():
        weight.data.copy_(0.05 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    return model


def batch_of(packs) -> Batch:
    return Batch(tuple(packs), step=1, epoch=1.0, step_supervised_tokens=sum(p.supervised_tokens for p in packs))


def gradient(model, packs) -> torch.Tensor:
    model.train()
    model.zero_grad()
    backward(model, batch_of(packs))
    return torch.cat([p.grad.flatten() for p in lora_parameters(model).values()])


@pytest.mark.parametrize("kind", KINDS)
def test_one_pack_many_packs_and_single_rows_give_one_gradient(kind):
    rows, model = encoded(), with_lora(kind)
    single = gradient(model, [make_pack([r]) for r in rows])
    for packs in ([make_pack(rows)], pack(rows, max_tokens=300)):
        assert (gradient(model, packs) - single).norm() <= 1e-10 * single.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_checkpointing_changes_no_gradient(kind):
    rows = encoded(4)
    plain, saving = with_lora(kind), with_lora(kind)
    expected = gradient(plain, [make_pack(rows)])
    for layers in (1, None):
        checkpoint_activations(saving, layers)
        layers_on = [layer.gradient_checkpointing for layer in saving.get_base_model().get_decoder().layers]
        assert layers_on == [layers is None or i < layers for i in range(len(layers_on))]
        assert (gradient(saving, [make_pack(rows)]) - expected).norm() <= 1e-12 * expected.norm()


def test_the_heads_chunk_changes_no_gradient():
    model, batch = with_lora(), batch_of([make_pack(encoded(4))])
    found = []
    for chunk in (7, 256):
        model.zero_grad()
        backward(model, batch, chunk)
        found.append(torch.cat([p.grad.flatten() for p in lora_parameters(model).values()]))
    assert (found[0] - found[1]).norm() <= 1e-12 * found[1].norm()


def test_a_step_that_is_not_finite_changes_nothing():
    model, rows = with_lora(), encoded(4)
    optimizer = adamw(lora_parameters(model))
    train_step(model, batch_of([make_pack(rows)]), optimizer, learning_rate=1e-3)
    head = model.get_base_model().get_output_embeddings().weight
    before = [p.detach().clone() for p in lora_parameters(model).values()]
    counted = [s["step"].item() for s in optimizer.state.values()]
    kept = head.data.clone()
    head.data[5, 0] = float("inf")
    result = train_step(model, batch_of([make_pack(rows)]), optimizer, learning_rate=1e-3)
    assert not result.is_finite
    head.data.copy_(kept)
    assert all(torch.equal(a, b) for a, b in zip(before, lora_parameters(model).values(), strict=True))
    assert counted == [s["step"].item() for s in optimizer.state.values()]


def test_clipping_is_torchs():
    model = with_lora()
    parameters = lora_parameters(model)
    gradient(model, [make_pack(encoded(4))])
    twins = [torch.nn.Parameter(p.detach().clone()) for p in parameters.values()]
    for twin, p in zip(twins, parameters.values(), strict=True):
        twin.grad = p.grad.clone()
    expected = torch.nn.utils.clip_grad_norm_(twins, 0.1)
    assert clip_by_global_norm(parameters, 0.1).item() == expected.item() > 0.1
    assert all(torch.equal(t.grad, p.grad) for t, p in zip(twins, parameters.values(), strict=True))
    assert clip_by_global_norm(parameters, 0).item() == pytest.approx(0.1)  # 0 leaves them as they are


@pytest.mark.parametrize("kind", ["cosine", "linear", "constant", "constant_with_warmup"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 1), (100, 3), (50, 50)])
def test_learning_rates_are_transformers(kind, total, warmup):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    theirs = get_scheduler(kind, optimizer, num_warmup_steps=warmup, num_training_steps=total)
    ours = Schedule(kind, 3e-4, warmup, total)
    for step in range(1, total + 1):
        assert ours.learning_rate_at(step) == pytest.approx(theirs.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        theirs.step()


def test_warmup_steps_are_counted_as_by_transformers():
    assert warmup_steps_of(937, warmup_steps=0, warmup_ratio=0.01) == math.ceil(9.37) == 10
    assert warmup_steps_of(937, warmup_steps=4, warmup_ratio=0.01) == 4


def test_five_steps_have_the_losses_of_hf_trainer(tmp_path):
    """Same rows, order, LoRA start and settings; fp32. Trainer pads, we do not; its loss is divided by the label tokens
    of the whole accumulated batch, as ours is."""
    from transformers import Trainer, TrainingArguments

    rows = encoded(20)
    steps, per_device, accumulate = 5, 2, 2
    common = {"weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8}

    ours = with_lora(dtype=torch.float32)
    stream = BatchStream(
        rows, rows_per_step=per_device * accumulate, max_tokens=200, max_steps=steps, order=list(range(len(rows)))
    )
    schedule = Schedule("cosine", 5e-3, warmup_steps_of(steps, warmup_steps=0, warmup_ratio=0.2), steps)
    optimizer = adamw(lora_parameters(ours), **common)
    got = list(train_steps(ours, stream, optimizer, schedule, max_grad_norm=0.5))

    def collate(features):
        width = max(len(f["input_ids"]) for f in features)
        fill = {"input_ids": 256, "labels": -100, "attention_mask": 0}
        return {k: torch.tensor([list(f[k]) + [v] * (width - len(f[k])) for f in features]) for k, v in fill.items()}

    class InOrder(Trainer):
        def _get_train_sampler(self, *_args, **_kwargs):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    theirs = with_lora(dtype=torch.float32)
    trainer = InOrder(
        model=theirs,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=per_device,
            gradient_accumulation_steps=accumulate,
            learning_rate=5e-3,
            lr_scheduler_type="cosine",
            warmup_steps=1,
            max_grad_norm=0.5,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            remove_unused_columns=False,
            **common,
        ),
        train_dataset=[
            {
                "input_ids": r.input_ids.tolist(),
                "labels": r.labels.tolist(),
                "attention_mask": [1] * len(r),
            }
            for r in rows
        ],
        data_collator=collate,
    )
    trainer.train()
    log = [line for line in trainer.state.log_history if "loss" in line]
    assert [m.learning_rate for m in got] == pytest.approx([line["learning_rate"] for line in log], abs=1e-9)
    assert [m.loss for m in got] == pytest.approx([line["loss"] for line in log], abs=1e-5)
    assert [m.grad_norm for m in got] == pytest.approx([line["grad_norm"] for line in log], rel=1e-4)
    assert got[-1].loss < got[0].loss - 0.1  # it learns, so the comparison is one of moving weights
    for mine, his in zip(lora_parameters(ours).values(), lora_parameters(theirs).values(), strict=True):
        assert torch.allclose(mine, his, atol=2e-5)
