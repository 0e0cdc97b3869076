"""The gate of the MLP: activation(gate) * up, from one joined product. Only that product is kept.

    SwiGLU   silu(g) * u          silu(g) = g sigmoid(g)                                Llama, Qwen
    GeGLU    gelu(g) * u          gelu(g) = g sigmoid(2 c (g + 0.044715 g^3))           Gemma
                                  c = sqrt(2 / pi): the tanh form, since 1 + tanh(z) = 2 sigmoid(2 z)

(torch's own gelu is several times slower on a CPU: it takes a hyperbolic tangent of each value.)
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F

from .tiles import in_tiles, row_tiles

Activation = Literal["silu", "gelu_tanh"]
_C = 2 * math.sqrt(2 / math.pi)


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """gate_up [tokens, 2 * inner], the gate first -> [tokens, inner] of its dtype."""
    if gate_up.requires_grad and torch.is_grad_enabled():
        return _Gated.apply(gate_up, activation)
    return _gated(gate_up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        return _gated(gate_up, activation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        exact = torch.promote_types(gate_up.dtype, torch.float32)
        (gate, up), out = gate_up.chunk(2, -1), torch.empty_like(gate_up)
        to_gate, to_up = out.chunk(2, -1)
        for rows in row_tiles(gate_up, gate.shape[1] * 8):
            g, d = gate[rows].to(exact), upstream[0][rows].to(exact)
            sigmoid = _sigmoid(g, ctx.activation)
            value = sigmoid * g
            to_up[rows] = value * d
            # (g s(z))' = s + g s (1 - s) z'
            slope = value.mul_(1 - sigmoid)
            if ctx.activation == "gelu_tanh":
                slope.mul_((g * g).mul_(3 * 0.044715 * _C).add_(_C))
            to_gate[rows] = slope.add_(sigmoid).mul_(d).mul_(up[rows])
        return out, None


def _gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    exact = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.chunk(2, -1)

    def piece(rows: slice) -> torch.Tensor:
        g = gate[rows].to(exact)
        value = _sigmoid(g, activation).mul_(g).to(gate.dtype)  # rounded before the product, as transformers does
        return value.mul_(up[rows])

    return in_tiles(piece, gate_up, gate.shape[1] * 8, gate.shape)


def _sigmoid(g: torch.Tensor, activation: Activation) -> torch.Tensor:
    """What g is multiplied by: a new tensor."""
    return torch.sigmoid(g) if activation == "silu" else (g * g).mul_(0.044715 * _C).add_(_C).mul_(g).sigmoid_()


def gated_plain(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The definition, by autograd."""
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
