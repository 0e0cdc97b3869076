"""Quantised bases on a card: bitsandbytes' CUDA kernels beside the plain twins, and the memory of a load."""

from __future__ import annotations

import pytest
import torch

from lora_cmqa.kernels.quantized import DEQUANTIZE, quantize
from lora_cmqa.kernels.table import check_kernels
from lora_cmqa.models.load import load_model
from lora_cmqa.models.quantized import quantization_of
from lora_cmqa.models.tiny import byte_tokenizer

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DEQUANTIZE)
def test_written_out_it_is_the_plain_twins(kind, dtype, device):
    weight = 0.05 * torch.randn(2100, 2048, generator=torch.Generator().manual_seed(0))
    packed = quantize(weight.to(device), kind)
    fast, plain = DEQUANTIZE[kind].fast(packed, dtype).double(), DEQUANTIZE[kind].twin(packed, dtype).double()
    assert (fast - plain).norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * plain.norm()
    assert check_kernels(device, dtype, kind) == {}


def test_never_the_whole_16_bit_model_on_the_card(tmp_path, device):
    if device.type != "cuda":
        pytest.skip("torch's allocator of a card is asked")
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=1000,
        hidden_size=1024,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=4,
        intermediate_size=4096,
    )
    Qwen2ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    load_model("tiny", dtype="bfloat16", device="cuda", quantization="nf4")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model, _ = load_model(tmp_path, dtype="bfloat16", device="cuda", quantization="nf4")
    assert quantization_of(model) == "nf4"
    sixteen = sum(p.numel() for p in Qwen2ForCausalLM(config).parameters()) * 2
    assert torch.cuda.max_memory_allocated() - before < 0.5 * sixteen
