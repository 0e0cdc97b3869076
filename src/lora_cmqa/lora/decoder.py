"""The fast path: one forward of base + adapter over a pack, real tokens in, losses of the supervised ones out.

    pack -> embedding [tokens, width] -> blocks -> rows that predict something -> norm -> head and loss in chunks
                                           |
              x + attention(norm(x))  then  + mlp(norm(.))      family.py says what differs between models

It reads the parameters of the HF + PEFT model where they are. Rows lie end to end, no row sees another, no pad token
stands between; after the last attention only supervised rows go on. What family.py has no word for takes plain.py's
way, which gives the same numbers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.utils.checkpoint
from peft.utils.other import TrainableTokensWrapper

from ..core import Pack
from ..errors import ModelError
from ..kernels.head import CHUNK, TrainedRows, shaped_logits
from ..kernels.table import cross_entropy, gated, packed_attention, project, rms_norm, rotate
from .family import Block, Body, Norm, Projection, Unsupported, read_body
from .plain import hidden_states_plain
from .tokens import embed, trained_rows

Table = tuple[torch.Tensor, torch.Tensor]  # cos, sin, each [tokens, head_dim / 2]


def hidden_states(model: Any, pack: Pack) -> torch.Tensor:
    """[supervised, width]: the final hidden states (after the last norm) at `pack.predict_at`."""
    causal = causal_lm(model)
    try:
        body = read_body(causal, longest_row=int(pack.position_ids.max()) + 1)
    except Unsupported:
        return hidden_states_plain(causal, pack)
    device = causal.device
    keep = torch.from_numpy(pack.predict_at).long().to(device)
    positions = torch.from_numpy(pack.position_ids).long().to(device)
    x = embed(body.embedding, torch.from_numpy(pack.input_ids).long().to(device))
    tables = rotary_tables(body, x, positions)
    for block in body.blocks:
        last = block is body.blocks[-1]
        run = functools.partial(
            _block,
            block=block,
            table=tables[block.rotary_kind],
            pack=pack,
            keep=keep if last else None,
        )
        x = block.checkpoint(run, x) if block.checkpoint and torch.is_grad_enabled() else run(x)
    return normed(x, body.norm)


def why_plain(model: Any) -> str | None:
    """Why `model` takes the plain way, as a sentence; None where it takes the fast one."""
    try:
        read_body(causal_lm(model))
    except Unsupported as reason:
        return str(reason)
    return None


def _block(
    x: torch.Tensor,
    *,
    block: Block,
    table: Table,
    pack: Pack,
    keep: torch.Tensor | None,
) -> torch.Tensor:
    """[tokens, width] -> [tokens, width]; with `keep` only those rows go on after the attention: [keep, width]."""
    q, k, v = turned_heads(_project(normed(x, block.before_attention), block.qkv), block, table)
    seen = packed_attention(
        q,
        k,
        v,
        pack.row_lengths,
        parents=pack.parents,
        scale=block.scale,
        window=block.window,
        dropout=block.attention_dropout,
    ).flatten(1)
    if keep is not None:
        x, seen = x[keep], seen[keep]
    x = x + normed(_project(seen, block.out), block.after_attention)
    inner = gated(_project(normed(x, block.before_mlp), block.gate_up), block.activation)
    return x + normed(_project(inner, block.down), block.after_mlp)


def normed(x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
    return x if norm is None else rms_norm(x, norm.weight, norm.eps, norm.offset)


def turned_heads(qkv: torch.Tensor, block: Block, table: Table) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[rows, q + k + v] -> q [rows, heads, dim], k and v [rows, kv_heads, dim], q and k normed and turned."""
    qk, v = qkv.view(len(qkv), -1, block.head_dim).split([block.heads + block.kv_heads, block.kv_heads], dim=1)
    q, k = rotate(normed(qk, block.qk_norm), *table).split([block.heads, block.kv_heads], dim=1)
    return q, k, v


def _project(x: torch.Tensor, projection: Projection) -> torch.Tensor:
    return project(x, projection.weight, projection.bias, projection.adapters)


def rotary_tables(body: Body, x: torch.Tensor, positions: torch.Tensor) -> dict[str | None, Table]:
    """cos, sin [tokens, head_dim / 2] by kind, from the model's own module, which knows its scaling. (It writes each
    twice.) x [tokens, width] gives dtype and device; positions [tokens]."""
    tables = {}
    for kind in {b.rotary_kind for b in body.blocks}:
        cos, sin = body.rotary(x[None], positions[None], *([] if kind is None else [kind]))
        half = cos.shape[-1] // 2
        tables[kind] = cos[0, :, :half], sin[0, :, :half]
    return tables


def pack_losses(model: Any, pack: Pack, *, chunk: int = CHUNK) -> torch.Tensor:
    """-log p of each supervised token, [supervised], float32 (float64 for a float64 model), in nats; differentiable."""
    return head_losses(model, hidden_states(model, pack), torch.from_numpy(pack.targets), chunk=chunk)


def head_losses(model: Any, hidden: torch.Tensor, targets: torch.Tensor, *, chunk: int = CHUNK) -> torch.Tensor:
    """-log p of `targets` [rows] after the hidden states [rows, width], as `pack_losses` gives them."""
    causal = causal_lm(model)
    weight, rows = _head(causal)
    return cross_entropy(
        hidden,
        weight,
        targets.long().to(hidden.device),
        chunk=chunk,
        rows=rows,
        **logit_shape(causal.config),
    )


@torch.no_grad()
def head_logits(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [rows, vocabulary] of hidden states [rows, width], float32 (float64 for a float64 model)."""
    causal = causal_lm(model)
    weight, rows = _head(causal)
    logits = torch.mm(hidden, weight.t())
    if rows is not None:
        logits[:, rows.ids] = hidden @ rows.values.to(hidden.dtype).t()
    logits = logits.to(torch.promote_types(hidden.dtype, torch.float32))
    return shaped_logits(logits, **logit_shape(causal.config))


def logit_shape(config: Any) -> dict[str, Any]:
    """What a family does to its logits, as `shaped_logits` and the head's loss take it."""
    return {
        "scale": getattr(config, "logit_scale", None) or 1.0,
        "softcap": getattr(config, "final_logit_softcapping", None),
    }


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


def _head(causal: Any) -> tuple[torch.Tensor, TrainedRows | None]:
    """The head's weight, and the single rows that stand in for some of its."""
    head = causal.get_output_embeddings()
    if getattr(head, "bias", None) is not None:
        raise ModelError(f"the head of {type(causal).__name__} has a bias, which no supported family has")
    if isinstance(head, TrainableTokensWrapper):
        return head.original_module.weight, trained_rows(head)
    return (head.weight if type(head) is torch.nn.Linear else _trained_head(head)), None


def _trained_head(head: Any) -> torch.Tensor:
    """The weight that modules_to_save trains in place of the frozen one."""
    active = getattr(head, "modules_to_save", None)
    if active is None:
        raise ModelError(f"a head of type {type(head).__name__} is not known", hint="Train without LoRA on lm_head.")
    if head.disable_adapters:
        return head.original_module.weight
    return active[head.active_adapters[0]].weight
