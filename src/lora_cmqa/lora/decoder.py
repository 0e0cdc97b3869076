"""One forward of base + adapter over a pack: real tokens in, losses of the supervised ones out.

    pack -> body (rows do not see each other) -> hidden states of the supervised rows -> head and loss in chunks

The body is transformers' own class with PEFT's layers in it. Its attention is replaced, through transformers'
registry and for the time of the call only, by kernels.packed_attention, which takes the rows' lengths.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.utils.checkpoint
from transformers import AttentionInterface

from ..core import Pack
from ..errors import ModelError
from ..kernels.attention import packed_attention
from ..kernels.head import CHUNK, linear_cross_entropy

_NAME = "lora_cmqa_packed"


def hidden_states(model: Any, pack: Pack) -> torch.Tensor:
    """[supervised, width]: the final hidden states (after the last norm) at `pack.predict_at`."""
    causal = causal_lm(model)
    device = causal.get_input_embeddings().weight.device
    with _packed(causal):
        hidden = causal.get_decoder()(
            input_ids=torch.from_numpy(pack.input_ids).long().to(device)[None],
            position_ids=torch.from_numpy(pack.position_ids).long().to(device)[None],
            attention_mask=None,
            use_cache=False,
            row_lengths=pack.row_lengths,
        ).last_hidden_state
    return hidden[0].index_select(0, torch.from_numpy(pack.predict_at).long().to(device))


def pack_losses(model: Any, pack: Pack, *, chunk: int = CHUNK) -> torch.Tensor:
    """-log p of each supervised token, [supervised], float32 (float64 for a float64 model), in nats; differentiable."""
    return head_losses(model, hidden_states(model, pack), torch.from_numpy(pack.targets), chunk=chunk)


def head_losses(model: Any, hidden: torch.Tensor, targets: torch.Tensor, *, chunk: int = CHUNK) -> torch.Tensor:
    """-log p of `targets` [rows] after the hidden states [rows, width], as `pack_losses` gives them."""
    causal = causal_lm(model)
    return linear_cross_entropy(
        hidden,
        _head_weight(causal),
        targets.long().to(hidden.device),
        chunk=chunk,
        softcap=getattr(causal.config, "final_logit_softcapping", None),
        scale=getattr(causal.config, "logit_scale", None) or 1.0,
    )


@torch.no_grad()
def head_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [rows, vocabulary] of hidden states [rows, width], float32 (float64 for a float64 model)."""
    causal = causal_lm(model)
    logits = torch.mm(hidden, _head_weight(causal).t()).to(torch.promote_types(hidden.dtype, torch.float32))
    logits *= getattr(causal.config, "logit_scale", None) or 1.0
    softcap = getattr(causal.config, "final_logit_softcapping", None)
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


@torch.no_grad()
def token_losses(model: Any, pack: Pack, *, chunk: int = CHUNK) -> torch.Tensor:
    """`pack_losses` without a graph, for evaluation."""
    return pack_losses(model, pack, chunk=chunk)


def checkpoint_activations(model: Any, layers: int | None = None) -> None:
    """Keep each layer's input only and compute the layer again in the backward; `layers`: the first so many only.
    (transformers' own switch would also ask for a gradient at the embeddings, which nothing here trains.)

    The first ones: in the backward the others have given their memory back when these need theirs.
    """
    way = functools.partial(torch.utils.checkpoint.checkpoint, use_reentrant=False)
    causal_lm(model)._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=way)
    for layer in causal_lm(model).get_decoder().layers[layers:] if layers is not None else ():
        layer.gradient_checkpointing = False


def causal_lm(model: Any) -> Any:
    """The transformers class inside a PeftModel, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _head_weight(causal: Any) -> torch.Tensor:
    head = causal.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ModelError(f"the head of {type(causal).__name__} has a bias, which no supported family has")
    return head.weight if type(head) is torch.nn.Linear else _trained_head(head)


def _trained_head(head: Any) -> torch.Tensor:
    """The weight that modules_to_save trains in place of the frozen one."""
    active = getattr(head, "modules_to_save", None)
    if active is None:
        raise ModelError(f"a head of type {type(head).__name__} is not known", hint="Train without LoRA on lm_head.")
    if head.disable_adapters:
        return head.original_module.weight
    return active[head.active_adapters[0]].weight


def _attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    row_lengths: tuple[int, ...] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, heads, tokens, dim] in, [1, tokens, heads, dim] out."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = packed_attention(
        q,
        k,
        v,
        row_lengths,
        scale=scaling if scaling is not None else q.shape[-1] ** -0.5,
        window=sliding_window,
        softcap=softcap,
        dropout=dropout,
    )
    return out[None], None


AttentionInterface.register(_NAME, _attention)


@contextlib.contextmanager
def _packed(causal: Any) -> Iterator[None]:
    """The body's attention is ours inside, its own again outside. (transformers makes no mask for a name that it has
    no mask function for, and none is wanted.)

    Gradient checkpointing runs a layer once more in the backward, when this block is long left. So what is
    checkpointed is not the layer's forward but the forward with our attention around it.
    """
    decoder = causal.get_decoder()
    layers = [m for m in decoder.modules() if getattr(m, "gradient_checkpointing", False)]
    own = [m._gradient_checkpointing_func for m in layers]
    for layer, checkpoint in zip(layers, own, strict=True):
        layer._gradient_checkpointing_func = _checkpoint_with_ours(checkpoint, decoder.config)
    try:
        with _our_attention(decoder.config):
            yield
    finally:
        for layer, checkpoint in zip(layers, own, strict=True):
            layer._gradient_checkpointing_func = checkpoint


def _checkpoint_with_ours(checkpoint: Callable[..., Any], config: Any) -> Callable[..., Any]:
    def run(function: Callable[..., Any], *args: Any) -> Any:
        def with_ours(*inputs: Any) -> Any:
            with _our_attention(config):
                return function(*inputs)

        return checkpoint(with_ours, *args)

    return run


@contextlib.contextmanager
def _our_attention(config: Any) -> Iterator[None]:
    before = config._attn_implementation
    config._attn_implementation = _NAME
    try:
        yield
    finally:
        config._attn_implementation = before
