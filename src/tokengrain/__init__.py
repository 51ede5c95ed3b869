"""tokengrain: token-level alignment for language models."""
