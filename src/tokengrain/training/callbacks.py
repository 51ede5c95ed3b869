"""Callbacks: the local log, and the guard that stops a step whose loss is not finite."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from tokengrain.errors import RunError
from tokengrain.files import read_log, write_text

if TYPE_CHECKING:
    from tokengrain.training.trainer import PreferenceTrainer

LOG_FILE = "log.jsonl"
RUN_SUMMARY = "train_runtime"
"""Key of the entry that transformers logs when training has ended."""


def append_text(path: Path, text: str) -> None:
    """Add text (whole lines) to the end of a file; its folder is made if need be.

    Raises:
        RunError: it cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise RunError(f"could not write {path}: {error.strerror}") from error


class JsonlLog(TrainerCallback):
    """Appends every logged dictionary to `output_dir/log.jsonl`, one line each, with its step.

    A resumed run cuts off what the earlier attempt logged after the checkpoint it goes on from, so that no
    step is logged twice.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._before: list[str] | None = []  # lines of an evaluation before training; None: training has begun

    def restart(self, step: int | None) -> None:
        """Keep the entries up to `step` (None: only what this run itself logged before training)."""
        kept = (self._before or []) if step is None else []
        self._before = None
        for entry in read_log(self.path) if step is not None else ():
            if entry.get("step", 0) > step or RUN_SUMMARY in entry:
                break
            kept.append(json.dumps(entry, ensure_ascii=False) + "\n")
        if kept or self.path.exists():
            write_text(self.path, "".join(kept))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = json.dumps({"step": state.global_step, **logs}, ensure_ascii=False, default=float) + "\n"
        if self._before is not None:
            self._before.append(line)
        append_text(self.path, line)


class StepGuard(TrainerCallback):
    """Ends a run before the optimiser uses a gradient whose loss was not finite."""

    def __init__(self, trainer: PreferenceTrainer) -> None:
        self.trainer = trainer

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.trainer.finish_step()
