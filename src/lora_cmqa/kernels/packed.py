"""Weights laid out anew, once, for products with few rows.

    F.linear    [out, in] row by row -> in every call the blocks that the processor multiplies -> product
    Packed      the blocks, in memory                                                          -> product

A product with 1 to 32 rows takes its time from reading the weight; putting it in order doubles that. What is kept is
oneDNN's own order, through the operators that torch's compiler calls for frozen weights (torch 2.13,
_inductor/fx_passes/mkldnn_fusion.py). It is a second copy of the weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

_ROWS = 8  # the order is chosen for products of so many; others find it as good
_right: dict[tuple[int, int], bool] = {}  # by shape, which decides on the way a product is taken
_ALLOWED = 1e-2  # ||packed - plain|| / ||plain||: both round float32 sums to bfloat16 once


@dataclass(frozen=True, slots=True)
class Packed:
    """One bfloat16 weight [out, in] on a CPU."""

    blocks: torch.Tensor  # opaque
    shape: tuple[int, int]

    def product(self, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """x [rows, in] -> [rows, out], as F.linear; no graph."""
        return _operators()._linear_pointwise(x, self.blocks, bias, "none", [], "")

    def __len__(self) -> int:
        return self.shape[0]


@torch.inference_mode()
def packed(weight: torch.Tensor) -> Packed | None:
    """None where this processor or build has no such product, or where it gives something else than F.linear."""
    shape = (weight.shape[0], weight.shape[1])
    if not can_pack(weight.device, weight.dtype):
        return None
    try:
        found = Packed(_operators()._reorder_linear_weight(weight.detach(), _ROWS), shape)
        if shape not in _right:
            _right[shape] = _is_right(found, weight)
    except (RuntimeError, NotImplementedError, AttributeError):  # the operators are torch's own affair
        return None
    return found if _right[shape] else None


def _is_right(found: Packed, weight: torch.Tensor) -> bool:
    x = torch.randn(_ROWS, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(weight.dtype)
    fast, plain = found.product(x).float(), F.linear(x, weight).float()
    return float((fast - plain).norm()) <= _ALLOWED * float(plain.norm())


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    if device.type != "cpu" or dtype != torch.bfloat16 or not torch.backends.mkldnn.is_available():
        return False
    return hasattr(_operators(), "_linear_pointwise") and bool(_operators()._is_mkldnn_bf16_supported())


def _operators() -> Any:
    return torch.ops.mkldnn
