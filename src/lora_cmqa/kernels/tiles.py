"""Row by row work in pieces that stay in the cache.

On a CPU a chain of pointwise operations over a whole [tokens, width] tensor reads memory at each link; over a few rows
at a time only the first does. On a GPU a piece is the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

_BYTES = 512 * 1024  # of a piece, for each thread: about half of a core's second cache on current servers


def rows_per_tile(device: torch.device, bytes_per_row: int) -> int:
    """How many rows make a piece; 0: all. `bytes_per_row` is what the widest tensor of the chain takes of one row."""
    return max(1, _BYTES * torch.get_num_threads() // bytes_per_row) if device.type == "cpu" else 0


def row_tiles(x: torch.Tensor, bytes_per_row: int) -> Iterator[slice]:
    """The pieces of x's rows."""
    rows = len(x)
    step = rows_per_tile(x.device, bytes_per_row) or max(1, rows)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def in_tiles(
    piece: Callable[[slice], torch.Tensor], x: torch.Tensor, bytes_per_row: int, shape: torch.Size
) -> torch.Tensor:
    """What `piece` gives for its rows, put together: [*shape] of x's dtype. A single piece is not copied."""
    tiles = list(row_tiles(x, bytes_per_row))
    if len(tiles) == 1:
        return piece(tiles[0])
    out = torch.empty(shape, dtype=x.dtype, device=x.device)
    for rows in tiles:
        out[rows] = piece(rows)
    return out
