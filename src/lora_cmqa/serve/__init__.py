"""Adapters by name behind an OpenAI-compatible API."""
