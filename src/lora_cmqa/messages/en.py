"""English sentences, keyed by room.moment; zh.py holds the same keys."""

TEXT: dict[str, str] = {}
