"""The memory a run may take, and how it says that there is no more.

CUDA  torch.OutOfMemoryError             bounded by a fraction of the card
CPU   RuntimeError of torch's allocator  bounded by RLIMIT_DATA: without a bound the kernel kills the process
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from ..errors import ConfigError, ResourceError

_HINT = (
    "--gradient-checkpointing, a smaller --max-tokens or --model-max-length; `cmqa plan` names every GiB. "
    "The same command resumes from the last checkpoint."
)


def is_out_of_memory(error: BaseException) -> bool:
    """torch.OutOfMemoryError of a GPU, Python's MemoryError, or torch's CPU allocator, which raises a plain
    RuntimeError known by its text alone (c10/core/impl/alloc_cpu.cpp)."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)


@contextlib.contextmanager
def memory_limit(limit: int | None, device: torch.device) -> Iterator[None]:
    """Inside, what lies above `limit` bytes is an error instead of the end of the process; None: no limit of ours.

    CUDA: of what torch's allocator reserves. CPU: of the process's data (RLIMIT_DATA: heap and private mappings).
    Raises ConfigError where no such limit can be set; ResourceError for any memory error that comes out of the block.
    """
    try:
        with contextlib.nullcontext() if limit is None else _bounded(limit, device):
            yield
    except Exception as e:
        if not is_out_of_memory(e):
            raise
        reason = (str(e).strip().splitlines() or ["MemoryError"])[0][:200]
        raise ResourceError(f"out of memory: {reason}", hint=_HINT) from e


@contextlib.contextmanager
def _bounded(limit: int, device: torch.device) -> Iterator[None]:
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, device)
        return
    try:
        import resource
    except ImportError:
        raise ConfigError("--memory-limit cannot be set on this system", hint="Leave it out.") from None
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
