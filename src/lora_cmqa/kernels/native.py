"""The compiled module (_rows.c), where it was built and loads; else why not.

It is compiled when the package is built, where there is a compiler, and takes the best of the instruction sets that
this processor has.
"""

from __future__ import annotations

import torch

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
