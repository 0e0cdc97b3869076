"""Fetch a model by name. The only room that opens a socket, and only when a name is not a local path."""
