"""--deterministic: only kernels that give the same bits every time.

On a CPU, with the thread count the run was started with, torch's kernels do so anyway; on a GPU sums by atomic
additions do not, and cuBLAS needs a fixed workspace (https://docs.pytorch.org/docs/stable/notes/randomness.html).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from ..errors import ConfigError

WORKSPACE, SIZE = "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
_FIXED = (SIZE, ":16:8")  # what cuBLAS documents as reproducible


@contextlib.contextmanager
def deterministic_kernels(wanted: bool) -> Iterator[None]:
    """Inside, when `wanted`, an operation without a deterministic kernel is a ConfigError; afterwards all is as before.

    Raises ConfigError when the GPU is in use already without a fixed cuBLAS workspace: it is too late to ask for one.
    """
    if not wanted:
        yield
        return
    _fix_workspace()
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    torch.use_deterministic_algorithms(True)
    try:
        yield
    except RuntimeError as e:
        if "deterministic" not in str(e):
            raise
        raise ConfigError(
            f"--deterministic: {str(e).splitlines()[0][:300]}",
            hint="Train without it (on a GPU a resumed run may then differ in its last bits), or on the CPU.",
        ) from e
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.backends.cudnn.benchmark = benchmark


def _fix_workspace() -> None:
    found = os.environ.get(WORKSPACE)
    if found is None and not torch.cuda.is_initialized():
        os.environ[WORKSPACE] = SIZE  # read when the first cuBLAS handle is made
    elif found not in _FIXED and torch.cuda.is_available():
        raise ConfigError(
            f"--deterministic needs {WORKSPACE}={SIZE} before the GPU is first used; it is {found or 'not set'}",
            hint=f"{WORKSPACE}={SIZE} cmqa train ...",
        )
