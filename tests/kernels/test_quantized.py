"""NF4 with double quantisation and int8: bitsandbytes beside the plain twins, sizes, and what is never fetched."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from lora_cmqa.errors import ConfigError
from lora_cmqa.kernels import quantized
from lora_cmqa.kernels.quantized import (
    DEQUANTIZE,
    Stacked,
    bitsandbytes_library,
    product,
    product_back,
    quantize,
    quantize_nf4_plain,
    written_out,
)
from lora_cmqa.kernels.table import check_kernels

CPU = torch.device("cpu")
# Whole blocks, blocks across rows, a last block and a last group that are not full, more than one piece (4 Mi weights).
SHAPES = [(64, 256), (63, 40), (5, 14), (130, 130), (2100, 2048)]
IN_MEMORY = (torch.float32, torch.bfloat16, torch.float16)


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    weight = 0.05 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    weight[0, :3] = torch.tensor([0.0, 1.0, -1.0])  # the code's ends, and a block that one large value rules
    return weight.to(dtype)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("out", IN_MEMORY, ids=str)
@pytest.mark.parametrize("dtype", IN_MEMORY, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", DEQUANTIZE)
def test_written_out_the_twins_have_the_same_bits(kind, shape, dtype, out):
    packed = quantize(drawn(*shape, dtype=dtype), kind)
    kernel = DEQUANTIZE[kind]
    fast = kernel.fast(packed, out)
    assert fast.shape == shape
    assert fast.dtype == out
    assert torch.equal(fast, kernel.twin(packed, out))


def test_the_codes_are_those_of_bitsandbytes():
    library = bitsandbytes_library()
    assert torch.equal(quantized._code(CPU), library.get_4bit_type("nf4", device="cpu"))
    assert torch.equal(quantized._code8(CPU), library.create_dynamic_map())


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantised_by_the_definition(shape):
    """The four bits are the same. Of the absmax, the twin takes the nearest of the 256 values; bitsandbytes' CPU kernel
    (0.50) takes one beside it now and then: of a normal matrix in one block of 600, here more often."""
    weight = drawn(*shape)
    fast, plain = quantize(weight, "nf4"), quantize_nf4_plain(weight)
    assert torch.equal(fast.values, plain.values)
    assert torch.equal(fast.scale, plain.scale)
    assert torch.equal(fast.mean, plain.mean)
    step = (fast.absmax.int() - plain.absmax.int()).abs()
    assert step.max() <= 2
    assert (step > 0).float().mean() <= 0.02
    largest = plain_largest(weight)
    group = torch.arange(len(largest)) // quantized.GROUP
    distances = ((largest - plain.mean) / plain.scale[group])[:, None].double() - quantized._code8(CPU).double()
    chosen = distances.abs().gather(1, plain.absmax.long()[:, None])[:, 0]
    assert (chosen - distances.abs().amin(1)).max() <= 1e-6


def plain_largest(weight: torch.Tensor) -> torch.Tensor:
    """Of each block of 64."""
    return torch.stack([block.abs().max() for block in weight.reshape(-1).split(64)])


def test_the_whole_matrix_at_once_gives_the_same_as_its_pieces():
    """bitsandbytes' own call, with its own double quantisation, on a matrix of more than one piece."""
    weight = drawn(2100, 2048)
    packed = quantize(weight, "nf4")
    values, state = bitsandbytes_library().quantize_4bit(weight, compress_statistics=True, quant_type="nf4")
    assert torch.equal(packed.values, values.view(-1))
    assert torch.equal(packed.absmax, state.absmax)
    assert torch.equal(packed.scale, state.state2.absmax)
    assert torch.equal(packed.mean, state.offset)
    assert torch.equal(packed.dequantized(torch.float32), bitsandbytes_library().dequantize_4bit(values, state))


@pytest.mark.parametrize(("kind", "low", "high"), [("nf4", 0.05, 0.11), ("int8", 0.003, 0.012)])
def test_what_it_costs_in_precision(kind, low, high):
    """Of a normal matrix: 4 bits keep it to about 9 %, 8 bits to about 0.8 %."""
    weight = 0.05 * torch.randn(512, 1024, generator=torch.Generator().manual_seed(1))
    assert low < distance(quantize(weight, kind).dequantized(torch.float32), weight) < high


def test_bytes_are_those_of_the_ledger():
    from lora_cmqa.train.ledger import NF4_BYTES

    weight = drawn(1024, 2048)
    assert quantize(weight, "nf4").nbytes == round(weight.numel() * NF4_BYTES) + 4  # and the mean
    assert quantize(weight, "int8").nbytes == weight.numel() + 4 * 1024


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", DEQUANTIZE)
def test_products_are_those_of_the_matrix_written_out(kind, dtype):
    parts = [drawn(48, 64, seed=1), drawn(16, 64, seed=2), drawn(16, 64, seed=3)]
    stacked = Stacked(tuple(quantize(w, kind) for w in parts))
    assert stacked.shape == (80, 64)
    assert len(stacked) == 80
    whole = written_out(stacked, dtype)
    x, bias, dy = (drawn(*s, dtype=dtype, seed=i) for i, s in enumerate(((7, 64), (1, 80), (7, 80)), 4))
    allowed = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2}[dtype]
    assert distance(product(x, stacked, bias[0]), x @ whole.t() + bias[0]) <= allowed
    assert distance(product(x, stacked, None), x @ whole.t()) <= allowed
    assert distance(product_back(dy, stacked), dy @ whole) <= allowed


@pytest.mark.parametrize("kind", DEQUANTIZE)
def test_a_kernel_that_writes_out_wrongly_is_found_and_replaced(kind, monkeypatch):
    kernel, right = DEQUANTIZE[kind], DEQUANTIZE[kind].fast
    assert check_kernels(CPU, torch.bfloat16, kind) == {}
    monkeypatch.setattr(kernel, "fast", lambda weight, dtype: right(weight, dtype) * 1.2)
    assert check_kernels(CPU, torch.bfloat16) == {}  # of no interest to a run in 16 bits
    assert list(check_kernels(CPU, torch.bfloat16, kind)) == [kernel.name]
    packed = quantize(drawn(64, 64), kind)
    assert torch.equal(packed.dequantized(torch.float32), kernel.twin(packed, torch.float32))
    monkeypatch.undo()
    assert check_kernels(CPU, torch.bfloat16, kind) == {}


def test_without_bitsandbytes_the_extra_is_named(monkeypatch):
    bitsandbytes_library.cache_clear()
    monkeypatch.setattr(quantized.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"lora-cmqa\[gpu\]"):
        quantize(drawn(8, 64), "nf4")
    monkeypatch.undo()
    bitsandbytes_library.cache_clear()
    assert quantize(drawn(8, 64), "nf4").nbytes


@pytest.mark.parametrize("before", ["", "import lora_cmqa.lora.inject; "])
def test_nothing_is_fetched_when_bitsandbytes_is_imported(before, tmp_path):
    """A package `kernels` whose get_kernel would fetch compiled code stands on the path: nobody calls it, and nobody
    warns that it is missing. (transformers imports it, to see its version.) Afterwards it can be imported again."""
    (tmp_path / "kernels.py").write_text("__version__ = '0.1'\ndef get_kernel(*a, **k): print('FETCHED')\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {before}"
    code += "import lora_cmqa.kernels.quantized as q; q.bitsandbytes_library(); "
    code += "import kernels; print('whole'); kernels.get_kernel()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["whole", "FETCHED"]
    assert "kernels" not in done.stderr
