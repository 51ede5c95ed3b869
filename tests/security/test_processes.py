"""No process outlives the run that started it, however that one ends."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tokengrain.rewards.builtin import Workers

HANGS = """
from tokengrain.rewards.builtin import Workers
Workers("matches").map([["(a+)+$", 0, True, "a" * 60 + "b"]], 300.0)
"""


def below(process: int) -> list[int]:
    """The processes below one, all the way down."""
    found = []
    for task in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *below(child)]
    return found


def alive(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(holds: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.02)
    return holds()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_processes_of_rewards_end_with_a_killed_run() -> None:
    with subprocess.Popen([sys.executable, "-c", HANGS]) as run:
        try:
            assert until(lambda: len(below(run.pid)) >= 2, 60), "a worker, and its copy that hangs"
            started = below(run.pid)
        finally:
            run.send_signal(signal.SIGKILL)
    assert until(lambda: not any(map(alive, started)), 10), f"{list(filter(alive, started))} are still there"


def test_what_rewards_are_done_with_is_closed(recwarn: pytest.WarningsRecorder) -> None:
    workers = Workers("matches")
    assert workers.map([["a", 0, False, "cat"]], 20.0) == [True]
    del workers
    gc.collect()
    assert not [w for w in recwarn if "unclosed" in str(w.message)]
