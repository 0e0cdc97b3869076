"""On a GPU each fast path gives what its plain twin gives there, and what the processor gives.

float32 on both sides (TF32 off, torch's default), so a difference is an error and not rounding to 16 bits.
"""

from __future__ import annotations

import json

import pytest
import torch

from lora_cmqa.cli import main
from lora_cmqa.data.pack import pack
from lora_cmqa.engine.base import Request
from lora_cmqa.engine.embedded import EmbeddedEngine
from lora_cmqa.engine.sampling import SamplingParams
from lora_cmqa.kernels.table import check_kernels, chosen_ways, library_ways
from lora_cmqa.lora.decoder import checkpoint_activations, pack_losses, why_plain
from lora_cmqa.lora.inject import lora_parameters
from lora_cmqa.lora.low_rank import Pair
from lora_cmqa.models.load import load_model

from ..lora.conftest import adapted, make_packed, make_questions
from ..lora.test_decoder import take_the_plain_way

pytestmark = pytest.mark.gpu
KINDS = ("tiny", "tiny-qwen3", "tiny-llama", "tiny-gemma3")


def losses_and_gradients(model, packed) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    model.zero_grad(set_to_none=True)
    losses = pack_losses(model, packed)
    losses.mean().backward()
    return losses.detach().cpu(), {n: w.grad.cpu() for n, w in lora_parameters(model).items()}


def assert_like(found, wanted, tolerance: float) -> None:
    torch.testing.assert_close(found[0], wanted[0], rtol=tolerance, atol=tolerance)
    for name, gradient in wanted[1].items():
        assert (found[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_kernel_agrees_with_its_twin(device, dtype):
    assert check_kernels(device, dtype) == {}
    taken = {name for name, way in chosen_ways().items() if way == "library"}
    assert taken == {kernel.name for kernel in library_ways(device, dtype)}


@pytest.mark.parametrize("shared", [False, True], ids=["rows", "shared prefixes"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pack_gives_what_the_plain_way_and_the_processor_give(device, kind, shared, monkeypatch):
    (packed,) = pack(make_questions(), max_tokens=4096, shared_prefixes=shared)
    processor = losses_and_gradients(adapted(kind, torch.float32).train(), packed)
    model = adapted(kind, torch.float32).train().to(device)
    assert why_plain(model) is None
    card = losses_and_gradients(model, packed)
    assert_like(card, processor, 1e-4)
    take_the_plain_way(monkeypatch)
    assert_like(losses_and_gradients(model, packed), card, 1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_recomputing_in_the_backward_changes_nothing(device, kind):
    model, packed = adapted(kind, torch.float32).train().to(device), make_packed()
    kept = losses_and_gradients(model, packed)
    checkpoint_activations(model)
    assert_like(losses_and_gradients(model, packed), kept, 1e-5)


def engine_on(device: torch.device, kind: str) -> EmbeddedEngine:
    model, tokenizer = load_model(kind, dtype="float32", device=device)
    draw = torch.Generator().manual_seed(1)
    pairs = {
        path: Pair(torch.randn(4, m.in_features, generator=draw), 0.3 * torch.randn(m.out_features, 4, generator=draw))
        for path, m in model.named_modules()
        if path.endswith("_proj")
    }
    return EmbeddedEngine(model, tokenizer, (), load_adapter=lambda _: pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_many_requests_answer_as_alone_and_as_on_the_processor(device, kind):
    asked = [
        Request(tuple(range(3 + i, 20 + 7 * i)), SamplingParams(max_new_tokens=12), "a" if i % 2 else None)
        for i in range(6)
    ]
    card, processor = engine_on(device, kind), engine_on(torch.device("cpu"), kind)
    together = [c.token_ids for c in card.generate(asked)]
    assert together == [card.generate([r])[0].token_ids for r in asked]
    assert together == [c.token_ids for c in processor.generate(asked)]
    assert len({tuple(t) for t in together}) > 1


def test_a_walk_from_rows_to_a_merged_model(device, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    turns = [[("user", f"头痛第{i}天？"), ("assistant", "多休息，必要时就医。")] for i in range(24)]
    lines = [json.dumps({"messages": [{"role": r, "content": c} for r, c in turn]}) for turn in turns]
    rows.write_text("\n".join(lines), encoding="utf-8")
    run, at = str(tmp_path / "run"), ["--device", device.type]
    train = ["train", "--model", "tiny-qwen3", "--data", str(rows), "--output-dir", run, "--max-steps", "3", *at]
    assert main([*train, "--per-device-train-batch-size", "4", "--gradient-accumulation-steps", "1", "--r", "4"]) == 0
    assert main(["compare", run, "头痛怎么办？", "--max-new-tokens", "4", *at]) == 0
    assert main(["merge", run, "--out", str(tmp_path / "merged")]) == 0
    assert (tmp_path / "merged" / "certificate.json").is_file()
    capsys.readouterr()
