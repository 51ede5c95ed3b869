"""A helper for sequences of any kind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the longest beginning that two sequences (strings, lists) share."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)
