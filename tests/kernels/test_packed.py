"""Packed weights beside F.linear, which defines them."""

import pytest
import torch
import torch.nn.functional as F

from lora_cmqa.engine.base import Request
from lora_cmqa.engine.embedded import EmbeddedEngine
from lora_cmqa.engine.sampling import SamplingParams
from lora_cmqa.kernels import packed as packed_file
from lora_cmqa.kernels.packed import Packed, can_pack, packed
from lora_cmqa.models.load import load_model

needs_packing = pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="this processor or build has no packed bfloat16 product"
)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape) + shape[0])).bfloat16()


@needs_packing
@pytest.mark.parametrize("rows", [1, 8, 32, 64])
@pytest.mark.parametrize("shape", [(48, 64), (259, 64), (640, 128), (7, 24)])
def test_a_packed_product_is_the_plain_one(rows, shape):
    weight, bias, x = drawn(*shape), drawn(shape[0]), drawn(rows, shape[1])
    blocks = packed(weight)
    assert isinstance(blocks, Packed)
    assert (len(blocks), blocks.shape) == (shape[0], shape)
    for b in (None, bias):
        torch.testing.assert_close(blocks.product(x, b), F.linear(x, weight, b), rtol=2e-2, atol=2e-2)


@needs_packing
def test_a_product_that_is_wrong_here_is_not_taken(monkeypatch):
    operators = packed_file._operators()

    class Wrong:
        _reorder_linear_weight = staticmethod(operators._reorder_linear_weight)

        @staticmethod
        def _linear_pointwise(*args):
            return operators._linear_pointwise(*args) * 1.1

        @staticmethod
        def _is_mkldnn_bf16_supported():
            return True

    monkeypatch.setattr(packed_file, "_operators", Wrong)
    monkeypatch.setattr(packed_file, "_right", {})
    assert packed(drawn(48, 64)) is None
    packed_file._right.clear()
    monkeypatch.setattr(Wrong, "_linear_pointwise", lambda *_: (_ for _ in ()).throw(RuntimeError("no such product")))
    assert packed(drawn(48, 64)) is None


def test_other_dtypes_stay_as_they_are():
    assert packed(torch.randn(48, 64)) is None
    assert packed(torch.randn(48, 64).half()) is None


@needs_packing
def test_an_engine_answers_alike_with_and_without(monkeypatch):
    asked = [Request(tuple(range(5 + i, 40 + i)), SamplingParams(max_new_tokens=4, logprobs=2)) for i in range(3)]
    model, tokenizer = load_model("tiny-gemma3", dtype="bfloat16")
    fast = EmbeddedEngine(model, tokenizer, ())
    monkeypatch.setattr("lora_cmqa.engine.forward._PACKED_BYTES", 0)
    plain = EmbeddedEngine(model, tokenizer, ())
    assert all(isinstance(w, Packed) for w in (*fast.forward._weights.values(), fast.forward.head.packed))
    assert not any(isinstance(w, Packed) for w in (*plain.forward._weights.values(), plain.forward.head.packed))
    for one, other in zip(fast.generate(asked), plain.generate(asked), strict=True):
        assert one.logprobs[0].logprob == pytest.approx(other.logprobs[0].logprob, abs=0.05)
