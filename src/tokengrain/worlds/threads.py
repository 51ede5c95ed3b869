"""Running tiny models on one thread."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def single_thread() -> Iterator[None]:
    """One torch thread while the block runs.

    The worlds' models are too small to gain from more, and sums in another order give other weights: on one thread
    a machine's results do not depend on how many cores it has.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
