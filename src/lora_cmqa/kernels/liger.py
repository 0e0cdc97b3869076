"""Liger's Triton kernels (liger-kernel 0.8, liger_kernel/ops) in the place of ours, on a GPU where they are installed.

    rms_norm    LigerRMSNormFunction             everything in float32, one rounding: its mode "gemma" is our definition
    gated       LigerFusedGateUpSiLUMulFunction  the joined product as it is
                LigerGELUMulFunction             its halves, copied

Each is one kernel where torch's operators are a chain of them. The rotation has none here: Liger turns queries and keys
of their own, and would copy what lies joined. The head's loss is ours as well (head.py): of supervised rows only, where
Liger's makes the logits of every row it is given.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

import torch

from . import norm
from .mlp import Activation


def is_installed() -> bool:
    return all(importlib.util.find_spec(name) is not None for name in ("liger_kernel", "triton"))


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, offset: float = 0.0) -> torch.Tensor:
    """As norm.rms_norm. A weight of its own for each head is norm.rms_norm's affair."""
    if weight.dim() != 1:
        return norm.rms_norm(x, weight, eps, offset)
    in_place = False  # it would write over the gradient that comes in, which a residual reads as well
    out: torch.Tensor = _function("rms_norm", "LigerRMSNormFunction")(x, weight, eps, offset, "gemma", in_place)
    return out


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """As mlp.gated."""
    if activation == "silu":
        out: torch.Tensor = _function("swiglu", "LigerFusedGateUpSiLUMulFunction")(gate_up, False)
    else:
        out = _function("geglu", "LigerGELUMulFunction")(*gate_up.chunk(2, -1))
    return out


def _function(module: str, name: str) -> Any:
    return getattr(importlib.import_module(f"liger_kernel.ops.{module}"), name).apply
