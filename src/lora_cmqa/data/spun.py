"""Machine-reworded ("spun") medical text: synonyms put in by a program, so that advice says the opposite of the truth.

低压 (diastolic pressure) -> 通风机 (a fan)          found in the set known as Toyhom's Chinese-medical-dialogue-data
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..core import Example
from ..errors import DataError

# set -> words that no doctor or patient writes, but a rewording program does
MARKERS: dict[str, tuple[str, ...]] = {"Toyhom Chinese-medical-dialogue-data": ("通风机", "防止排便")}
ENOUGH = 2  # rows: one may be a row about a real fan


def spun_rows(examples: Sequence[Example]) -> dict[str, dict[str, int]]:
    """set -> marker word -> rows that hold it; sets below ENOUGH rows are left out."""
    found = {}
    for name, words in MARKERS.items():
        counts = Counter(w for e in examples for w in words if any(w in m.content for m in e.messages))
        if counts.total() >= ENOUGH:
            found[name] = dict(counts)
    return found


def refuse_spun(examples: Sequence[Example], source: str | Path, *, allow: bool) -> dict[str, dict[str, int]]:
    """What `spun_rows` found, for the report. Raises DataError when it found something and `allow` is False."""
    found = spun_rows(examples)
    if found and not allow:
        name, words = next(iter(found.items()))
        seen = ", ".join(f"{w} in {n} rows" for w, n in words.items())
        raise DataError(
            f"this looks like {name}, which a program reworded until it says wrong things ({seen})",
            file=source,
            hint="Do not train on it. If you must: --allow-spun.",
        )
    return found
