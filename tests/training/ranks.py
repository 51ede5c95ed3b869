"""Runs a function on several ranks: forked processes joined by gloo on this machine."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def on_ranks(world: int, work: Callable[[], Any], timeout: float = 180, killed: Collection[int] = ()) -> list[Any]:
    """What `work` returned on every rank. It is called after the fork, so closures are fine.

    Args:
        killed: ranks that will not return; nothing is said of them.
    """
    context = multiprocessing.get_context("fork")
    port = free_port()
    pipes = [context.Pipe(duplex=False) for _ in range(world)]
    children = []
    for rank, (_, sender) in enumerate(pipes):
        children.append(context.Process(target=_child, args=(rank, world, port, work, sender)))
        children[-1].start()
    results = []
    try:
        for receiver in (receiver for rank, (receiver, _) in enumerate(pipes) if rank not in killed):
            results.append(receiver.recv() if receiver.poll(timeout) else ("error", "no answer in time"))
    finally:
        for child in children:
            child.join(10)
            if child.is_alive():
                child.kill()
    errors = [text for kind, text in results if kind == "error"]
    assert not errors, "\n".join(errors)
    return [value for _, value in results]


def _child(rank: int, world: int, port: int, work: Callable[[], Any], sender: Any) -> None:
    from accelerate.state import AcceleratorState, GradientState

    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    try:
        sender.send(("value", work()))
    except BaseException:
        sender.send(("error", f"rank {rank}: {traceback.format_exc()}"))
    finally:
        sender.close()
        os._exit(0)


@contextmanager
def sharding_on_cpu() -> Iterator[None]:
    """Let accelerate shard on CPU, which torch can do and accelerate 1.15 does on accelerators only."""
    from accelerate import Accelerator
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    original = Accelerator.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        plugin = kwargs.get("fsdp_plugin")
        if plugin is not None and self.state.distributed_type == DistributedType.MULTI_CPU:
            self.state.fsdp_plugin = plugin
            self.state.distributed_type = DistributedType.FSDP
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    Accelerator.__init__ = init
    try:
        yield
    finally:
        Accelerator.__init__ = original
