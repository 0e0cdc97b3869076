"""One forward for many requests: prompts into the cache chunk by chunk, then one token a step for all rows at once.

    prefill   64 tokens of one request -> its slot of the cache -> hidden state of the last one
    decode    one token of each request -> hidden states [rows, width]

    slot      keys and values of one request, positions 0 ..., [slots, kv_heads, room, head_dim] a layer
    rows      a a b . .    each adapter's together, in whatever order the way of adding wants (adapters.py);
              0 1 2 3 4    rows of the bare base come last and are never touched by an adapter

A row's numbers depend on that row alone. A chunk is computed by itself, so nothing beside it can change its rounding.
A decode step shares its products, whose rounding depends on how many rows there are: `steady_rows` looks, on this
machine and with these weights, from how many rows on it no longer does, and steps are padded to that many at least.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F

from ..kernels import adapter_rows, few_rows
from ..kernels.head import shaped_logits
from ..kernels.mlp import Activation
from ..kernels.packed import Packed, can_pack, packed
from ..kernels.quantized import Frozen, product
from ..kernels.table import gated
from ..lora.decoder import Table, logit_shape, normed, rotary_tables, turned_heads
from ..lora.family import Block, Norm, Projection, Unsupported, read_body
from ..lora.low_rank import LowRank
from ..messages import say
from .adapters import JOINED, Adding, Key, Prepared
from .row_wise import RowWise
from .stacked import Stacked

MOST_ROWS = 32  # of one decode forward
CHUNK = 64  # tokens of one prefill forward
_TILE = 8  # rows of a step are padded to a multiple of it
_SIZES = (2, 4, *range(_TILE, MOST_ROWS + 1, _TILE))  # rows of a decode step, with those that pad
_SPAN = 64  # the cached positions read in a step are rounded up to a multiple of it
_PACKED_BYTES = 1 << 30  # a base up to this size is kept a second time, packed (docs/decisions/0013)


class Row(NamedTuple):
    slot: int
    token: int
    position: int  # of this token; so many are in the cache before it
    adapter: Prepared | None


class Forward(Protocol):
    """What the engine needs of a model. Hidden states are those after the last norm; only `logits` looks into them."""

    max_length: int
    chunk: int  # longest prefill
    keeps_chunks: bool  # whether save_chunk and load_chunk work
    max_rows: int  # of one decode

    def prepare(self, digest: str, pairs: LowRank) -> Prepared: ...

    def reserve(self, slot: int, length: int) -> None:
        """Room for `length` tokens in `slot`."""

    def prefill(self, slot: int, start: int, ids: Sequence[int], adapter: Prepared | None) -> torch.Tensor:
        """Hidden state of the last of `ids`, [1, width]."""

    def decode(self, rows: Sequence[Row]) -> torch.Tensor:
        """[rows, width]"""

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[rows, width] -> [rows, vocabulary]"""

    def save_chunk(self, slot: int, start: int, stop: int) -> torch.Tensor: ...

    def load_chunk(self, slot: int, start: int, content: torch.Tensor) -> None: ...

    def free(self, slot: int) -> None: ...

    def trim(self) -> None:
        """Give back what only running requests need; called when none runs."""


class Head:
    """Hidden states -> logits. The head's weight gets a contiguous 2-D tensor: a sliced 3-D one under a frozen weight
    makes torch expand the whole head once per row."""

    def __init__(self, causal: Any) -> None:
        self.module = causal.get_output_embeddings()
        self.packed: Packed | None = None
        self._shape = logit_shape(causal.config)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        product = self.packed.product if self.packed is not None else self.module
        return shaped_logits(product(hidden.contiguous()), **self._shape)


@dataclass(frozen=True, slots=True)
class _Padded:
    """Where a step's rows read the cache: every slot up to the longest row's length, masked. n rows are real."""

    slots: torch.Tensor  # [n]
    positions: torch.Tensor  # [n]
    row_of_slot: torch.Tensor  # [slots read]; a slot without a row reads row 0's query
    slot_of_row: torch.Tensor  # [rows]; pad rows take slot 0's
    length: int  # cached positions read
    masks: dict[int | None, torch.Tensor]  # by window, [slots read, 1, 1, length], added to the scores


@dataclass(frozen=True, slots=True)
class _Step:
    """What all layers of one decode share."""

    tables: dict[str | None, Table]
    places: few_rows.Places | _Padded
    whose: Any  # Adding's word for whose each row is


class BatchForward:
    """The pre-norm family (lora/family.py) over the base's own weights."""

    keeps_chunks, chunk, max_rows = True, CHUNK, MOST_ROWS

    def __init__(self, causal: Any) -> None:
        """Raises family.Unsupported for a model that the family's table has no words for."""
        body = read_body(causal)
        self.body = replace(body, norm=_with_gain(body.norm), blocks=tuple(map(_with_gains, body.blocks)))
        self.head = Head(causal)
        for name, module, kind in (
            ("lm_head", self.head.module, torch.nn.Linear),
            ("embed_tokens", self.body.embedding, torch.nn.Embedding),
        ):
            if not isinstance(module, kind):  # trained, or with LoRA: base rows would read it too
                raise Unsupported(say("decoder.other_part", part=name, kind=type(module).__name__))
        self._like = body.norm.weight.detach()[:0]
        self.dtype, self.device = self._like.dtype, self._like.device
        limit = getattr(causal.get_decoder().layers[0].self_attn, "seq_length", None)  # Qwen v1 scales longer rows
        self.max_length = int(limit or causal.config.max_position_embeddings)
        self._keys = [self._no_cache(b) for b in self.body.blocks]
        self._values = [self._no_cache(b) for b in self.body.blocks]
        self._reserved: dict[int, int] = {}
        self._weights: dict[Key, Frozen | Packed] = {
            (i, name): getattr(block, name).weight for i, block in enumerate(self.body.blocks) for name in JOINED
        }
        self._pack()
        shapes = {(len(w), w.shape[1]): w for w in self._weights.values()}
        self.least_rows = steady_rows([*shapes.values(), self.head.packed or self.head.module.weight], MOST_ROWS)
        self.adding, self.why_stacked = self._way_of_adding()
        self._few = few_rows.why_not(self.device, self.dtype) is None

    def _pack(self) -> None:
        """Each weight packed, where this machine has products for it and all of them are small enough for a copy."""
        every = [*self._weights.values(), self.head.module.weight]
        tensors = [w for w in every if isinstance(w, torch.Tensor)]
        size = sum(w.numel() * w.element_size() for w in tensors)
        if len(tensors) < len(every) or size > _PACKED_BYTES or not can_pack(self.device, self.dtype):
            return
        self._weights |= {k: packed(w) or w for k, w in self._weights.items() if isinstance(w, torch.Tensor)}
        self.head.packed = None if self.head.module.bias is not None else packed(self.head.module.weight)

    # ---- adapters ------------------------------------------------------------------------------------------------

    def _way_of_adding(self) -> tuple[Adding, str | None]:
        """And why not the faster one, on a CPU."""
        shapes = {
            (i, name): (getattr(block, name).weight.shape[1], _outputs(block, name))
            for i, block in enumerate(self.body.blocks)
            for name in JOINED
        }
        reason = adapter_rows.why_not(self.device, self.dtype)
        if reason is None:
            return RowWise(shapes, self.dtype), None
        return Stacked(shapes, self._like, MOST_ROWS), reason if self.device.type == "cpu" else None

    def prepare(self, digest: str, pairs: LowRank) -> Prepared:
        return self.adding.prepare(digest, pairs)

    def _arranged(self, rows: Sequence[Row]) -> list[int]:
        """Indices of `rows` as they stand in a step: each adapter's together, the bare base last."""
        adapters = {r.adapter.digest: r.adapter for r in rows if r.adapter is not None}
        places = self.adding.places(list(adapters.values()))

        def place(i: int) -> tuple[bool, Any, int]:
            a = rows[i].adapter
            return (True, None, rows[i].slot) if a is None else (False, places[a.digest], rows[i].slot)

        return sorted(range(len(rows)), key=place)

    # ---- the cache -------------------------------------------------------------------------------------------------

    def _no_cache(self, block: Block) -> torch.Tensor:
        return torch.empty(0, block.kv_heads, 0, block.head_dim, dtype=self.dtype, device=self.device)

    def reserve(self, slot: int, length: int) -> None:
        slots, room = self._keys[0].shape[0], self._keys[0].shape[2]
        self._reserved[slot] = length
        if slot < slots and length <= room:
            return
        slots = max(slots, _padded(slot + 1, _TILE))
        room = max(room, _padded(length, 256))
        for store in (self._keys, self._values):
            for i, old in enumerate(store):
                new = old.new_zeros(slots, old.shape[1], room, old.shape[3])  # unread places count as 0 x value
                new[: old.shape[0], :, : old.shape[2]] = old
                store[i] = new

    def free(self, slot: int) -> None:
        """Wiped: the next request multiplies by 0 what lies behind its own end, which a NaN would survive."""
        length = self._reserved.pop(slot, 0)
        for store in (self._keys, self._values):
            for x in store:
                x[slot, :, :length] = 0

    def save_chunk(self, slot: int, start: int, stop: int) -> torch.Tensor:
        """[2, layers, kv_heads, tokens, head_dim]"""
        return torch.stack(
            [torch.stack([x[slot, :, start:stop] for x in store]) for store in (self._keys, self._values)]
        )

    def load_chunk(self, slot: int, start: int, content: torch.Tensor) -> None:
        for store, part in zip((self._keys, self._values), content, strict=True):
            for x, layer in zip(store, part, strict=True):
                x[slot, :, start : start + layer.shape[1]] = layer

    def trim(self) -> None:
        self.adding.clear()

    # ---- prefill -----------------------------------------------------------------------------------------------

    def prefill(self, slot: int, start: int, ids: Sequence[int], adapter: Prepared | None) -> torch.Tensor:
        count, end = len(ids), start + len(ids)
        x = self.body.embedding(self._index(ids))
        positions = torch.arange(start, end, device=self.device)
        tables = rotary_tables(self.body, x, positions)
        masks = self._chunk_masks(start, end)
        whose, last = (self.adding.alone(adapter, n) if adapter else None for n in (count, 1))
        for i, block in enumerate(self.body.blocks):
            qkv = self._project(self._normed(x, block.before_attention), block.qkv, whose, (i, "qkv"))
            q, k, v = self._turned(qkv, block, tables[block.rotary_kind])
            keys, values = self._keys[i][slot], self._values[i][slot]
            keys[:, start:end], values[:, start:end] = k.transpose(0, 1), v.transpose(0, 1)
            mask = masks[block.window]
            seen = F.scaled_dot_product_attention(
                q.transpose(0, 1)[None],
                _repeated(keys[:, :end], block.heads)[None],
                _repeated(values[:, :end], block.heads)[None],
                attn_mask=mask,
                is_causal=mask is None,
                scale=block.scale,
            )
            seen = seen[0].transpose(0, 1).reshape(count, -1)
            if i == len(self.body.blocks) - 1:  # only the last token goes on
                x, seen, whose = x[-1:], seen[-1:], last
            x = self._plus(x, self._project(seen, block.out, whose, (i, "out")), block.after_attention)
            inner = self._gated(
                self._project(self._normed(x, block.before_mlp), block.gate_up, whose, (i, "gate_up")), block.activation
            )
            x = self._plus(x, self._project(inner, block.down, whose, (i, "down")), block.after_mlp)
        return self._normed(x, self.body.norm)

    def _chunk_masks(self, start: int, end: int) -> dict[int | None, torch.Tensor | None]:
        """None where plain causal attention over the chunk says it all."""
        masks: dict[int | None, torch.Tensor | None] = {}
        for window in {b.window for b in self.body.blocks}:
            if start == 0 and (window is None or end <= window):
                masks[window] = None
                continue
            own = torch.arange(start, end, device=self.device)[:, None]
            other = torch.arange(end, device=self.device)[None]
            seen = other <= own if window is None else (other <= own) & (other > own - window)
            masks[window] = self._added(seen)
        return masks

    def _project(self, x: torch.Tensor, projection: Projection, whose: Any, key: Key) -> torch.Tensor:
        """The base's product for all rows, then what their adapters add to it."""
        y = _times(x, self._weights[key], projection.bias)
        return y if whose is None else self.adding.add(y, x, key, whose)

    # ---- decode ------------------------------------------------------------------------------------------------

    def decode(self, rows: Sequence[Row]) -> torch.Tensor:
        order = self._arranged(rows)
        ordered = [rows[i] for i in order]
        step, x = self._begin(ordered)
        for i, block in enumerate(self.body.blocks):
            qkv = self._project(self._normed(x, block.before_attention), block.qkv, step.whose, (i, "qkv"))
            q, k, v = self._turned(qkv, block, step.tables[block.rotary_kind])
            seen = self._project(self._attend(q, k, v, block, i, step), block.out, step.whose, (i, "out"))
            x = self._plus(x, seen, block.after_attention)
            inner = self._gated(
                self._project(self._normed(x, block.before_mlp), block.gate_up, step.whose, (i, "gate_up")),
                block.activation,
            )
            x = self._plus(x, self._project(inner, block.down, step.whose, (i, "down")), block.after_mlp)
        back = sorted(range(len(order)), key=order.__getitem__)
        return self._normed(x, self.body.norm)[self._index(back)]

    def _begin(self, rows: Sequence[Row]) -> tuple[_Step, torch.Tensor]:
        pad = self._row_count(len(rows)) - len(rows)
        slots, positions = [r.slot for r in rows], [r.position for r in rows]
        x = self.body.embedding(self._index([r.token for r in rows] + [0] * pad))
        step = _Step(
            tables=rotary_tables(self.body, x, self._index(positions + [0] * pad)),
            places=few_rows.Places(slots, positions) if self._few else self._padded_places(slots, positions, pad),
            whose=self.adding.of_rows([r.adapter for r in rows if r.adapter is not None]),
        )
        return step, x

    def _padded_places(self, slots: list[int], positions: list[int], pad: int) -> _Padded:
        used = max(slots) + 1
        row_of_slot, last = [0] * used, [0] * used  # `last`: position of each slot's newest token
        for i, (slot, position) in enumerate(zip(slots, positions, strict=True)):
            row_of_slot[slot], last[slot] = i, position
        length = min(_padded(max(positions) + 1, _SPAN), self._keys[0].shape[2])
        newest, places = self._index(last)[:, None], torch.arange(length, device=self.device)[None]
        masks = {}
        for window in {b.window for b in self.body.blocks}:
            seen = places <= newest
            if window is not None and window < length:
                seen &= places > newest - window
            masks[window] = self._added(seen)[:, None, None]
        return _Padded(
            slots=self._index(slots),
            positions=self._index(positions),
            row_of_slot=self._index(row_of_slot),
            slot_of_row=self._index(slots + [slots[0]] * pad),
            length=length,
            masks=masks,
        )

    def _attend(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, block: Block, layer: int, step: _Step
    ) -> torch.Tensor:
        """Each row over its own slot. Padded, query heads that share keys stand as the rows of one small product."""
        keys, values, at = self._keys[layer], self._values[layer], step.places
        if isinstance(at, few_rows.Places):
            return few_rows.attended(q, k, v, keys, values, at, block.scale, block.window)
        real, used = len(at.slots), len(at.row_of_slot)
        keys[at.slots, :, at.positions] = k[:real]
        values[at.slots, :, at.positions] = v[:real]
        grouped = q[at.row_of_slot].view(used, block.kv_heads, block.heads // block.kv_heads, block.head_dim)
        seen = F.scaled_dot_product_attention(
            grouped,
            keys[:used, :, : at.length],
            values[:used, :, : at.length],
            attn_mask=at.masks[block.window],
            scale=block.scale,
        )
        return seen.reshape(used, -1)[at.slot_of_row]

    # ---- small things ------------------------------------------------------------------------------------------

    def _normed(self, x: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        return few_rows.normed(x, norm.weight, norm.eps) if self._few and norm else normed(x, norm)

    def _plus(self, x: torch.Tensor, y: torch.Tensor, norm: Norm | None) -> torch.Tensor:
        """x + normed(y)"""
        return few_rows.added(x, y, norm.weight, norm.eps) if self._few and norm else x + normed(y, norm)

    def _gated(self, gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
        return few_rows.gated(gate_up, activation) if self._few else gated(gate_up, activation)

    def _turned(self, qkv: torch.Tensor, block: Block, table: Table) -> tuple[torch.Tensor, ...]:
        """q [rows, heads, dim], k and v [rows, kv_heads, dim]; see decoder.turned_heads, its twin."""
        if not self._few:
            return turned_heads(qkv, block, table)
        heads, norm = qkv.view(len(qkv), -1, block.head_dim), block.qk_norm
        turned = block.heads + block.kv_heads
        gain, eps = (norm.weight, norm.eps) if norm else (None, 0.0)
        qk = few_rows.turned(heads[:, :turned], gain, eps, table)
        return qk[:, : block.heads], qk[:, block.heads :], heads[:, turned:]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        rows = len(hidden)
        return self.head(F.pad(hidden, (0, 0, 0, self._row_count(rows) - rows)))[:rows]

    def _row_count(self, rows: int) -> int:
        return next(size for size in _SIZES if size >= max(rows, self.least_rows))

    def _added(self, seen: torch.Tensor) -> torch.Tensor:
        return torch.zeros(seen.shape, dtype=self.dtype, device=self.device).masked_fill_(~seen, -torch.inf)

    def _index(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)


def _with_gain(norm: Norm) -> Norm:
    """The factor offset + weight, written out once and not in every step."""
    exact = torch.promote_types(norm.weight.dtype, torch.float32)
    return Norm(norm.weight.detach().to(exact) + norm.offset, norm.eps, 0.0)


def _with_gains(block: Block) -> Block:
    names = ("before_attention", "qk_norm", "after_attention", "before_mlp", "after_mlp")
    norms: dict[str, Any] = {n: _with_gain(norm) for n in names if (norm := getattr(block, n)) is not None}
    return replace(block, **norms)


def _times(x: torch.Tensor, weight: Frozen | Packed, bias: torch.Tensor | None) -> torch.Tensor:
    return weight.product(x, bias) if isinstance(weight, Packed) else product(x, weight, bias)


def _repeated(x: torch.Tensor, heads: int) -> torch.Tensor:
    """[kv_heads, tokens, dim] -> [heads, tokens, dim]: query head h reads kv head h // (heads / kv_heads)."""
    return x if len(x) == heads else x.repeat_interleave(heads // len(x), 0)


def _outputs(block: Block, name: str) -> tuple[int, ...]:
    """Outputs of the modules of a joined projection."""
    total = len(getattr(block, name).weight)
    if name == "qkv":
        return (block.heads * block.head_dim, block.kv_heads * block.head_dim, block.kv_heads * block.head_dim)
    return (total // 2, total // 2) if name == "gate_up" else (total,)


def _padded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


# ---- rounding ------------------------------------------------------------------------------------------------------


def steady_rows(weights: Sequence[Frozen | Packed], most: int) -> int:
    """The fewest rows, one of _SIZES, to which steps must be padded for a row's product with each of `weights`
    [out, in] to have the same bits whatever else is in the step, for up to `most` rows.

    Libraries cut a product into blocks by its size: here fp32 with 8 rows rounds otherwise than with 16, and packed
    bf16 with 2 to 32 rows all alike (docs/decisions/0007).
    """
    packs = torch.empty(0, dtype=torch.bfloat16)
    like = next((w for w in weights if isinstance(w, torch.Tensor)), packs)
    products = [(lambda x, w=w: _times(x, w, None), w.shape[1], like) for w in weights]
    return _steady(products, [size for size in _SIZES if size <= most])


@torch.inference_mode()
def _steady(products: Sequence[tuple[Any, int, torch.Tensor]], sizes: Sequence[int]) -> int:
    """The smallest of `sizes` that gives, with all larger ones, the same bits."""
    generator = torch.Generator().manual_seed(0)
    least = 0
    for rows_of, inner, like in products:
        x = torch.randn(sizes[-1], inner, generator=generator).to(like.device, like.dtype)
        whole = rows_of(x)
        for i in range(len(sizes) - 1, least - 1, -1):
            if not torch.equal(rows_of(x[: sizes[i]]), whole[: sizes[i]]):
                least = i + 1
                break
    return sizes[least]
