"""Machines that are cut off: signs of life over a store, without processes."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch.distributed as dist

from tokengrain.training.lost import Pulse, _message

PEERS = [("a", 11), ("a", 12), ("b", 21), ("b", 22), ("c", 31)]


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def pulses(store: Any, hosts: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[Pulse, list[list[str]]]]:
    """One process of each host, begun together, and what it said at its end."""
    found, meeting = {}, Pulse.meetings
    for host in hosts:
        monkeypatch.setattr(os, "getpid", lambda host=host: dict(reversed(PEERS))[host])
        Pulse.meetings = meeting
        ends: list[list[str]] = []
        found[host] = Pulse(dist.PrefixStore("run", store), PEERS, host, ends.append, 0.6, 0.05), ends
    for pulse, _ in found.values():
        pulse.start()
    return found


def until(found: Any, seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not found() and time.monotonic() < end:
        time.sleep(0.02)


def test_a_silent_machine_is_named_and_one_that_has_left_is_not(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    found = pulses(store, "abc", monkeypatch)
    time.sleep(1.2)  # all of them are there
    assert [ends for _, ends in found.values()] == [[], [], []]
    found["c"][0].stop(done=True)
    time.sleep(1.2)
    assert [ends for _, ends in found.values()] == [[], [], []]
    found["b"][0].stop(done=False)
    until(lambda: found["a"][1])
    assert found["a"][1] == [["ranks 2 to 3 (machine b, silent for 0.6 s)"]]
    assert found["b"][1] == found["c"][1] == []
    assert "ranks 2 to 3 (machine b, silent for 0.6 s) of this run has ended" in _message(found["a"][0].lost)
    found["a"][0].stop(done=True)


def test_the_machine_of_the_store_is_named_where_it_does_not_answer(
    store: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = pulses(store, "ab", monkeypatch)

    class Cut:
        def add(self, *_: Any) -> int:
            time.sleep(60)
            return 0

    found["b"][0].store = Cut()
    until(lambda: found["b"][1])
    assert found["b"][1] == [["ranks 0 to 1 (machine a, silent for 0.6 s)"]]
    for pulse, _ in found.values():
        pulse.stop(done=False)
