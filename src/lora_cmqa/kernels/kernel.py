"""A fast function beside its plain twin, and on a GPU perhaps a library's kernel beside both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, Literal, ParamSpec

import torch

P = ParamSpec("P")
Way = Literal["library", "fast", "plain"]


class Kernel(Generic[P]):
    """Call it as the fast function. `way` says who answers: a GPU library's kernel, the fast function, or its twin."""

    def __init__(
        self, fast: Callable[P, torch.Tensor], twin: Callable[..., torch.Tensor], without: Sequence[str] = ()
    ) -> None:
        self.name, self.fast, self.twin, self.without = fast.__name__, fast, twin, without
        self.library: Callable[P, torch.Tensor] | None = None  # set where there is one (table.py)
        self.way: Way = "fast"

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        if self.way == "plain":
            return self.twin(*args, **{k: v for k, v in kwargs.items() if k not in self.without})
        if self.way == "library" and self.library is not None:
            return self.library(*args, **kwargs)
        return self.fast(*args, **kwargs)


def distance(fast: torch.Tensor, plain: torch.Tensor) -> float:
    """||fast - plain|| / ||plain|| in float64; infinite where that is no number, which `max` would pass over."""
    fast, plain = fast.double().cpu(), plain.double().cpu()
    error = float((fast - plain).norm() / plain.norm())
    return error if error == error else float("inf")
