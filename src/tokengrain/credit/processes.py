"""The processes that share one annotation: how many there are, and that they fail together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from tokengrain.errors import RunError


def world() -> tuple[int, int]:
    """(rank, number of processes); joins the world if a launcher set one up."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not torch.distributed.is_initialized():
        from accelerate import PartialState

        PartialState()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


@contextmanager
def agreement(size: int) -> Iterator[None]:
    """Wait for the other processes at the end; if any failed, all raise instead of waiting for ever."""
    error: Exception | None = None
    try:
        yield
    except Exception as caught:  # Ctrl-C is not caught: the launcher sends it to every process
        error = caught
    if size > 1:
        messages: list[str | None] = [None] * size
        torch.distributed.all_gather_object(messages, None if error is None else str(error) or repr(error))
        failed = [(rank, message) for rank, message in enumerate(messages) if message is not None]
        if error is None and failed:
            raise RunError(f"annotation stopped because process {failed[0][0]} failed: {failed[0][1]}")
    if error is not None:
        raise error
