"""The plain twin of the fast decoder: transformers' own body with PEFT's layers in it, over the same packs.

Its attention is replaced, through transformers' registry and for the time of the call only, by
kernels.packed_attention, which takes the rows' lengths. It defines what decoder.py computes, and stands in for it
wherever family.py has no word for the model or its adapter.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import AttentionInterface

from ..core import Pack
from ..kernels.table import packed_attention

_NAME = "lora_cmqa_packed"


def hidden_states_plain(causal: Any, pack: Pack) -> torch.Tensor:
    """[supervised, width]: the final hidden states (after the last norm) at `pack.predict_at`."""
    device = causal.device
    with _packed(causal):
        hidden = causal.get_decoder()(
            input_ids=torch.from_numpy(pack.input_ids).long().to(device)[None],
            position_ids=torch.from_numpy(pack.position_ids).long().to(device)[None],
            attention_mask=None,
            use_cache=False,
            row_lengths=pack.row_lengths,
            parents=pack.parents,
        ).last_hidden_state
    return hidden[0].index_select(0, torch.from_numpy(pack.predict_at).long().to(device))


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
    parents: tuple[int, ...] = (),
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: [1, heads, tokens, dim] in, [1, tokens, heads, dim] out."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = packed_attention(
        q,
        k,
        v,
        row_lengths,
        parents=parents,
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
