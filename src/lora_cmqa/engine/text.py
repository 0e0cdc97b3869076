"""Tokens -> text, piece by piece, at a cost that does not grow with the answer.

    ids      231 150 188 | 229 129 141 | ...          byte tokens of one character each
    pieces   ""  ""  "疼" | ""  ""  "停" | ...          nothing is shown before its last byte is here

Only the tokens since the last whole piece are decoded, with the piece before them: some tokenizers write a token
differently at the beginning of a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_UNFINISHED = "\ufffd"  # what a decoder writes for bytes that are no whole character


class TextStream:
    """`push(token)` gives the text that became certain; `finish()` the rest. Together they are the whole text.

    A text that meets one of `stop` ends before it: `stopped` is then True and nothing more comes.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        self._begin = self._shown = 0  # tokens before _shown are shown; those from _begin are decoded again with them
        self._held = ""  # certain text that may be the beginning of a stop string
        self.stopped = False

    def push(self, token: int) -> str:
        if self.stopped:
            return ""
        self._ids.append(token)
        new = self._new_text()
        if new.endswith(_UNFINISHED) or not new:
            return ""
        self._begin, self._shown = self._shown, len(self._ids)
        return self._pass_on(new, last=False)

    def finish(self) -> str:
        return "" if self.stopped else self._pass_on(self._new_text(), last=True)

    def _new_text(self) -> str:
        before, whole = self._decode(self._ids[self._begin : self._shown]), self._decode(self._ids[self._begin :])
        return whole[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _pass_on(self, new: str, *, last: bool) -> str:
        text = self._held + new
        met = [place for s in self._stop if (place := text.find(s)) >= 0]
        if met:
            self.stopped, self._held = True, ""
            return text[: min(met)]
        keep = 0 if last else max((_overlap(text, s) for s in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` begins with."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
