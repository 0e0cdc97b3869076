"""Folders that stand complete or not at all: the user's cache, and what a verb writes to --out.

    write_once("tiny-qwen2-1", build)      build(temporary folder)  ->  rename  ->  CACHE/tiny-qwen2-1
    with appears_complete(out) as made     temporary folder         ->  rename  ->  OUT

A cached folder is made once and then only read: two first starts at once both build, one rename wins, the other is
thrown away.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from transformers.utils import logging as transformers_logging

from ..errors import ModelError, RunError


def cache_root() -> Path:
    """$CMQA_CACHE, else $XDG_CACHE_HOME/lora-cmqa, else ~/.cache/lora-cmqa."""
    if named := os.environ.get("CMQA_CACHE"):
        return Path(named).expanduser().absolute()
    if home := os.environ.get("XDG_CACHE_HOME"):
        return Path(home).absolute() / "lora-cmqa"
    return Path.home() / ".cache" / "lora-cmqa"


def write_once(name: str, build: Callable[[Path], None]) -> Path:
    """CACHE/name; where it is absent, `build(folder)` fills a temporary folder that is renamed into place.

    Raises ModelError when the cache cannot be written; a full disk (errno 28) stays an OSError.
    """
    folder = cache_root() / name
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{name}.", dir=folder.parent))
    except OSError as e:
        if e.errno == errno.ENOSPC:
            raise
        raise ModelError(
            f"the cache folder {folder.parent} cannot be written: {e.strerror}",
            hint="Name another one: CMQA_CACHE=/some/folder cmqa ...",
        ) from None
    try:
        build(temporary)
        settle(temporary)
        try:
            temporary.rename(folder)
        except OSError as e:
            if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            # Another process was first; what it wrote is the same.
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


@contextlib.contextmanager
def appears_complete(out: Path) -> Iterator[Path]:
    """A temporary folder that becomes `out` when the block ends well, and vanishes otherwise.

    Raises RunError: `out` is there and not empty, or cannot be written.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError("is there already and not empty", file=out, hint="Name another --out.")
    try:
        out.absolute().parent.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.absolute().parent))
    except (PermissionError, NotADirectoryError) as e:
        raise RunError(f"cannot be written: {e.strerror}", file=out, hint="Name another --out.") from None
    try:
        yield made
        settle(made)
        if out.exists():
            out.rmdir()
        made.rename(out)
    finally:
        shutil.rmtree(made, ignore_errors=True)


def settle(folder: Path) -> None:
    """To the disk before the rename, and readable as any other file (mkdtemp gives 0700, safetensors 0600)."""
    folder.chmod(0o755)
    for file in folder.rglob("*"):
        if file.is_file():
            file.chmod(0o644)
            with file.open("rb") as f:
                os.fsync(f.fileno())


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without transformers' own bars and reports: the terminal belongs to our lines, which say the same or more."""
    was_on, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if was_on:
            transformers_logging.enable_progress_bar()
