"""What stands between the products of a step of few rows, in one pass each (_rows.c): on a CPU, without a graph.

    normed      x / rms(x) * gain                                   5 to 7 operations of torch
    added       x + normed(y)                                       one more
    turned      q and k of each head normed and turned              some 15
    attended    each row over its own slot of the cache             some 10, over the longest row's length for all
    gated       activation(gate) * up                               7

Such a step spends more time on beginning these operations than on their numbers. Sums are in float32; rounded where the
twins (norm.py, rope.py, mlp.py) round, but for the rotation, which is rounded once. A row's numbers depend on it alone.
"""

from __future__ import annotations

import functools
from array import array
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from . import native
from .mlp import Activation, gated_plain
from .norm import rms_norm_plain
from .rope import rotate_plain

_ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 1e-5}
_KINDS: tuple[Activation, ...] = ("silu", "gelu_tanh")
Angles = tuple[torch.Tensor, torch.Tensor]


def normed(x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """x [rows, width]; gain [width] of float32 -> [rows, width] of x's dtype."""
    return added(None, x, gain, eps)


def added(x: torch.Tensor | None, y: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
    """x + normed(y), both [rows, width]; the latter alone where x is None."""
    rows, width = y.shape
    if x is not None and (x.shape != y.shape or x.dtype != y.dtype or not x.is_contiguous()):
        raise _unfit(x, y)
    if gain.shape != (width,) or gain.dtype != torch.float32 or not (gain.is_contiguous() and y.is_contiguous()):
        raise _unfit(y, gain)
    plus, out = 0 if x is None else x.data_ptr(), torch.empty_like(y)
    shape = (rows, 1, width, width, 0, 0)
    native.rows.pointwise(out.data_ptr(), y.data_ptr(), plus, gain.data_ptr(), 0, 0, *shape, native.BITS[y.dtype], eps)
    return out


def turned(x: torch.Tensor, gain: torch.Tensor | None, eps: float, angles: Angles) -> torch.Tensor:
    """x [rows, heads, dim] at any stride of rows; gain [heads, dim] of float32 or None, cosines and sines
    [rows, dim / 2] of x's dtype -> [rows, heads, dim], normed where there is a gain, and turned."""
    rows, heads, width = x.shape
    cosine, sine = angles
    if x.stride()[1:] != (width, 1) or cosine.stride() != sine.stride() or cosine.stride(1) != 1:
        raise _unfit(x, *angles)
    if not (cosine.shape == sine.shape == (rows, width // 2) and cosine.dtype == sine.dtype == x.dtype):
        raise _unfit(x, *angles)
    if gain is not None and (gain.shape != (heads, width) or gain.dtype != torch.float32 or not gain.is_contiguous()):
        raise _unfit(x, gain)
    out = torch.empty(x.shape, dtype=x.dtype)
    factor, shape = 0 if gain is None else gain.data_ptr(), (rows, heads, width, x.stride(0), width, cosine.stride(0))
    native.rows.pointwise(
        out.data_ptr(),
        x.data_ptr(),
        0,
        factor,
        cosine.data_ptr(),
        sine.data_ptr(),
        *shape,
        native.BITS[x.dtype],
        eps,
    )
    return out


class Places:
    """Slot and position of each row's newest token."""

    def __init__(self, slots: Sequence[int], positions: Sequence[int]) -> None:
        self.table = array("q", [n for pair in zip(slots, positions, strict=True) for n in pair])
        self.slots, self.length = max(slots) + 1, max(positions) + 1  # at least so many a cache must have


def attended(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    places: Places,
    scale: float,
    window: int | None = None,
) -> torch.Tensor:
    """Each row over the positions of its own slot up to its own, the last `window` of them where one is given.

    q [rows, heads, dim], k and v [rows, kv_heads, dim] at any stride of rows; keys and values
    [slots, kv_heads, room, dim], into which k and v are written first -> [rows, heads dim]. Rows beyond those of
    `places` are zero.
    """
    (rows, heads, width), kv_heads, real = q.shape, k.shape[1], len(places.table) // 2
    fit = keys.shape == values.shape and keys.shape[1::2] == (kv_heads, width) and k.shape == v.shape
    fit &= keys.shape[0] >= places.slots and keys.shape[2] >= places.length and keys.is_contiguous()
    fit &= values.is_contiguous() and len(k) >= real <= rows and k.shape[2] == width and not heads % kv_heads
    fit &= all(t.dtype == keys.dtype for t in (q, k, v, values))
    if not fit or any(t.stride()[1:] != (width, 1) for t in (q, k, v)):
        raise _unfit(q, k, v, keys, values)
    out = torch.empty(rows, heads * width, dtype=q.dtype)
    if real < rows:
        out[real:] = 0
    table, threads = places.table.buffer_info()[0], torch.get_num_threads()
    native.rows.attend(
        out.data_ptr(),
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        keys.data_ptr(),
        values.data_ptr(),
        table,
        real,
        heads,
        kv_heads,
        width,
        keys.shape[2],
        q.stride(0),
        k.stride(0),
        v.stride(0),
        window or 0,
        places.length,
        native.BITS[q.dtype],
        threads,
        scale,
    )
    return out


def gated(gate_up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """gate_up [rows, 2 * inner], the gate first -> activation(gate) * up, [rows, inner]."""
    if not gate_up.is_contiguous() or gate_up.shape[1] % 2:
        raise _unfit(gate_up)
    rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(rows, inner, dtype=gate_up.dtype)
    gelu, bits, threads = activation == "gelu_tanh", native.BITS[gate_up.dtype], torch.get_num_threads()
    native.rows.gated(out.data_ptr(), gate_up.data_ptr(), rows, inner, gelu, bits, threads)
    return out


def _unfit(*tensors: torch.Tensor) -> ValueError:
    """The kernel reads addresses and looks at nothing else, so what does not fit together is refused before."""
    return ValueError(f"do not fit together: {[(tuple(t.shape), t.dtype, t.stride()) for t in tensors]}")


@functools.cache
def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """None where these can be used; tried beside their twins, which costs a moment once."""
    return native.why_not(device, dtype, _tried, _ALLOWED)


def _tried(draw: torch.Generator, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
    x, y, angle = (torch.randn(*shape, generator=draw).to(dtype) for shape in ((5, 70), (5, 70), (5, 10)))
    gain, heads = torch.rand(70, generator=draw), torch.randn(5, 4, 20, generator=draw).to(dtype)
    of_heads, angles = torch.rand(3, 20, generator=draw), (angle.cos(), angle.sin())
    pairs = [
        (normed(x, gain, 1e-6), rms_norm_plain(x, gain, 1e-6)),
        (added(x, y, gain, 1e-6), x + rms_norm_plain(y, gain, 1e-6)),
        (
            turned(heads[:, :3], of_heads, 1e-6, angles),
            rotate_plain(rms_norm_plain(heads[:, :3], of_heads, 1e-6), *angles),
        ),
        *((gated(x, kind), gated_plain(x, kind)) for kind in _KINDS),
    ]
    keys, values = (torch.randn(3, 2, 40, 20, generator=draw).to(dtype) for _ in range(2))
    q, k, places = torch.randn(5, 6, 20, generator=draw).to(dtype), heads[:, :2], Places((2, 0), (30, 3))
    for window in (None, 7):
        fast = attended(q, k, heads[:, 2:], keys, values, places, 0.2, window)  # writes k and v, which the twin reads
        pairs.append((fast[:2], attended_plain(q, keys, values, places, 0.2, window)))
    return pairs


def attended_plain(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, places: Places, scale: float, window: int | None = None
) -> torch.Tensor:
    """The plain twin of `attended`, with the rows' own keys and values in the cache already; rows of `places` only."""
    seen, table, group = [], places.table.tolist(), q.shape[1] // keys.shape[1]
    for row, (slot, position) in enumerate(zip(table[::2], table[1::2], strict=True)):
        span = slice(max(0, position + 1 - window) if window else 0, position + 1)
        k, v = (t[slot, :, span].repeat_interleave(group, 0) for t in (keys, values))
        seen.append(F.softmax((q[row][:, None].float() @ k.float().mT) * scale, -1) @ v.float())
    return torch.stack(seen).flatten(1).to(q.dtype)
