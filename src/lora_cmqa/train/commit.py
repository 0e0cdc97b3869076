"""Files that appear whole or not at all, and what a full disk is called.

write_file     temporary file in the same folder -> fsync -> rename -> fsync of the folder
commit_folder  temporary folder, each file fsynced, manifest.json last -> rename -> fsync of the parent
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError

from ..data.files import sha256_of
from ..errors import ResourceError

MANIFEST = "manifest.json"
_LINK_FROM = 1 << 20  # bytes: larger files that do not change are linked, so ten checkpoints hold one tokenizer
_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_WRITABLE = {errno.EROFS, errno.EACCES, errno.EPERM}


def write_file(file: Path, content: bytes) -> None:
    """Replace `file` at once: a reader, or a start after a crash, sees the old bytes or the new ones."""
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        _write_synced(temporary, content)
        os.replace(temporary, file)
    except BaseException:
        with contextlib.suppress(OSError):  # the first error is the one to tell
            temporary.unlink()
        raise
    sync_folder(file.parent)


def commit_folder(folder: Path, files: Mapping[str, bytes | Path]) -> None:
    """`folder` with `files` (bytes, or a Path to take the content from) and a manifest of their sha256.

    What stood there before is replaced. After a crash at any moment the folder is whole, old or absent.
    """
    temporary, aside = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for stale in (temporary, aside):
        shutil.rmtree(stale, ignore_errors=True)
    try:
        check_space(folder.parent, sum(len(c) for c in files.values() if isinstance(c, bytes)))
        temporary.mkdir()
        manifest = {}
        for name, content in files.items():
            if isinstance(content, bytes):
                _write_synced(temporary / name, content)
                digest, size = hashlib.sha256(content).hexdigest(), len(content)
            else:
                _take(content, temporary / name)
                digest, size = sha256_of(temporary / name), content.stat().st_size
            manifest[name] = {"sha256": digest, "bytes": size}
        _write_synced(temporary / MANIFEST, (json.dumps({"files": manifest}, indent=2) + "\n").encode())
        sync_folder(temporary)
        if folder.exists():
            folder.rename(aside)
        temporary.rename(folder)
        sync_folder(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Out of sight first, so that a crash while deleting leaves no half folder under its name."""
    aside = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def remove_leftovers(parent: Path) -> None:
    """What killed writes and commits left in `parent` under their temporary names."""
    for leftover in [*parent.glob(".*.tmp"), *parent.glob(".*.old")]:
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def check_space(folder: Path, needed: int) -> None:
    """Raises OSError ENOSPC when the disk of `folder` has less than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC, f"{needed / 2**20:,.1f} MiB are needed, {free / 2**20:,.1f} MiB are free", str(folder)
        )


@contextlib.contextmanager
def disk_errors(what: str, hint: str) -> Iterator[None]:
    """Inside, a full or read-only disk is raised as ResourceError (exit code 3); other errors pass."""
    try:
        yield
    except (OSError, SafetensorError) as e:
        if is_disk_error(e):
            raise ResourceError(f"{what}: {e}", hint=hint) from e
        raise


def is_disk_error(error: BaseException) -> bool:
    return _errno_of(error) in _NO_ROOM | _NOT_WRITABLE


def is_out_of_space(error: BaseException) -> bool:
    return _errno_of(error) in _NO_ROOM


def _errno_of(error: BaseException) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os error (\d+)", str(error))  # how Rust names it inside SafetensorError
    return int(found.group(1)) if found else None


def sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there; the rename is journalled
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_synced(file: Path, content: bytes) -> None:
    with file.open("wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _take(source: Path, target: Path) -> None:
    """A link where the file is large and links work, else a copy. We replace files by rename, never in place,
    so a linked file keeps its bytes."""
    if source.stat().st_size >= _LINK_FROM:
        try:
            os.link(source, target)
            return
        except OSError as e:
            if is_disk_error(e) and e.errno not in (errno.EPERM, errno.EACCES):
                raise
    _write_synced(target, source.read_bytes())
