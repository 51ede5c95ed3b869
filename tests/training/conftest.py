"""Settings of the training tests: one thread, no network, nothing left over from another test."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("ACCELERATE_USE_CPU", "true")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    # More threads would make a forked child hang in the parent's thread pool, and sums depend on the cut.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
