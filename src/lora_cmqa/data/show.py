"""A look at what is trained: rows as a model reads them, the taught tokens apart from the others.

<|im_start|>user⏎头痛怎么办<|im_end|>⏎<|im_start|>assistant⏎«建议休息。<|im_end|>»      « » taught, and green
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from ..core import TokenizedExample
from ..messages import say
from .prepare import load_split
from .template import ChatTemplate, preview

_UNLIMITED = 1 << 30


def shown(data: str | Path, tokenizer: Any, count: int) -> list[dict[str, Any]]:
    """The first `count` training rows: {"id", "tokens", "taught", "pieces": [[text, is taught], ...]}.

    A row without an answer to learn has no piece. Raises DataError where there is no training row, TemplateError for a
    tokenizer whose conversations cannot be rendered.
    """
    template = ChatTemplate.from_tokenizer(tokenizer)
    rows = []
    for example in islice(load_split(data, "train"), count):
        row = template.encode(example, max_length=_UNLIMITED)
        if isinstance(row, TokenizedExample):
            pieces = [list(p) for p in preview(row, tokenizer)]
            about = {"tokens": len(row), "taught": row.supervised_tokens, "pieces": pieces}
        else:
            about = {"tokens": row.tokens, "taught": 0, "pieces": []}
        rows.append({"id": example.id} | about)
    return rows


def print_shown(rows: list[dict[str, Any]], model: str) -> None:
    """Coloured where the terminal has colours; the brackets say it everywhere."""
    from rich.console import Console
    from rich.text import Text

    console = Console(soft_wrap=True, highlight=False)
    console.print(say("data.show", model=model))
    for row in rows:
        console.print(Text(say("data.show_row", **{k: row[k] for k in ("id", "tokens", "taught")}), style="bold"))
        text = Text()
        for piece, taught in row["pieces"]:
            text.append(f"«{piece}»" if taught else piece, style="green" if taught else "dim")
        console.print(text)
