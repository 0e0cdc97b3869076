"""How many compiled matrix products a process keeps on a CPU.

oneDNN compiles a product for each shape it meets and keeps it with its scratch, up to 1,024 of them; torch (ideep)
keeps as many again. Packs, groups of rows and taught rows have ever new sizes, so a bfloat16 run would grow for
hundreds of steps. Both read their bound from the environment at the first product.
"""

from __future__ import annotations

import os

# More than one layer meets forward and backward, or each layer would compile its own anew. Attention over shared
# prefixes has a shape for each group of branches: with 64 such steps took 1.5 times as long (docs/speed.md).
KEPT = 256
# Each bound by the names it goes by: oneDNN knows an older one.
_BOUNDS = (("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "DNNL_PRIMITIVE_CACHE_CAPACITY"), ("LRU_CACHE_CAPACITY",))


def bound_compiled_products() -> None:
    """Keep at most KEPT, where the user's environment says nothing else. Of no effect after the first product."""
    for names in _BOUNDS:
        if not any(name in os.environ for name in names):
            os.environ[names[0]] = str(KEPT)
