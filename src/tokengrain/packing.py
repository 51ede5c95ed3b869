"""Putting things of known sizes into bins: micro-batches of a batch, prompts of a row."""

from __future__ import annotations

from collections.abc import Sequence


def first_fit(sizes: Sequence[int], max_tokens: int | None) -> list[list[int]]:
    """Indices of `sizes` in bins of at most `max_tokens` (None: one bin): largest first into the first with room.

    Close to the fewest bins. A size beyond the limit gets a bin of its own.
    """
    if max_tokens is None:
        return [list(range(len(sizes)))] if sizes else []
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        for b, free in enumerate(room):
            if sizes[index] <= free:
                bins[b].append(index)
                room[b] -= sizes[index]
                break
        else:
            bins.append([index])
            room.append(max_tokens - sizes[index])
    return [sorted(b) for b in bins]


def balanced(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of `sizes` in `count` bins of similar load: largest first into the emptiest."""
    bins: list[list[int]] = [[] for _ in range(count)]
    load = [0] * count
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        b = min(range(count), key=lambda k: (load[k], k))
        bins[b].append(index)
        load[b] += sizes[index]
    return [sorted(b) for b in bins]
