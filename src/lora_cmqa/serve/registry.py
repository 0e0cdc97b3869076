"""Adapters by name, and what each name means now.

    folder         ADAPTERS/cardiology/adapter_config.json ...      a name is a sub-folder, never a path
    version        sha256 of the two files that decide              immutable; what was checked
    alias          "prod" -> "cardiology"                           moved under load; what runs keeps its version

    open(name) -> checks, once for each content -> Version -> its matrices when the engine wants them

A name that a client sends is looked up among the names found in the folder, so it never reaches the file system.
"""

from __future__ import annotations

import ctypes
import difflib
import json
import os
import re
import stat
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..core import Message
from ..data.template import ChatTemplate
from ..engine.embedded import EmbeddedEngine
from ..engine.run import GENERATION, stored_stop_ids
from ..errors import AdapterError, TemplateError
from ..lora.adapter import CONFIG, WEIGHTS
from ..lora.fingerprint import FILE as FINGERPRINT
from ..lora.low_rank import LowRank, adapter_digest, describe, low_rank_from_folder
from ..models.fingerprint import differences

_PROBE = (Message("user", "发烧怎么办？"),)
_LONG = tuple(Message("user" if i % 2 == 0 else "assistant", "头痛") for i in range(63))
NAME = re.compile(r"[^\W_][\w.@-]{0,127}")  # letters of any script; no separator, no leading dot
_MOST_CONFIG, _MOST_TEMPLATE, _MOST_CARD = 1 << 20, 1 << 16, 1 << 22  # bytes
_TEMPLATE_SECONDS = 2.0
T = TypeVar("T")


class UnknownModel(AdapterError):
    """No adapter, alias or base of that name; the hint names near ones."""


@dataclass(frozen=True, slots=True)
class Version:
    """One content of an adapter, checked. `base_check`: how it was found to belong to the base."""

    digest: str
    folder: Path
    base_check: str  # "fingerprint", "absent" (it carries none), or "overridden: <what differs>"
    config: dict[str, Any]  # r, lora_alpha, target_modules
    card: dict[str, Any] | None  # of RUN/eval/*/report.json
    template: ChatTemplate
    stop_ids: tuple[int, ...]
    effect: float  # largest change of a logit on the probe


@dataclass(slots=True)
class _Entry:
    folder: Path
    version: Version | None = None  # None: not asked for yet
    refusal: AdapterError | None = field(default=None)


class Registry:
    """`root`: its sub-folders with an adapter_config.json are the names.

    fingerprint      of the base (lora.fingerprint), compared with each adapter's own; with its depth where it is cut
    allow_other_base serve an adapter whose fingerprint differs all the same; /v1/models says so
    adapter_bytes    largest adapter_model.safetensors that is opened
    """

    def __init__(
        self,
        root: Path | None,
        engine: EmbeddedEngine,
        template: ChatTemplate,
        *,
        base: str,
        fingerprint: dict[str, Any],
        allow_other_base: bool = False,
        adapter_bytes: int = 2 << 30,
    ) -> None:
        self.root, self.engine, self.template, self.base = root, engine, template, base
        self._fingerprint, self._allow_other_base, self._adapter_bytes = fingerprint, allow_other_base, adapter_bytes
        self._entries: dict[str, _Entry] = {}
        self._aliases: dict[str, str] = {}
        self._folders: dict[str, Path] = {}  # digest -> where its content lies
        self._fresh: tuple[str, LowRank] | None = (
            None  # what was checked last, for the engine that will ask for it next
        )
        self._probe = tuple(template.encode_prompt(_PROBE))[: engine.forward.chunk]
        self._base_logits = engine.last_logits(self._probe)
        self._lock = threading.Lock()  # names and aliases; never held while a disk or the engine works
        self._checking = threading.Lock()  # one adapter is checked at a time
        for name, folder in self._found().items():
            self._entries[name] = _Entry(folder)

    # ---- what a name means -----------------------------------------------------------------------------------------

    def names(self) -> list[str]:
        with self._lock:
            return sorted([*self._entries, *self._aliases])

    def entry(self, name: str) -> tuple[str, Version | None, AdapterError | None]:
        """(adapter's name, its version where it was opened, why it was refused)"""
        with self._lock:
            target = self._target(name)
            entry = self._entries[target]
            return target, entry.version, entry.refusal

    def open(self, name: str) -> tuple[str, Version]:
        """The adapter and the version that `name` means now, checked on first use. Raises UnknownModel, or AdapterError
        with what is wrong with the adapter."""
        with self._lock:
            target = self._target(name)
            entry = self._entries[target]
        if entry.version is None and entry.refusal is None:
            self._check_entry(entry)
        if entry.refusal is not None:
            raise entry.refusal
        assert entry.version is not None
        return target, entry.version

    def load(self, name: str) -> Version:
        """Look at the folder of `name` again: a changed content becomes its new version, a new folder a new name. Where
        the new content is refused, the old version stays."""
        found = self._found()
        if name not in found:
            raise self._unknown(name, found)
        fresh = _Entry(found[name])
        self._check_entry(fresh)
        if fresh.refusal is not None:
            raise fresh.refusal
        with self._lock:
            self._entries[name] = fresh
        assert fresh.version is not None
        return fresh.version

    def unload(self, name: str) -> dict[str, Any]:
        """Forget a name and the aliases that mean it; {"freed_bytes", "running"}: requests that still answer with it
        end as they began, and its bytes go with the last of them."""
        with self._lock:
            if name not in self._entries:
                raise self._unknown(name, self._entries)
            entry = self._entries.pop(name)
            self._aliases = {a: t for a, t in self._aliases.items() if t != name}
            digest = entry.version.digest if entry.version else None
            shared = any(e.version and e.version.digest == digest for e in self._entries.values())
        if digest is None or shared:
            return {"freed_bytes": 0, "running": False}
        running = self.engine.adapters.users(digest) > 0
        return {"freed_bytes": self.engine.forget(digest), "running": running}

    def alias(self, alias: str, name: str) -> Version:
        """From now on `alias` means what `name` means now. An alias may not hide an adapter."""
        if not NAME.fullmatch(alias) or alias == self.base:
            raise AdapterError(f"{alias[:80]!r} cannot be an alias", hint="Letters, digits, . _ @ - ; up to 128.")
        target, version = self.open(name)
        with self._lock:
            if alias in self._entries:
                raise AdapterError(f"{alias!r} is an adapter's own name", hint="Take another name for the alias.")
            self._aliases[alias] = target
        return version

    def unalias(self, alias: str) -> None:
        with self._lock:
            if alias not in self._aliases:
                raise self._unknown(alias, self._aliases)
            del self._aliases[alias]

    def low_rank(self, digest: str) -> LowRank:
        """The matrices of a version for the engine. AdapterError where its folder holds another by now."""
        fresh, self._fresh = self._fresh, None
        if fresh is not None and fresh[0] == digest:
            return fresh[1]
        folder = self._folders.get(digest)
        if folder is None:
            raise AdapterError(f"no version {digest[:12]} is known")
        pairs = low_rank_from_folder(folder, self.engine.model)
        if adapter_digest(folder) != digest:  # looked at after reading: what was read is what is named
            raise AdapterError(
                f"the files have changed since version {digest[:12]} was loaded",
                file=folder,
                hint="Load the adapter again; versions are immutable.",
            )
        return pairs

    def _target(self, name: str) -> str:
        target = self._aliases.get(name, name)
        if target not in self._entries:
            raise self._unknown(name, [*self._entries, *self._aliases])
        return target

    def _unknown(self, name: str, among: Any) -> UnknownModel:
        near = difflib.get_close_matches(name[:128], list(among)[:2000], n=2, cutoff=0.5)
        return UnknownModel(
            f"there is no model {name[:128]!r} here",
            hint=f"Did you mean {' or '.join(near)}?" if near else "GET /v1/models lists what there is.",
        )

    def _found(self) -> dict[str, Path]:
        """Sub-folders of the root that hold an adapter. A link is no sub-folder: it may lead outside."""
        if self.root is None:
            return {}
        try:
            with os.scandir(self.root) as entries:
                folders = [Path(e.path) for e in entries if e.is_dir(follow_symlinks=False)]
        except OSError as e:
            raise AdapterError(f"cannot be read: {e.strerror}", file=self.root, hint="--adapters DIR") from None
        return {f.name: f for f in sorted(folders) if NAME.fullmatch(f.name) and (f / CONFIG).is_file()}

    # ---- what is checked ---------------------------------------------------------------------------------------------

    def _check_entry(self, entry: _Entry) -> None:
        with self._checking:
            if entry.version is not None or entry.refusal is not None:
                return
            try:
                entry.version = self._check(entry.folder)
            except AdapterError as e:
                entry.refusal = e
            except TemplateError as e:
                entry.refusal = AdapterError(e.message, file=entry.folder, hint=e.hint)

    def _check(self, folder: Path) -> Version:
        for name, most in ((CONFIG, _MOST_CONFIG), (WEIGHTS, self._adapter_bytes)):
            _plain_file(folder / name, most)
        base_check = self._check_base(folder)
        digest = adapter_digest(folder)
        pairs = low_rank_from_folder(folder, self.engine.model)
        effect = self._effect(folder, pairs)
        if adapter_digest(folder) != digest:
            raise AdapterError("the files changed while they were read", file=folder, hint="Load it again.")
        self._folders[digest] = folder
        self._fresh = digest, pairs
        return Version(
            digest=digest,
            folder=folder,
            base_check=base_check,
            config=describe(folder),
            card=_eval_card(folder),
            template=self._template_of(folder),
            stop_ids=_stop_ids(folder),
            effect=effect,
        )

    def _check_base(self, folder: Path) -> str:
        found = read_fingerprint(folder)
        if found is None:
            return "absent"
        try:
            differing = differences(found, self._fingerprint)
        except (KeyError, TypeError, AttributeError) as e:
            raise AdapterError(f"not a fingerprint: {e}", file=folder / FINGERPRINT) from None
        if differing and not self._allow_other_base:
            raise AdapterError(
                f"this adapter was trained on another base than {self.base}: {'; '.join(differing)} differ",
                file=folder / FINGERPRINT,
                hint="Serve it on its own base, or `cmqa adapter rebase` when you know that they are the same.",
            )
        depth, served = found.get("num_hidden_layers"), self._fingerprint.get("num_hidden_layers")
        if depth != served:
            raise AdapterError(
                f"this adapter was trained on {depth or 'all'} layers of its base; {self.base} is served with "
                f"{served or 'all'} of them",
                file=folder / FINGERPRINT,
                field="num_hidden_layers",
                hint="One server holds one depth: `cmqa serve --num-hidden-layers N`, or start another for it.",
            )
        return f"overridden: {'; '.join(differing)} differ" if differing else "fingerprint"

    def _effect(self, folder: Path, pairs: LowRank) -> float:
        """Largest change of a logit after a short question; 0 would serve the base under the adapter's name."""
        change = (self.engine.last_logits(self._probe, pairs) - self._base_logits).abs().max().item()
        if not change > 0 or change == float("inf"):  # NaN too
            raise AdapterError(
                f"on a probe its logits differ from the base's by {change:g}: it has no effect, or no finite one",
                file=folder,
            )
        return change

    def _template_of(self, folder: Path) -> ChatTemplate:
        """The template the adapter was trained with, else the base's. It comes from the operator's disk, is rendered in
        Jinja's sandbox, and must be quick."""
        file = folder / "chat_template.jinja"
        if not file.exists():
            return self.template
        _plain_file(file, _MOST_TEMPLATE)
        text = file.read_text(encoding="utf-8")
        if text == self.template.jinja:
            return self.template

        def build() -> ChatTemplate:
            template = ChatTemplate.from_tokenizer(self.template.tokenizer, text)
            template.encode_prompt(_LONG)
            return template

        try:
            return within(_TEMPLATE_SECONDS, build)
        except TimeoutError:
            raise AdapterError(f"the chat template takes longer than {_TEMPLATE_SECONDS:g} s", file=file) from None
        except Exception as e:
            raise AdapterError(str(e), file=file) from None


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns, or raises. Raises TimeoutError after `seconds`; `work` is then stopped at its next line of
    Python: a thread left in an endless loop would take its share of the processor for as long as the server lives."""
    done: list[T] = []
    failed: list[Exception] = []

    def run() -> None:
        try:
            done.append(work())
        except Exception as e:
            failed.append(e)
        except SystemExit:  # sent below
            pass

    thread = threading.Thread(target=run, daemon=True, name=work.__qualname__)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ident = ctypes.c_ulong(thread.ident or 0)
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(SystemExit))
        thread.join(seconds)
        raise TimeoutError
    if failed:
        raise failed[0]
    return done[0]


def read_fingerprint(folder: Path) -> dict[str, Any] | None:
    """What an adapter's fingerprint.json says; None without one. Raises AdapterError where it is no JSON object."""
    file = folder / FINGERPRINT
    if not file.exists():
        return None
    _plain_file(file, _MOST_CONFIG)
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as e:
        raise AdapterError(f"not a fingerprint: {e}", file=file) from None
    if not isinstance(content, dict):
        raise AdapterError("not a fingerprint", file=file)
    return content


def _plain_file(file: Path, most: int) -> None:
    """Raises AdapterError unless it is a file of its own of at most `most` bytes: no link, no pipe, no device."""
    try:
        found = file.lstat()
    except OSError as e:
        raise AdapterError(f"not readable: {e.strerror}", file=file) from None
    if not stat.S_ISREG(found.st_mode):
        raise AdapterError("not a plain file (a link may lead outside the adapter's folder)", file=file)
    if found.st_size > most:
        raise AdapterError(f"{found.st_size} bytes; at most {most} are read", file=file)


def _eval_card(folder: Path) -> dict[str, Any] | None:
    """The verdict and the headline numbers of the newest evaluation beside the adapter, where there is one."""
    reports = [p for p in folder.glob("eval/*/report.json") if p.stat().st_size <= _MOST_CARD]
    if not reports:
        return None
    try:
        report = json.loads(max(reports, key=lambda p: p.stat().st_mtime).read_text(encoding="utf-8"))
        metrics = report.get("metrics") or {}
        kept = {k: metrics[k] for k in ("nll", "content_gain", "top1") if k in metrics}
        return {"verdict": report.get("verdict"), "rows": report.get("rows"), "metrics": kept}
    except (OSError, ValueError, AttributeError):
        return None


def _stop_ids(folder: Path) -> tuple[int, ...]:
    """Ids of generation_config.json beside the adapter; the engine's own end every answer besides."""
    if (folder / GENERATION).exists():
        _plain_file(folder / GENERATION, _MOST_CONFIG)
    return stored_stop_ids(folder)
