"""Who may ask, and who may change what is served.

    keys.txt     user  sk-...        /v1/*, /metrics
                 admin sk-...        /admin/* besides

Keys are kept as sha256 and compared in constant time, each with every other, so neither the time nor a traceback says
anything about them.
"""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Literal

from ..errors import ConfigError

Scope = Literal["user", "admin"]


class Keys:
    """`scope(key)`; with no key at all everyone is a user and nobody an admin."""

    def __init__(self, keys: list[tuple[Scope, str]]) -> None:
        self._hashes = [(scope, _hash(key)) for scope, key in keys]

    @classmethod
    def from_file(cls, file: str | Path | None) -> Keys:
        """Raises ConfigError for a line that is not `user KEY` or `admin KEY`, and for keys that can be guessed."""
        if file is None:
            return cls([])
        keys: list[tuple[Scope, str]] = []
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as e:
            raise ConfigError(f"the keys cannot be read: {type(e).__name__}", file=file) from None
        for row, line in enumerate(lines, 1):
            words = line.split()
            if not words or words[0].startswith("#"):
                continue
            if len(words) != 2 or words[0] not in ("user", "admin"):
                raise ConfigError("expected `user KEY` or `admin KEY`", file=file, row=row)
            if len(words[1]) < 16:
                raise ConfigError("a key of fewer than 16 characters can be guessed", file=file, row=row)
            keys.append(("admin" if words[0] == "admin" else "user", words[1]))
        if not any(scope == "user" for scope, _ in keys):
            raise ConfigError("no `user KEY` line, so nobody could ask", file=file)
        return cls(keys)

    @property
    def needed(self) -> bool:
        return bool(self._hashes)

    def scope(self, key: str | None) -> Scope | None:
        """None: this key opens nothing."""
        if not self._hashes:
            return "user"
        given, found = _hash(key or ""), None
        for scope, stored in self._hashes:
            if hmac.compare_digest(given, stored):
                found = scope
        return found


def _hash(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
