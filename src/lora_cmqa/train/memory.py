"""The memory a run may take, and how it says that there is no more.

CUDA  torch.OutOfMemoryError             bounded by a fraction of the card
CPU   RuntimeError of torch's allocator  bounded by RLIMIT_DATA: without a bound the kernel kills the process
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
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


_MMAP_THRESHOLD = 1 << 20  # bytes


def give_back_what_is_freed() -> None:
    """From now on a freed block of a MiB or more goes back to the system at once (glibc; elsewhere nothing changes).

    By itself glibc raises that threshold to 32 MiB, and freed activations stay in its heap: bfloat16 on a Qwen3 shape
    of 0.25 billion parameters, 2,048 tokens: 3.5 GB of growth without, 1.9 GB with it.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library
            ctypes.CDLL(None).mallopt(-3, _MMAP_THRESHOLD)  # M_MMAP_THRESHOLD of malloc.h


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
    give_back_what_is_freed()
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))
