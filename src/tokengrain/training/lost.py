"""Ranks that die or are cut off: this one ends too, with an error that says which, and the run can be resumed."""

from __future__ import annotations

import logging
import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

import torch.distributed as dist

from tokengrain.errors import RunError
from tokengrain.training.step import several_ranks

logger = logging.getLogger(__name__)

SILENCE, EVERY = 60.0, 5.0
"""Seconds after which a machine that says nothing is lost, and between two signs of life."""
GRACE = 10.0
"""Seconds that this process has to end by an error, before it ends without."""
LEFT = 2**40

Peers = Sequence[tuple[str, int]]
"""Host name and process id of every rank, in the order of ranks."""


@contextmanager
def naming_lost_ranks(peers: Peers) -> Iterator[None]:
    """Turn what happens to this rank when another one is gone into one RunError that says which.

    A collective raises; or the launcher, which ends the ranks that are left, is quicker with its SIGTERM; or nothing
    happens, because a machine is cut off, and `Pulse` finds out. Waiting in a collective, a process cannot raise: then
    it says the same on stderr and exits.
    """
    # A handler of the caller's own stays.
    free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    handles = free and several_ranks() and threading.current_thread() is threading.main_thread()
    pulse = Pulse.of(peers, lambda lost: cut_off(lost, handles))
    left, done = threading.Event(), False

    def end(lost: Sequence[str]) -> NoReturn:
        if handles:  # there is an error to tell, and then this process ends by itself
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise RunError(_message(lost or ["a rank on another machine"]))

    def cut_off(lost: Sequence[str], may_raise: bool) -> None:
        if may_raise:
            os.kill(os.getpid(), signal.SIGTERM)
        if not left.wait(GRACE if may_raise else 0.0):
            print(f"RunError: {_message(lost)}", file=sys.stderr, flush=True)
            os._exit(1)

    def lost() -> list[str]:
        return _lost_ranks(peers) or (pulse.lost if pulse else [])

    def on_signal(number: int, frame: Any) -> None:
        if found := lost():
            end(found)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)

    if handles:
        signal.signal(signal.SIGTERM, on_signal)
    if pulse:
        pulse.start()
    try:
        yield
        done = True
    except RuntimeError as error:
        # A closed connection is seen before the process is gone.
        broken = several_ranks() and bool(re.search("connection|peer|socket|timed out", str(error), re.IGNORECASE))
        until, found = time.monotonic() + (5.0 if broken else 0.0), lost()
        while not found and time.monotonic() < until:
            time.sleep(0.01)
            found = lost()
        if found or broken:
            end(found)
        raise
    finally:
        left.set()
        if pulse:
            pulse.stop(done=done)
        if handles and signal.getsignal(signal.SIGTERM) is on_signal:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _message(lost: Sequence[str]) -> str:
    return f"{', '.join(lost)} of this run has ended, so all others end; resume from the last checkpoint"


def _lost_ranks(peers: Peers) -> list[str]:
    """Ranks on this machine whose process has ended."""
    here = socket.gethostname()
    ended = [(rank, process) for rank, (host, process) in enumerate(peers) if host == here and not _is_alive(process)]
    return [f"rank {rank} (process {process})" for rank, process in ended]


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
        state = Path(f"/proc/{process}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except OSError:  # another user's, or a system without /proc
        return True
    return state not in ("Z", "X")  # ended, and not yet waited for


class Pulse:
    """Signs of life of other machines, over the store by which the ranks found each other; it lives on rank 0's.

    The first rank of a machine counts up a number there, and every rank looks at those of the others: it is lost if it
    stands still for `silence` seconds. So is rank 0's machine, if the store does not answer.

    Attributes:
        lost: what to say of those that are.
    """

    meetings = 0  # how often the ranks have begun together; each time with numbers of their own

    def __init__(
        self, store: Any, peers: Peers, host: str, end: Callable[[list[str]], None], silence: float, every: float
    ) -> None:
        self.store, self.end, self.silence, self.every = store.clone(), end, silence, every
        firsts: dict[str, int] = {}  # a host's first rank
        for rank, (name, _) in enumerate(peers):
            firsts.setdefault(name, rank)
        Pulse.meetings += 1
        self.keys = {name: f"tokengrain/{Pulse.meetings}/{rank}" for name, rank in firsts.items()}
        self.ranks = {name: [rank for rank, (where, _) in enumerate(peers) if where == name] for name in firsts}
        self.here, self.first = host, peers[0][0]
        self.beats = (host, os.getpid()) == peers[firsts[host]]
        self.seen = {name: (-1, time.monotonic()) for name in firsts if name != host}
        self.answered = time.monotonic()
        self.lost: list[str] = []
        self.over, self.done = threading.Event(), False

    @classmethod
    def of(cls, peers: Peers, end: Callable[[list[str]], None]) -> Pulse | None:
        """The run's; None where it has one machine only."""
        if len({host for host, _ in peers}) < 2 or not several_ranks():
            return None
        store = dist.distributed_c10d._get_default_store()
        return cls(store, peers, socket.gethostname(), end, SILENCE, EVERY)

    def start(self) -> None:
        self.beating = threading.Thread(target=self._beat, daemon=True)
        self.beating.start()
        threading.Thread(target=self._watch, daemon=True).start()

    def stop(self, *, done: bool) -> None:
        """End. `done`: say that this machine's part is, so that nobody waits for its signs."""
        self.done = done
        self.over.set()
        self.beating.join(self.every if done else 0.0)

    def _beat(self) -> None:
        while not self.over.is_set():
            try:
                if self.beats:
                    self.store.add(self.keys[self.here], 1)
                for name, (number, since) in self.seen.items():
                    found = self.store.add(self.keys[name], 0)
                    moved = found != number or found >= LEFT
                    self.seen[name] = (found, time.monotonic() if moved else since)
            except RuntimeError as error:
                logger.debug("no sign of life: %s", error)
            else:
                self.answered = time.monotonic()
            self.over.wait(self.every)
        if self.done and self.beats:
            with suppress(RuntimeError):
                self.store.add(self.keys[self.here], LEFT)

    def _watch(self) -> None:
        while not self.over.wait(self.every / 5):
            now, seen = time.monotonic(), dict(self.seen)
            silent = [name for name, (_, since) in seen.items() if now - since > self.silence]
            if now - self.answered > self.silence and self.first != self.here:
                silent = [self.first]
            if silent:
                self.lost = [self._described(name) for name in silent]
                self.end(self.lost)
                return

    def _described(self, name: str) -> str:
        ranks = self.ranks[name]
        which = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"
        return f"{which} (machine {name}, silent for {self.silence:g} s)"
