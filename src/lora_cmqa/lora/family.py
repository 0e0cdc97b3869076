"""The pre-norm family of decoders: what differs between its members, and one member's parts as they stand now.

    HF + PEFT modules    -> read_body(model) -> Body: embedding, blocks, last norm
    q_proj k_proj v_proj -> one weight whose rows are theirs; each module's weight becomes a view of it, in place
    quantised ones       -> stay as they are; a product writes them out one after the other (kernels/quantized.py)

A Body is read anew for each forward, so what was done to the modules in between counts: an adapter loaded, switched
off or changed, a move to another device. What a Body cannot say raises Unsupported with the reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear

from ..kernels.lora_linear import LowRank
from ..kernels.mlp import Activation
from ..kernels.quantized import Frozen, Stacked
from ..messages import say
from ..models.quantized import QuantizedLinear


@dataclass(frozen=True, slots=True)
class Family:
    """What differs. Windows, biases, tied heads, soft cap and logit scale are read off the model itself."""

    after_attention: str | None = None  # names of norms; None: the residual takes the output as it is
    before_mlp: str = "post_attention_layernorm"
    after_mlp: str | None = None
    norm_offset: float = 0.0  # norms multiply by offset + weight
    qk_norm: bool = False  # every head of q and k is normed before the rotation
    rotary_kinds: bool = False  # sliding and full attention turn by different tables


FAMILIES: dict[str, Family] = {  # by transformers' class, less ForCausalLM
    "Llama": Family(),
    "Qwen2": Family(),
    "Qwen3": Family(qk_norm=True),
    "Gemma3": Family(
        after_attention="post_attention_layernorm",
        before_mlp="pre_feedforward_layernorm",
        after_mlp="post_feedforward_layernorm",
        norm_offset=1.0,
        qk_norm=True,
        rotary_kinds=True,
    ),
}
_ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}


@dataclass(frozen=True, slots=True)
class Norm:
    weight: torch.Tensor  # [width], or [heads, head_dim] for the heads of q and k together
    eps: float
    offset: float


@dataclass(frozen=True, slots=True)
class Projection:
    """Linear layers of one input: weight [sum of their outputs, in], bias likewise, active adapters on its rows."""

    weight: Frozen
    bias: torch.Tensor | None
    adapters: tuple[LowRank, ...]


@dataclass(frozen=True, slots=True)
class Block:
    before_attention: Norm
    qkv: Projection
    qk_norm: Norm | None
    out: Projection
    after_attention: Norm | None
    before_mlp: Norm
    gate_up: Projection
    down: Projection
    after_mlp: Norm | None
    activation: Activation
    heads: int
    kv_heads: int
    head_dim: int
    scale: float  # of the attention scores
    window: int | None
    attention_dropout: float
    rotary_kind: str | None
    checkpoint: Callable[..., Any] | None  # set: keep the block's input only and compute it again in the backward


@dataclass(frozen=True, slots=True)
class Body:
    embedding: Any  # the module itself: it may scale, be trained, or carry trained tokens
    rotary: Any  # the module: (x, position_ids [, kind]) -> cos, sin
    blocks: tuple[Block, ...]
    norm: Norm


class Unsupported(Exception):
    """Why the plain way is taken, as a sentence for people."""


def read_body(causal: Any, longest_row: int = 0) -> Body:
    """The parts of a transformers causal model for rows of at most `longest_row` tokens. Raises Unsupported."""
    name = type(causal).__name__.removesuffix("ForCausalLM")
    family, decoder = FAMILIES.get(name), causal.get_decoder()
    if family is None:
        raise Unsupported(say("decoder.unknown_model", model=type(causal).__name__))
    blocks = []
    for i, layer in enumerate(decoder.layers):
        _check_attention(layer.self_attn, name, longest_row)
        blocks.append(_block(layer, family, f"layers.{i}"))
    return Body(
        embedding=causal.get_input_embeddings(),
        rotary=decoder.rotary_emb,
        blocks=tuple(blocks),
        norm=_norm(decoder.norm, family, "norm"),
    )


def _check_attention(attention: Any, name: str, longest_row: int) -> None:
    kind = type(attention).__name__
    if kind == "Qwen1Attention":  # Qwen2's, but in evaluation it scales the queries of long rows
        if not attention.training and longest_row > attention.seq_length:
            raise Unsupported(say("decoder.long_rows", tokens=longest_row, most=attention.seq_length))
    elif kind != f"{name}Attention" or not attention.is_causal:
        raise Unsupported(say("decoder.other_part", part="self_attn", kind=kind))


def _block(layer: Any, family: Family, place: str) -> Block:
    attention, mlp = layer.self_attn, layer.mlp
    q, k = attention.q_proj.out_features, attention.k_proj.out_features
    heads, kv_heads = q // attention.head_dim, k // attention.head_dim
    activation = _ACTIVATIONS.get(getattr(mlp.config, "hidden_act", None) or mlp.config.hidden_activation)
    if activation is None:
        raise Unsupported(say("decoder.other_part", part="activation", kind=type(mlp.act_fn).__name__))

    def norm(name: str) -> Norm:
        return _norm(getattr(layer, name), family, f"{place}.{name}")

    return Block(
        before_attention=norm("input_layernorm"),
        qkv=_projection(attention, ("q_proj", "k_proj", "v_proj"), place),
        qk_norm=_qk_norm(attention, heads, kv_heads, family, place) if family.qk_norm else None,
        out=_projection(attention, ("o_proj",), place),
        after_attention=norm(family.after_attention) if family.after_attention else None,
        before_mlp=norm(family.before_mlp),
        gate_up=_projection(mlp, ("gate_proj", "up_proj"), place),
        down=_projection(mlp, ("down_proj",), place),
        after_mlp=norm(family.after_mlp) if family.after_mlp else None,
        activation=activation,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=attention.head_dim,
        scale=attention.scaling,
        window=getattr(attention, "sliding_window", None),
        attention_dropout=attention.attention_dropout if attention.training else 0.0,
        rotary_kind=attention.layer_type if family.rotary_kinds else None,
        checkpoint=layer._gradient_checkpointing_func if layer.gradient_checkpointing and layer.training else None,
    )


def _norm(module: Any, family: Family, place: str) -> Norm:
    weight = _frozen(module, "RMSNorm", place)
    return Norm(weight, module.eps if hasattr(module, "eps") else module.variance_epsilon, family.norm_offset)


def _qk_norm(attention: Any, heads: int, kv_heads: int, family: Family, place: str) -> Norm:
    q, k = (_norm(getattr(attention, n), family, f"{place}.{n}") for n in ("q_norm", "k_norm"))
    return Norm(torch.cat((q.weight.expand(heads, -1), k.weight.expand(kv_heads, -1))), q.eps, q.offset)


def _projection(owner: Any, names: tuple[str, ...], place: str) -> Projection:
    bases, adapters, start = [], [], 0
    for name in names:
        module = getattr(owner, name)
        base = module.base_layer if type(module) is LoraLinear else module
        if type(base) is not QuantizedLinear:
            _frozen(base, "Linear", f"{place}.{name}")
        stop = start + base.out_features
        if base is not module:
            adapters += _adapters(module, start, stop, f"{place}.{name}")
        bases.append(base)
        start = stop
    biases = [base.bias for base in bases]
    if None not in biases:
        bias = torch.cat(biases)
    elif biases.count(None) == len(biases):
        bias = None
    else:
        raise Unsupported(say("decoder.other_part", part=f"{place}.{names[0]}", kind="bias"))
    return Projection(_weight(bases, f"{place}.{names[0]}"), bias, tuple(adapters))


def _weight(bases: list[Any], place: str) -> Frozen:
    packed = [base for base in bases if type(base) is QuantizedLinear]
    if not packed:
        return joined([base.weight for base in bases])
    if len(packed) < len(bases):
        raise Unsupported(say("decoder.other_part", part=place, kind="16 bits beside quantised"))
    return Stacked(tuple(base.quantized for base in packed))


def _adapters(module: LoraLinear, start: int, stop: int, place: str) -> list[LowRank]:
    if module.merged:
        raise Unsupported(say("decoder.merged", part=place))
    if module.disable_adapters:
        return []
    active = [n for n in module.active_adapters if n in module.lora_A]
    for n in active:
        if n in module.lora_variant or module.lora_bias.get(n):
            kind = type(module.lora_variant[n]).__name__ if n in module.lora_variant else "lora_bias"
            raise Unsupported(say("decoder.lora_variant", part=place, kind=kind))
    return [
        LowRank(
            a=module.lora_A[n].weight,
            b=module.lora_B[n].weight,
            scale=module.scaling[n],
            start=start,
            stop=stop,
            dropout=getattr(module.lora_dropout[n], "p", 0.0) if module.training else 0.0,
        )
        for n in active
    ]


def _frozen(module: Any, kind: str, place: str) -> torch.Tensor:
    """The weight of a module that is nothing else than it seems: not quantised, not wrapped, not trained."""
    if not type(module).__name__.endswith(kind) or not isinstance(getattr(module, "weight", None), torch.nn.Parameter):
        raise Unsupported(say("decoder.other_part", part=place, kind=type(module).__name__))
    if module.weight.requires_grad or not module.weight.is_floating_point():
        raise Unsupported(say("decoder.other_part", part=place, kind=str(module.weight.dtype)))
    return module.weight


def joined(weights: list[torch.nn.Parameter]) -> torch.Tensor:
    """[sum of rows, in]: the weights one below the other.

    Where they do not lie so in memory they are put there once, and each becomes a view of its rows: names, shapes
    and values stay, and no second copy is kept.
    """
    if len(weights) == 1:
        return weights[0].detach()
    if not all(_follows(a, b) for a, b in itertools.pairwise(weights)):
        with torch.no_grad(), torch.inference_mode(False):
            whole = torch.cat([w.detach() for w in weights])
            for weight, part in zip(weights, whole.split([len(w) for w in weights]), strict=True):
                weight.data = part
    first, rows = weights[0].detach(), sum(len(w) for w in weights)
    return first.as_strided((rows, first.shape[1]), (first.shape[1], 1))


def _follows(a: torch.Tensor, b: torch.Tensor) -> bool:
    """b begins in the same storage where a ends."""
    return (
        a.is_contiguous()
        and b.is_contiguous()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.data_ptr() + a.numel() * a.element_size() == b.data_ptr()
        and a.shape[1] == b.shape[1]
    )
