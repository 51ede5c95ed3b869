"""`Worker`: calls that may hang, in a process that can be ended. (Threads cannot, and `re` holds the lock that
another thread would need to notice.)
"""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from tokengrain.rewards.base import RewardError

SCRIPT = Path(__file__).with_name("worker.py")
# Starting the process and importing what it needs is not the call's fault.
START_SECONDS = 60.0


class Worker:
    """Calls tasks of `worker.py`, one at a time. The process starts with the first call and ends with this."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._buffer = b""
        self._warm: set[str] = set()

    def call(self, task: str, *arguments: Any, timeout: float) -> Any:
        """The task's result.

        Raises:
            TimeoutError: no answer within `timeout` seconds; the process was ended.
            RewardError: the task raised, or the process died.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._process is not None
            assert self._process.stdin is not None
            allowed = timeout if task in self._warm else timeout + START_SECONDS
            line = b""
            # A broken pipe is a process that died: there is no answer then.
            with suppress(BrokenPipeError):
                self._process.stdin.write(json.dumps([task, arguments]).encode() + b"\n")
                self._process.stdin.flush()
                line = self._line(allowed)
            if not line:
                self._end()
                raise RewardError(f"the process for {task} died")
            self._warm.add(task)
        answer = json.loads(line)
        if "error" in answer:
            raise RewardError(str(answer["error"]))
        return answer["value"]

    def _line(self, seconds: float) -> bytes:
        """The next line of output; b"" if there is none to come any more."""
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor = self._process.stdout.fileno()
        deadline = time.monotonic() + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(descriptor, selectors.EVENT_READ)
            while b"\n" not in self._buffer:
                left = deadline - time.monotonic()
                if left <= 0 or not selector.select(left):
                    self._end()
                    raise TimeoutError(f"no answer within {seconds:g} s")
                part = os.read(descriptor, 1 << 16)
                if not part:
                    return b""
                self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _start(self) -> None:
        # -P keeps this folder off the path, where a file might have the name of a library.
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(SCRIPT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._buffer, self._warm = b"", set()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        for pipe in (process.stdin, process.stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        process.wait()

    def __del__(self) -> None:
        with suppress(Exception):  # the interpreter may be going down
            self._end()

    def __deepcopy__(self, memo: Any) -> Worker:
        return Worker()

    def __reduce__(self) -> Any:
        return Worker, ()
