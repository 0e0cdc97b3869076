"""Every sentence for a person, in English and Chinese.

    say("train.finished", steps=120, folder="runs/a")

The tables en.py and zh.py hold the same keys (a test compares them). JSON keys are never translated.
"""

from __future__ import annotations

import locale
import os
from typing import Any, Literal

Language = Literal["en", "zh"]

_language: Language | None = None


def set_language(language: Language | None) -> None:
    """Fix the language for this process (`--lang`); None goes back to CMQA_LANG, then the locale."""
    global _language
    _language = language


def language() -> Language:
    """`--lang`, else CMQA_LANG, else the locale, else English."""
    if _language is not None:
        return _language
    wanted = os.environ.get("CMQA_LANG") or locale.getlocale()[0] or ""
    return "zh" if wanted.lower().startswith(("zh", "chinese")) else "en"


def say(key: str, /, lang: Language | None = None, **values: Any) -> str:
    """The sentence of `key`, filled with `values`; `lang` overrides the process's language."""
    from . import en, zh

    table = zh.TEXT if (lang or language()) == "zh" else en.TEXT
    return table[key].format(**values)
