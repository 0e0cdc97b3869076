"""A fast function beside its plain twin."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, ParamSpec

import torch

P = ParamSpec("P")


class Kernel(Generic[P]):
    """Call it as the fast function. `plain` says that the twin answers."""

    def __init__(
        self, fast: Callable[P, torch.Tensor], twin: Callable[..., torch.Tensor], without: Sequence[str] = ()
    ) -> None:
        self.name, self.fast, self.twin, self.without = fast.__name__, fast, twin, without
        self.plain = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> torch.Tensor:
        if not self.plain:
            return self.fast(*args, **kwargs)
        return self.twin(*args, **{k: v for k, v in kwargs.items() if k not in self.without})
