"""What a user sees while a stage trains: a progress bar, or a line now and then without a terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SHOWN = {
    "loss": "loss",
    "rewards/accuracies": "accuracy",
    "rewards/margins": "margin",
    "nll/token": "nll",
    "reward/mean": "reward",
    "reward/correct": "correct",
    "rollout/length": "length",
}
QUIET_SECONDS = 15.0


class ShowProgress(TrainerCallback):
    """Shows steps, loss, training accuracy and the time left.

    Args:
        console: where; nothing is shown if it is quiet.
        name: the stage.
    """

    def __init__(self, console: Console, name: str) -> None:
        self.console, self.name = console, name
        self._bar: Progress | None = None
        self._task: Any = None
        self._last_line = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero or self.console.quiet:
            return
        self._last_line = time.monotonic()
        warmup = args.get_warmup_steps(state.max_steps)
        if warmup >= state.max_steps:
            self.console.print(
                f"  [yellow]warning:[/] only {state.max_steps} steps, of which {warmup} warm the learning rate up: "
                "use a smaller batch, more epochs, or training.warmup_steps=0"
            )
        if self.console.is_terminal:
            self._bar = _bar(self.console)
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=state.max_steps, numbers="")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        numbers = "  ".join(f"{title} {logs[key]:.3f}" for key, title in SHOWN.items() if logs and key in logs)
        if not numbers or not state.is_world_process_zero or self.console.quiet:
            return
        if self._bar is not None:
            self._bar.update(self._task, numbers=numbers)
        elif time.monotonic() - self._last_line > QUIET_SECONDS:
            self._last_line = time.monotonic()
            self.console.print(f"  {self.name}: step {state.global_step} of {state.max_steps}  {numbers}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the bar off the screen (also after an error)."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


@contextmanager
def counted(console: Console, title: str) -> Iterator[Callable[[int, int], None]]:
    """Shows how far something has come; gives `progress(done, total)`, which it calls.

    A bar, or without a terminal a line when it begins and one now and then.
    """
    if not console.is_terminal or console.quiet:
        console.print(f"  {title}")
        last = time.monotonic()

        def lines(done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last > QUIET_SECONDS:
                last = time.monotonic()
                console.print(f"  {title}: {done} of {total}")

        yield lines
        return
    with _bar(console) as bar:
        task = bar.add_task(title, total=None, numbers="")
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _bar(console: Console) -> Progress:
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[numbers]}"),
    )
    return Progress(*columns, console=console, transient=True)
