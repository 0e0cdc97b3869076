"""A base whose layers' matrices are frozen in 4 or 8 bits, made while it is loaded.

    checkpoint's tensor -> 16 or 32 bits, on the device -> quantised -> the next tensor

Never more than one matrix is there in 16 bits. Embedding, head, norms and biases keep their dtype. A quantised layer is
a torch.nn.Linear to everyone who asks (PEFT puts its plain LoRA beside it); its `weight` holds the packed values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..errors import ModelError
from ..kernels.lora_linear import lora_linear
from ..kernels.quantized import Kind, Quantized, Stacked, quantize

_METHOD = "lora_cmqa"  # its name in transformers' registry


class QuantizedLinear(nn.Linear):
    """y = x W' + bias with W written out for the time of the product, forward and backward.

    weight  the packed values (uint8 or int8), or [out, in] on the meta device until `take` was called
    """

    def __init__(self, like: nn.Linear, kind: Kind) -> None:
        """In the place of `like`, whose bias it keeps."""
        super().__init__(like.in_features, like.out_features, bias=False, device="meta", dtype=like.weight.dtype)
        self.bias = like.bias
        self.kind: Kind = kind
        self.requires_grad_(False)

    def take(self, weight: torch.Tensor) -> nn.Parameter:
        """Quantise `weight` [out, in] where it lies; returns what is now the parameter."""
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ModelError(
                f"a weight has the shape {tuple(weight.shape)}; {(self.out_features, self.in_features)} is expected"
            )
        self._rest = quantize(weight, self.kind)
        self.weight = nn.Parameter(self._rest.values, requires_grad=False)
        return self.weight

    @property
    def quantized(self) -> Quantized:
        return self._rest

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]"""
        y = lora_linear(x.reshape(-1, self.in_features), Stacked((self._rest,)), self.bias, ())
        return y.view(*x.shape[:-1], self.out_features)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        """Moved with the model; its constants stay float32 whatever dtype the model is cast to."""
        super()._apply(fn, recurse)
        if hasattr(self, "_rest"):
            device = self.weight.device
            self._rest = self._rest.map(lambda t: self.weight.data if t is self._rest.values else t.to(device))
        return self


def place_quantized(model: Any, kind: Kind) -> None:
    """Every linear layer of `model` but its head becomes a QuantizedLinear that waits for its weight."""
    head = model.get_output_embeddings()
    found = [(path, m) for path, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head]
    for path, linear in found:
        parent, _, leaf = path.rpartition(".")
        setattr(model.get_submodule(parent), leaf, QuantizedLinear(linear, kind))


def quantization_of(model: Any) -> str:
    """none, nf4 or int8: how the layers of `model` (bare or under PEFT) are kept."""
    return next((m.kind for m in model.modules() if isinstance(m, QuantizedLinear)), "none")


def parameters_of(model: Any) -> int:
    """How many weights there are, whatever they are packed into."""
    packed = [m for m in model.modules() if isinstance(m, QuantizedLinear)]
    whole = sum(m.in_features * m.out_features - m.weight.numel() for m in packed)
    return sum(p.numel() for p in model.parameters()) + whole


# ---- while transformers loads ----------------------------------------------------------------------------------------
# Its way for quantisers of others: modules are replaced on the meta device, then each tensor is read, handed to
# `convert` and dropped, one after the other (core_model_loading: no threads while something is quantised).


@register_quantization_config(_METHOD)
@dataclass
class OnLoad(QuantizationConfigMixin):
    """What from_pretrained takes as quantization_config."""

    kind: Kind = "nf4"
    quant_method: str = _METHOD  # type: ignore[assignment]


@register_quantizer(_METHOD)
class _Quantizer(HfQuantizer):
    quantization_config: OnLoad

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        place_quantized(model, self.quantization_config.kind)

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        path, leaf = param_name.rpartition(".")[::2]
        return leaf == "weight" and isinstance(model.get_submodule(path), QuantizedLinear)

    @property
    def quantized_element_size(self) -> float:
        return 0.5 if self.quantization_config.kind == "nf4" else 1

    def get_quantize_ops(self) -> ConversionOps:
        return _Take()

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return True


class _Take(ConversionOps):
    def convert(self, input_dict: dict[str, Any], *, model: Any = None, **_: Any) -> dict[str, torch.Tensor]:
        taken = {}
        for name, value in input_dict.items():
            layer = model.get_submodule(name.rpartition(".")[0])
            taken[name] = layer.take(value[0] if isinstance(value, list) else value)
        return taken


def forget_quantizer(model: Any) -> None:
    """transformers' notes on how it was loaded: from here on it is a model like any other."""
    if (quantizer := getattr(model, "hf_quantizer", None)) is not None:
        quantizer.remove_quantization_config(model)
        del model.is_quantized
