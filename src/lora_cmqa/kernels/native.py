"""The compiled module (_rows.c), where it was built and loads; else why not.

It is compiled when the package is built, where there is a compiler, and takes the best of the instruction sets that
this processor has.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch

from .kernel import distance

missing: str | None = None
try:
    from . import _rows as rows
except ImportError as e:  # torch brings no OpenMP runtime that it knows
    missing = str(e)
    if "cannot import name" in missing:
        missing = "the kernels were not compiled: there was no C compiler when this package was installed"
else:
    rows.use(2)

BITS = {torch.bfloat16: 16, torch.float32: 32}  # the dtypes it is for
Tried = Callable[[torch.Generator, torch.dtype], Iterable[tuple[torch.Tensor, torch.Tensor]]]


def why_not(device: torch.device, dtype: torch.dtype, tried: Tried, allowed: Mapping[torch.dtype, float]) -> str | None:
    """None where kernels of it can be used: what each and its plain twin give for the same random rows, which `tried`
    draws, is `distance` of `allowed` at most."""
    if device.type != "cpu" or dtype not in BITS:
        return f"not for {dtype} on {device.type}"
    if missing is not None:
        return missing
    pairs = tried(torch.Generator().manual_seed(0), dtype)
    error = max(distance(fast, plain) for fast, plain in pairs)
    return None if error <= allowed[dtype] else f"{error:.1e} > {allowed[dtype]:.0e}"
