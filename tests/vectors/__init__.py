"""Runs files of test vectors: `python -m tests.vectors PATH...`. One module per method holds its adapters."""
