"""A model cut to its first layers: how the seed made Qwen-7B fit a card of 24 GB (32 layers -> 16).

    model.layers.0 ... model.layers.15 | model.layers.16 ... model.layers.31      --num-hidden-layers 16
    ^ kept, with embedding, last norm and head                  ^ never loaded

What is left was not trained to speak without the others: it is a damaged model, and an adapter of it fits nothing else.
docs/qwen-v1.md has what it costs, measured.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..messages import say

_LAYER = re.compile(r"(?:base_model\.model\.)?model\.layers\.(\d+)\.")


def layer_of(name: str) -> int:
    """The layer, from 0, that a weight's name stands in; -1 outside the layers."""
    found = _LAYER.match(name)
    return int(found[1]) if found else -1


def layers_in(names: Iterable[str]) -> set[int]:
    """The layers, from 0, in which at least one of `names` stands."""
    return {layer_of(n) for n in names} - {-1}


def check_layers(wanted: int | None, there: int) -> int:
    """How many layers to keep. Raises ModelError unless 1 <= wanted <= there."""
    if wanted is not None and not 1 <= wanted <= there:
        raise ModelError(
            f"num_hidden_layers is {wanted}; the model has {there}", hint=f"--num-hidden-layers 1 to {there}"
        )
    return wanted or there


def refuse_more_layers(names: Iterable[str], said: int, *, file: Path) -> None:
    """The seed cut its model by editing config.json, which leaves no trace. Raises ModelError when weights of `names`
    stand in a layer beyond the `said` ones of the config."""
    held = max(layers_in(names), default=-1) + 1
    if held > said:
        raise ModelError(
            f"the weights hold a layer {held}, this config says {said}: it was edited, or the files are of two models",
            file=file,
            field="num_hidden_layers",
            hint=f"Write its own number back and add --num-hidden-layers {said}: then fingerprint.json knows of it.",
        )


def say_cost(model: Any, kept: int, layers: int) -> None:
    """On stderr: how much of the model is left out, and what that means."""
    total = sum(p.numel() for p in model.parameters())
    dropped = (layers - kept) * sum(p.numel() for p in model.get_decoder().layers[0].parameters())
    print(
        say(
            "models.layers_dropped",
            kept=kept,
            layers=layers,
            dropped=f"{dropped / 1e6:,.1f}",
            total=f"{(total + dropped) / 1e6:,.1f}",
        ),
        file=sys.stderr,
    )
