"""Base against adapter on the same rows, with intervals."""
