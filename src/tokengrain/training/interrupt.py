"""Ctrl-C while training: finish the step, save a checkpoint, stop."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class StopOnSignal(TrainerCallback):
    """Turns the first SIGINT or SIGTERM into "save and stop after this optimiser step".

    A second signal acts at once, as it would without this. Use it as a context manager around `train`. It
    does nothing outside the main thread (Python handles no signals there) or with several processes, which
    would not stop at the same step; the last periodic checkpoint serves there.
    """

    def __init__(self, processes: int = 1) -> None:
        self.requested = False
        self._active = processes == 1 and threading.current_thread() is threading.main_thread()
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopOnSignal:
        if self._active:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.requested:
            control.should_save = True
            control.should_training_stop = True
