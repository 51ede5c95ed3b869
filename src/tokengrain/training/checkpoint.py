"""The part of the trainer that saves and resumes: whole checkpoints, the same run, the same log."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput
from transformers.utils import logging

from tokengrain.errors import RunError, fingerprint, read_json, read_log, write_json, write_text

if TYPE_CHECKING:
    from tokengrain.method import BoundObjective
    from tokengrain.training.config import PreferenceConfig
    from tokengrain.training.step import WeightedMeans


# ----------------------------------------------------------------------------------------------------
# Checkpoints that are whole or not there: written to a staging folder, synced, renamed.
#
# `transformers.Trainer` writes a checkpoint file by file into its final folder, and takes the folder with the
# largest number for the latest. A process killed in between leaves a folder that looks like a checkpoint and is
# not. Here `checkpoint-K` appears by one rename, after everything in it is on disk.

STAGING = ".saving"
STATE_FILE = "tokengrain_state.json"
_CHECKPOINT = re.compile(r"^checkpoint-(\d+)$")


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Complete checkpoints in `output_dir`, oldest first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := _CHECKPOINT.match(p.name)) and p.is_dir()]
    # The state file is the last one written; a folder without it was made by something else.
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in `output_dir` that was written to its end, or None."""
    found = checkpoints(output_dir)
    return found[-1] if found else None


def require_checkpoint(path: str | os.PathLike[str]) -> Path:
    """`path` if it is a complete checkpoint, otherwise a RunError."""
    if not (Path(path) / STATE_FILE).is_file():
        raise RunError(f"{path} is not a complete checkpoint of tokengrain ({STATE_FILE} is missing)")
    return Path(path)


def require_optimizer(checkpoint: Path) -> None:
    """Raise RunError if a checkpoint has weights alone; transformers would go on with a fresh optimiser."""
    # Sharded, the optimiser's state is a folder.
    if not any(checkpoint.glob("optimizer*")) or not (checkpoint / "scheduler.pt").is_file():
        raise RunError(
            f"{checkpoint} cannot be gone on with: it has no state of optimiser and learning rate (was it saved with "
            "save_only_model?). Start anew from its weights, as the model of another output_dir"
        )


def refuse_earlier_run(output_dir: str | os.PathLike[str]) -> None:
    """Raise RunError if there are checkpoints where a run starts from scratch; it might resume from them."""
    found = checkpoints(output_dir)
    if found:
        raise RunError(
            f"{output_dir} holds checkpoints of an earlier run ({found[-1].name}); resume it with "
            "train(resume_from_checkpoint=True), choose another output_dir, or set overwrite_output_dir"
        )


def remove_folder(path: Path) -> None:
    """Remove a checkpoint so that a kill in the middle does not leave a part of it under its name."""
    doomed = path.parent / STAGING / f"removed-{path.name}"
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def publish(staged: Path, target: Path) -> None:
    """Sync everything in `staged` to disk and rename it to `target`, replacing what is there."""
    for folder, _, names in os.walk(staged):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))
    if target.exists():
        remove_folder(target)
    os.replace(staged, target)
    _sync(target.parent)


def rotate(output_dir: str | os.PathLike[str], limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest one or the best one."""
    if limit is None or limit <= 0:
        return
    found = checkpoints(output_dir)
    keep = {found[-1]} | ({Path(best)} if best else set()) if found else set()
    removable = [path for path in found if path not in keep]
    for path in removable[: max(0, len(found) - max(limit, len(keep)))]:
        remove_folder(path)


@contextmanager
def saving(what: str, staged: Path) -> Iterator[None]:
    """Turn a failure to write (a full disk above all) into a RunError, and remove what was half written."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        if not _is_write_error(error):
            raise
        kept = last_complete_checkpoint(staged.parent.parent)
        intact = f"{kept} is intact" if kept else "there is no earlier checkpoint"
        reason = "no space left on the device" if _is_full(error) else str(error)
        raise RunError(f"could not save {what} in {staged.parent.parent}: {reason}; {intact}") from error


def _is_write_error(error: BaseException) -> bool:
    # safetensors has its own exception class, torch.save raises RuntimeError from its zip writer.
    named = type(error).__name__ == "SafetensorError"
    return isinstance(error, OSError) or named or (isinstance(error, RuntimeError) and "Writer" in str(error))


def _is_full(error: BaseException | None) -> bool:
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return True
        if "No space left on device" in str(error) or "os error 28" in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_state(folder: Path, state: dict[str, Any]) -> None:
    """Write what a run needs to go on exactly, beyond what transformers saves."""
    write_json(folder / STATE_FILE, state)


def read_state(folder: Path) -> dict[str, Any]:
    return read_json(folder / STATE_FILE)


def check_same_run(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Raise RunError if the checkpoint was made by a run with another objective, data set or batch size."""
    for name in sorted(saved.keys() | current.keys()):
        if saved.get(name) != current.get(name):
            raise RunError(
                f"{folder} belongs to another run: {name} was {saved.get(name)!r} there and is "
                f"{current.get(name)!r} now; use the same settings to resume, or another output_dir"
            )


# ----------------------------------------------------------------------------------------------------
# Callbacks: the local log, and the guard that stops a step whose loss is not finite.

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


class CheckpointMixin(Trainer):
    """Overrides of `transformers.Trainer` that make checkpoints atomic and resuming exact."""

    _staging: Path | None = None

    if TYPE_CHECKING:  # what PreferenceTrainer adds
        args: PreferenceConfig
        objective: BoundObjective
        credit: Any
        _window: WeightedMeans
        _tokens_seen: int
        _log_file: JsonlLog

        def _reset_step(self) -> None: ...

        def reduce(self, values: Tensor) -> Tensor: ...

    @property
    def output_path(self) -> Path:
        """`args.output_dir`."""
        return Path(str(self.args.output_dir))

    def train(
        self,
        resume_from_checkpoint: str | os.PathLike[str] | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """Train.

        Args:
            resume_from_checkpoint: True: go on from the last complete checkpoint in `output_dir`, or start if
                there is none. A path: go on from there. None or False: start from scratch.

        Raises:
            RunError: starting from scratch where checkpoints lie; resuming another run's checkpoint, or one of the
                weights alone.
            NonFiniteLossError: a loss that is not finite; the batch's rows are in `nonfinite.json`.
        """
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._reset_step()
        eval_on_start = self.args.eval_on_start
        if checkpoint is None:
            self._start_clean()
        else:
            self._restore(checkpoint)
            self.args.eval_on_start = False  # the first attempt has done it
        self.accelerator.wait_for_everyone()
        try:
            return super().train(str(checkpoint) if checkpoint else None, trial, ignore_keys_for_eval)
        finally:
            self.args.eval_on_start = eval_on_start

    def _start_clean(self) -> None:
        if not self.args.overwrite_output_dir:
            refuse_earlier_run(self.output_path)  # on every rank: one that waits for another would hang
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            for path in checkpoints(self.output_path):
                remove_folder(path)
            self._log_file.restart(None)

    def _checkpoint_to_resume(self, resume: str | os.PathLike[str] | bool | None) -> Path | None:
        if resume is None or resume is False:
            return None
        if resume is True:
            return last_complete_checkpoint(self.output_path)
        return require_checkpoint(resume)

    def _restore(self, checkpoint: Path) -> None:
        state = read_state(checkpoint)
        check_same_run(state["run"], self.run_identity(), checkpoint)
        require_optimizer(checkpoint)
        self._window.load_state(state["window"])
        if not self.is_world_process_zero():
            self._window.clear()  # the saved window is the sum over ranks
        self._tokens_seen = state["tokens_seen"]
        if self.is_world_process_zero():
            self._log_file.restart(state["step"])
        self.restore_extra(checkpoint, state.get("extra", {}))

    def save_extra(self, staged: Path) -> dict[str, Any]:
        """For subclasses: write further files into the checkpoint `staged`; every rank calls this.

        Returns:
            What goes into its state file, JSON-like; the main process's counts.
        """
        return {}

    def restore_extra(self, checkpoint: Path, extra: dict[str, Any]) -> None:
        """For subclasses: take up what `save_extra` left; every rank calls this, before training begins."""

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_renamed(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_renamed(str(self.state.best_model_checkpoint))

    def _load_renamed(self, checkpoint: str) -> None:
        if has_renamed_weights(Path(checkpoint), self.model):
            # transformers renames weights when it saves some architectures (GPT-NeoX's head) and its trainer does
            # not name them back; only `from_pretrained` does.
            own: Any = self.model
            with no_progress_bar():
                loaded = type(own).from_pretrained(checkpoint, config=own.config, dtype=own.dtype)
            own.load_state_dict(loaded.state_dict())

    def run_identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to be this run's."""
        data = self.train_dataset
        prompts = self.args.per_device_train_batch_size * self.args.gradient_accumulation_steps
        credit = self.credit
        return {
            "objective": self.objective.describe(),
            "credit": credit.describe() if credit is not None else None,
            "normaliser": self.args.normaliser,
            "normaliser_constant": self.args.normaliser_constant,
            "data": getattr(data, "fingerprint", None) or _fingerprint(data),
            "prompts_per_step": prompts * self.accelerator.num_processes,
            "seed": self.args.seed,
            "data_seed": self.args.data_seed,
        }

    # ---- Saving ----

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save into a staging folder, sync, rename. All ranks call this.

        Raises:
            RunError: it could not be written (a full disk); earlier checkpoints are as they were.
        """
        run_dir = Path(self._get_output_dir(trial))
        target = run_dir / f"checkpoint-{self.state.global_step}"
        staged = run_dir / STAGING / target.name
        window = self._window.reduced(self.reduce)
        self._window.load_state(window.state())
        if not self.is_world_process_zero():
            self._window.clear()
        if self.args.should_save:
            shutil.rmtree(staged.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        # Rotation has to wait until the new checkpoint is in place.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        self._staging = staged.parent
        try:
            with saving(f"checkpoint {self.state.global_step}", staged), no_progress_bar():
                super()._save_checkpoint(model, trial)
                extra = self.save_extra(staged)
                self._name_best(target)
                self.accelerator.wait_for_everyone()
                if self.args.should_save:
                    self._complete(staged, target, extra)
        finally:
            self._staging, self.args.save_total_limit = None, limit
        if self.args.should_save:
            rotate(run_dir, limit, self.state.best_model_checkpoint)
            with suppress(OSError):
                staged.parent.rmdir()
        self.accelerator.wait_for_everyone()

    def _name_best(self, target: Path) -> None:
        """Call the best checkpoint by the name that it has in this folder, which may have been moved or renamed.

        Every rank calls this: each of them loads the best weights at the end.
        """
        if self.state.best_global_step:
            here = target.parent / f"checkpoint-{self.state.best_global_step}"
            if here == target or here.is_dir():
                self.state.best_model_checkpoint = str(here)

    def _complete(self, staged: Path, target: Path, extra: dict[str, Any]) -> None:
        self.state.save_to_json(str(staged / TRAINER_STATE_NAME))
        write_state(
            staged,
            {
                "step": self.state.global_step,
                "run": self.run_identity(),
                "window": self._window.state(),
                "tokens_seen": self._tokens_seen,
                "extra": extra,
            },
        )
        publish(staged, target)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save weights, config and tokenizer; into a folder beside the target first, so that no part of it is
        ever taken for the whole.

        Raises:
            RunError: it could not be written; what was there before is as it was.
        """
        if _internal_call:
            super().save_model(output_dir, _internal_call=True)
            return
        target = Path(output_dir) if output_dir is not None else self.output_path
        staged = target.parent / STAGING / target.name
        if self.args.should_save:
            shutil.rmtree(staged, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with saving(f"the model {target.name}", staged), no_progress_bar():
            super().save_model(str(staged), _internal_call=True)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _move_into(staged, target)
        self.accelerator.wait_for_everyone()


def has_renamed_weights(checkpoint: Path, model: Any) -> bool:
    """Whether a checkpoint of a whole model holds weights under names that the model does not have."""
    from safetensors import safe_open

    files = sorted(checkpoint.glob("model*.safetensors"))
    names: set[str] = set()
    for file in files:
        with safe_open(file, "pt") as stored:
            names |= set(stored.keys())
    return bool(names - model.state_dict().keys())


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """No progress bar for the files of every checkpoint."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _move_into(staged: Path, target: Path) -> None:
    """Make `staged` the folder `target`; if that exists, replace the files in it one by one."""
    if not target.exists():
        publish(staged, target)
    else:
        for file in sorted(staged.iterdir()):
            os.replace(file, target / file.name)
        staged.rmdir()
    with suppress(OSError):
        staged.parent.rmdir()


def _fingerprint(data: Any) -> str | None:
    """Identity of a list of samples; None for a stream, which cannot be read twice."""
    if data is None or not hasattr(data, "__len__"):
        return None
    rows = ([s.row, s.prompt_ids, [c.ids for c in s.completions]] for s in (data[i] for i in range(len(data))))
    return fingerprint([fingerprint(row) for row in rows])
