"""What can be counted in a generated answer without knowing the right one."""

from __future__ import annotations


def repetition_rate(text: str, n: int = 4) -> float:
    """Share of the text's character n-grams that stand in it already: 0 says nothing twice, near 1 is a loop."""
    bare = "".join(text.split())
    grams = [bare[i : i + n] for i in range(len(bare) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0
