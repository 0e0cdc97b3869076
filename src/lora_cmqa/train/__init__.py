"""Packs in, an adapter out, nothing lost on the way."""
