"""The gate of the MLP: activation(gate) * up, from one joined product. Only that product is kept.

SwiGLU   silu(g) * u                 Llama, Qwen
GeGLU    gelu(g, tanh) * u           Gemma
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch.nn.functional as F

Activation = Literal["silu", "gelu_tanh"]

# name -> the activation, and d loss / d g from d loss / d activation(g) and g
_ACTIVATIONS: dict[str, tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]]] = {
    "silu": (F.silu, torch.ops.aten.silu_backward),
    "gelu_tanh": (
        lambda g: F.gelu(g, approximate="tanh"),
        lambda d, g: torch.ops.aten.gelu_backward(d, g, approximate="tanh"),
    ),
}


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """gate_up [tokens, 2 * inner], the gate first -> [tokens, inner] of its dtype."""
    return _Gated.apply(gate_up, activation)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        ctx.save_for_backward(gate_up)
        ctx.activation = activation
        gate, up = gate_up.chunk(2, -1)
        return _ACTIVATIONS[activation][0](gate).mul_(up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        (gate_up,) = ctx.saved_tensors
        act, act_backward = _ACTIVATIONS[ctx.activation]
        (gate, up), out = gate_up.chunk(2, -1), torch.empty_like(gate_up)
        to_gate, to_up = out.chunk(2, -1)
        torch.mul(upstream[0], act(gate), out=to_up)
        to_gate.copy_(act_backward(upstream[0] * up, gate))
        return out, None


def gated_plain(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """The definition, by autograd."""
    gate, up = gate_up.chunk(2, -1)
    return (F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")) * up
