"""The memory a run may take, and how it says that there is no more.

CUDA  torch.OutOfMemoryError             bounded by a fraction of the card
CPU   RuntimeError of torch's allocator  bounded by RLIMIT_DATA: without a bound the kernel kills the process
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

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


def trim_heap() -> None:
    """What lies free in the heap goes back to the system now, so that the level noted next holds none of it (glibc).

    Reading a tokenizer leaves some 100 MB there; steps after it fill them first and seem to grow that much less.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)


def read_mapped_weights(model: torch.nn.Module) -> None:
    """Touch every page of the weights, so that the level noted next holds all of them.

    On a CPU a safetensors file is mapped: what no one has read yet (the head, before the first step) is not resident
    and would be counted as the step's own growth. 418 MB of 1,671 with the embedded base in bfloat16.
    """
    for weight in model.parameters():
        if weight.device.type == "cpu":
            weight.detach().flatten()[:: _PAGE // weight.element_size()].sum()


_PAGE = 4096  # bytes


def memory_now(device: torch.device) -> int:
    """Bytes in use: of torch's CUDA allocator, or resident of this process; 0 where the system does not say."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else _of_process("VmRSS")


def peak_memory_bytes(device: torch.device) -> int:
    """The most of it since `forget_peak`, or since the start."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if (found := _of_process("VmHWM")) > 0:
        return found
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes there, KiB elsewhere


def forget_peak(device: torch.device) -> bool:
    """The peak counts from here on; False where the system does not allow that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): the high-water mark becomes what is resident now
    except OSError:
        return False
    return True


def _of_process(field: str) -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


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
