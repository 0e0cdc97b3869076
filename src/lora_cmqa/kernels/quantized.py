"""Frozen weights in 4 or 8 bits: how they lie in memory, and how the 16- or 32-bit matrix comes back.

NF4 with double quantisation (QLoRA, Dettmers et al., arXiv 2305.14314, section 3; bitsandbytes, functional.py)

    64 weights of one block     w = code[i] * absmax          code: 16 quantiles of a normal distribution; two i a byte
    256 such absmax of a group  absmax = code8[j] * scale + mean      code8: the 8-bit dynamic map; mean: of the matrix

    4 + 8 / 64 + 32 / (64 * 256) bits a weight

int8 (Dettmers et al., arXiv 2208.07339, section 2): row by row, w = i * absmax / 127. Only the weight is rounded: the
product is taken in the dtype of its input, without LLM.int8()'s rounding of activations.

bitsandbytes does the work, on CPU and GPU; the plain twins define it. Nothing is fetched: see `bitsandbytes_library`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import itertools
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F

from ..errors import ConfigError
from .kernel import Kernel
from .tiles import rows_per_tile

Kind = Literal["nf4", "int8"]
BLOCK, GROUP = 64, 256  # weights that share an absmax; absmax that share a scale
_PIECE = 1 << 22  # weights that are worked on at once, where bitsandbytes makes float32 copies of them

# Quantiles of N(0, 1) scaled to [-1, 1], exact zero among them (QLoRA, appendix E): eight negative, eight not.
# fmt: off
NF4_CODE = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
# fmt: on


@dataclass(frozen=True, slots=True)
class Quantized:
    """One weight [out, in].

    nf4    values uint8 [out * in / 2], the first of two weights in the high half; absmax uint8 [blocks];
           scale float32 [groups]; mean float32 []
    int8   values int8 [out, in]; absmax float32 [out]
    """

    kind: Kind
    shape: tuple[int, int]
    values: torch.Tensor
    absmax: torch.Tensor
    scale: torch.Tensor | None = None
    mean: torch.Tensor | None = None

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        names = ("values", "absmax", "scale", "mean")
        return {n: t for n in names if (t := getattr(self, n)) is not None}

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> Quantized:
        return replace(self, **{n: function(t) for n, t in self.tensors.items()})

    def dequantized(self, dtype: torch.dtype) -> torch.Tensor:
        """[out, in] of `dtype`. In float64 it is the float32 matrix, widened."""
        within = torch.float32 if dtype == torch.float64 else dtype
        return DEQUANTIZE[self.kind](self, within).to(dtype)

    def __len__(self) -> int:
        return self.shape[0]


@dataclass(frozen=True, slots=True)
class Stacked:
    """Quantised weights of one input, one below the other, as one [sum of out, in]. They are written out one at a time,
    so a joined product takes no more memory than its largest part."""

    parts: tuple[Quantized, ...]

    @property
    def shape(self) -> tuple[int, int]:
        return sum(len(p) for p in self.parts), self.parts[0].shape[1]

    def __len__(self) -> int:
        return self.shape[0]

    def pieces(self) -> Iterator[tuple[slice, Quantized]]:
        """(rows of the whole, part)"""
        ends = itertools.accumulate(len(p) for p in self.parts)
        for end, part in zip(ends, self.parts, strict=True):
            yield slice(end - len(part), end), part


Frozen: TypeAlias = torch.Tensor | Stacked


def written_out(weight: Frozen, dtype: torch.dtype) -> torch.Tensor:
    """[out, in]: a tensor as it is, a quantised one whole."""
    if isinstance(weight, torch.Tensor):
        return weight
    return torch.cat([part.dequantized(dtype) for part in weight.parts])


def product(x: torch.Tensor, weight: Frozen, bias: torch.Tensor | None) -> torch.Tensor:
    """x [tokens, in] -> [tokens, out], as F.linear; no graph through a quantised weight."""
    if isinstance(weight, torch.Tensor):
        return F.linear(x, weight, bias)
    y = x.new_empty(len(x), len(weight))
    for rows, part in weight.pieces():
        y[:, rows] = F.linear(x, part.dequantized(x.dtype), None if bias is None else bias[rows])
    return y


def product_back(dy: torch.Tensor, weight: Frozen) -> torch.Tensor:
    """dy [tokens, out] -> the gradient of x, [tokens, in]."""
    if isinstance(weight, torch.Tensor):
        return dy @ weight
    dx: torch.Tensor | None = None
    for rows, part in weight.pieces():
        whole = part.dequantized(dy.dtype)
        dx = dy[:, rows] @ whole if dx is None else dx.addmm_(dy[:, rows], whole)
    assert dx is not None
    return dx


# ---- bitsandbytes ----------------------------------------------------------------------------------------------------


@functools.cache
def bitsandbytes_library() -> Any:
    """bitsandbytes.functional. Raises ConfigError where it is not installed.

    On processors with AVX-512 BF16 its import asks the package `kernels`, where that is installed, to fetch compiled
    code from a hub (0.50, backends/cpu/ops.py). So `kernels` does not exist while it is imported: its own CPU library
    answers. The one import of the process stands here; transformers, which imports it too, finds it made, and PEFT does
    not ask for it before (lora/peft_door.py).
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            "a quantised base needs bitsandbytes, which is not installed",
            field="model.quantization",
            hint='pip install "lora-cmqa[gpu]" (it has kernels for CPUs too), or --quantization none.',
        )
    keep_kernels_away()
    return importlib.import_module("bitsandbytes.functional")


def keep_kernels_away() -> None:
    """Import bitsandbytes, where it is installed and nobody has, in a way that fetches nothing."""
    if "bitsandbytes" in sys.modules or importlib.util.find_spec("bitsandbytes") is None:
        return
    absent = object()
    before: Any = sys.modules.get("kernels", absent)
    log = logging.getLogger("bitsandbytes.backends.cpu.ops")  # it warns of what is not missed
    level = log.level
    log.setLevel(logging.ERROR)
    sys.modules["kernels"] = None  # type: ignore[assignment]  # Python's own word for: not to be imported
    try:
        importlib.import_module("bitsandbytes")
    finally:
        log.setLevel(level)
        if before is absent:
            del sys.modules["kernels"]
        else:
            sys.modules["kernels"] = before


def quantize(weight: torch.Tensor, kind: Kind) -> Quantized:
    """A weight [out, in], on its own device. int8 takes it as float16, which is all that bitsandbytes' GPU kernel does;
    nf4 as it is, float64 as float32."""
    library = bitsandbytes_library()
    shape = (weight.shape[0], weight.shape[1])
    exact = weight.detach().contiguous()
    if kind == "int8":
        values, absmax, _ = library.int8_vectorwise_quant(exact.half())
        return Quantized(kind, shape, values, absmax)
    exact = exact.float() if exact.dtype == torch.float64 else exact
    values, largest = [], []
    for piece in exact.view(-1).split(_PIECE):  # on a CPU bitsandbytes holds some 20 bytes of each weight meanwhile
        packed, state = library.quantize_4bit(piece, blocksize=BLOCK, quant_type="nf4")
        values.append(packed.view(-1))
        largest.append(state.absmax)
    all_largest = torch.cat(largest)
    mean = all_largest.mean()
    absmax, state = library.quantize_blockwise(all_largest - mean, blocksize=GROUP)
    return Quantized(kind, shape, torch.cat(values), absmax, state.absmax, mean)


def dequantize_nf4(weight: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] of float32, bfloat16 or float16: bitsandbytes' kernels."""
    library = bitsandbytes_library()
    code8, code = _code8(weight.absmax.device), _code(weight.absmax.device)
    inner = library.QuantState(absmax=weight.scale, code=code8, blocksize=GROUP, dtype=torch.float32)
    state = library.QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=code,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=weight.mean,
        state2=inner,
    )
    return library.dequantize_4bit(weight.values.view(-1, 1), state)


def dequantize_int8(weight: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """[out, in] of float32, bfloat16 or float16: bitsandbytes' kernels, which give float32, some rows at a time."""
    library = bitsandbytes_library()
    out = torch.empty(weight.shape, dtype=dtype, device=weight.values.device)
    inner = weight.shape[1]
    step = rows_per_tile(out.device, 8 * inner) or max(1, _PIECE // inner)
    for start in range(0, len(out), step):
        rows = slice(start, start + step)
        out[rows] = library.int8_vectorwise_dequant(weight.values[rows], weight.absmax[rows])
    return out


# ---- the plain twins -------------------------------------------------------------------------------------------------


def quantize_nf4_plain(weight: torch.Tensor) -> Quantized:
    """The definition: each weight, divided by the largest of its block, to the nearest of the sixteen; the blocks'
    largest, less their mean, to the nearest of 256 in the same way."""
    flat = weight.detach().reshape(-1).float()
    index, largest = _nearest(flat, BLOCK, _code(flat.device))
    mean = largest.mean()
    absmax, scale = _nearest(largest - mean, GROUP, _code8(flat.device))
    pairs = F.pad(index, (0, len(index) % 2)).view(-1, 2).to(torch.uint8)
    values = pairs[:, 0] << 4 | pairs[:, 1]
    return Quantized("nf4", (weight.shape[0], weight.shape[1]), values, absmax.to(torch.uint8), scale, mean)


def dequantize_nf4_plain(weight: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """The definition, in float32 and rounded once; the same bits as bitsandbytes."""
    assert weight.scale is not None
    assert weight.mean is not None
    count = weight.shape[0] * weight.shape[1]
    absmax = _spread(_code8(weight.absmax.device)[weight.absmax.long()], weight.scale, GROUP) + weight.mean
    index = torch.stack((weight.values >> 4, weight.values & 15), dim=1).view(-1)[:count]
    return _spread(_code(index.device)[index.long()], absmax, BLOCK).view(weight.shape).to(dtype)


def dequantize_int8_plain(weight: Quantized, dtype: torch.dtype) -> torch.Tensor:
    """The definition, in float32 and rounded once; the same bits as bitsandbytes, which multiplies by 1 / 127."""
    return (weight.values * weight.absmax[:, None] * (1 / 127)).to(dtype)


def _nearest(flat: torch.Tensor, block: int, code: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(index of the nearest value of `code` for each, divided by the largest of its block; those largest)"""
    blocks = F.pad(flat, (0, -len(flat) % block)).view(-1, block)
    largest = blocks.abs().amax(1)
    middle = (code[:-1] + code[1:]) / 2
    scaled = blocks * (1 / largest.clamp(min=1e-38))[:, None]
    return torch.bucketize(scaled.clamp(-1, 1), middle).view(-1)[: len(flat)], largest


def _spread(values: torch.Tensor, scales: torch.Tensor, block: int) -> torch.Tensor:
    """Each value times the scale of its block."""
    blocks = F.pad(values, (0, -len(values) % block)).view(-1, block)
    return (blocks * scales[:, None]).view(-1)[: len(values)]


@functools.cache
def _code(device: torch.device) -> torch.Tensor:
    return torch.tensor(NF4_CODE, dtype=torch.float32, device=device)


@functools.cache
def _code8(device: torch.device) -> torch.Tensor:
    """The dynamic map of 8 bits, signed (Dettmers, arXiv 1511.04561): sign, e zeros, a one, 6 - e bits of fraction.
    Values +-10^-e times the middles of 2^(6 - e) equal steps from 0.1 to 1; 0; and 1, which has no mirror."""
    values = [0.0, 1.0]
    for e in range(7):
        ends = torch.linspace(0.1, 1, 2 ** (6 - e) + 1, dtype=torch.float32)
        middles = 10.0**-e * ((ends[:-1] + ends[1:]) / 2)
        values += [*middles.tolist(), *(-middles).tolist()]
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


DEQUANTIZE: dict[str, Kernel[Any]] = {
    "nf4": Kernel(dequantize_nf4, dequantize_nf4_plain),
    "int8": Kernel(dequantize_int8, dequantize_int8_plain),
}
