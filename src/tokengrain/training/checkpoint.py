"""Checkpoints that are whole or not there, and the log that goes with them.

`transformers.Trainer` writes a checkpoint file by file into its final folder, and takes the folder with the largest
number for the latest. A process killed in between leaves a folder that looks like a checkpoint and is not. Here
`checkpoint-K` is written to a staging folder and appears by one rename, after everything in it is on disk.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
import socket
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from datasets.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import TrainerState
from transformers.utils import logging

from tokengrain.errors import (
    RunError,
    explained,
    fault,
    fingerprint,
    finite,
    foreign,
    read_log,
    regular_file,
    require,
    write_text,
)
from tokengrain.runs import CHECKPOINT
from tokengrain.vision import seen

STAGING = ".saving"
STATE_FILE = "tokengrain_state.json"
LOG_FILE = "log.jsonl"
RUN_SUMMARY = "train_runtime"
"""Key of the entry that transformers logs when training has ended."""


def checkpoints(output_dir: str | os.PathLike[str]) -> list[Path]:
    """Complete checkpoints in `output_dir`, oldest first."""
    folder = Path(output_dir)
    if not folder.is_dir():
        return []
    found = [(int(m[1]), p) for p in folder.iterdir() if (m := CHECKPOINT.fullmatch(p.name)) and p.is_dir()]
    # The state file is the last one written; a folder without it was made by something else.
    return [path for _, path in sorted(found) if (path / STATE_FILE).is_file()]


def last_complete_checkpoint(output_dir: str | os.PathLike[str]) -> Path | None:
    return next(reversed(checkpoints(output_dir)), None)


def checkpoint_to_resume(resume: str | os.PathLike[str] | bool | None, output_dir: Path) -> Path | None:
    """The checkpoint that `train(resume_from_checkpoint=resume)` resumes from; None: it starts from scratch."""
    if resume is None or resume is False:
        return None
    path = last_complete_checkpoint(output_dir) if resume is True else Path(resume)
    what = f"{path} is not a complete checkpoint of tokengrain ({STATE_FILE} is missing)"
    require(path is None or (path / STATE_FILE).is_file(), RunError, what)
    return path


def require_state(checkpoint: Path, step: int) -> None:
    """Raise RunError for a checkpoint from which transformers would silently resume as another run.

    It has weights alone, or no random numbers, or parts that are not of the same `step`.
    """
    # Sharded, the optimiser's state is a folder.
    if not (any(checkpoint.glob("optimizer*")) and (checkpoint / "scheduler.pt").is_file()):
        raise RunError(
            f"{checkpoint} cannot be resumed: it has no state of optimiser and learning rate (was it saved with "
            "save_only_model?). Start anew from its weights, as the model of another output_dir"
        )
    what = f"{checkpoint} is damaged or incomplete: "
    lacks = f"{what}rng_state.pth (of several processes rng_state_0.pth, ...) is not there; {way_on(checkpoint)}"
    require(any(checkpoint.glob("rng_state*.pth")), RunError, lacks)
    other = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME)).global_step
    what = f"{what}{TRAINER_STATE_NAME} is of step {other}, {STATE_FILE} of step {step}; {way_on(checkpoint)}"
    require(other == step, RunError, what)


def check_same_run(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Raise RunError if the checkpoint was made by a run with another objective, data set or batch size."""
    for name in sorted(saved.keys() | current.keys()):
        then, now = saved.get(name), current.get(name)
        what = f"{folder} belongs to another run: {name} was {then!r} there and is {now!r} now"
        require(then == now, RunError, f"{what}; use the same settings to resume, or another output_dir")


def refuse_earlier_run(output_dir: Path) -> None:
    if (last := last_complete_checkpoint(output_dir)) is not None:
        raise RunError(
            f"{output_dir} holds checkpoints of an earlier run ({last.name}); resume it with "
            "train(resume_from_checkpoint=True), choose another output_dir, or set overwrite_output_dir"
        )


def data_fingerprint(data: Any) -> str | None:
    """Identity of training data: its own, or that of a list of samples; None for a stream, which is read once."""
    if (known := getattr(data, "fingerprint", None)) is not None or data is None or not hasattr(data, "__len__"):
        return known
    samples = (data[i] for i in range(len(data)))
    rows = ([s.row, s.prompt_ids, [c.ids for c in s.completions], *seen(s.vision)] for s in samples)
    return fingerprint([fingerprint(row) for row in rows])


def has_renamed_weights(checkpoint: Path, model: Any) -> bool:
    """Whether a checkpoint of a whole model holds weights under names that the model does not have."""
    names: set[str] = set()
    for file in sorted(checkpoint.glob("model*.safetensors")):
        with safe_open(file, "pt") as stored:
            names |= set(stored.keys())
    return bool(names - model.state_dict().keys())


# ---- Writing and removing folders so that a kill never leaves a part of one under its name ----


@contextmanager
def staged_folder(
    target: Path, what: str, *, main: bool, wait: Callable[[], None], replace_files: bool = False
) -> Iterator[Path]:
    """Yield a folder to save into that becomes `target` at the end. All ranks enter and leave together.

    Args:
        what: in the RunError of a failure, after which what was there before is as it was.
        main: whether this rank makes the folder and moves it.
        wait: returns when all ranks have called it.
        replace_files: replace the files of an existing `target` one by one, and leave its others.
    """
    staged = target.parent / STAGING / target.name
    if main:
        shutil.rmtree(staged, ignore_errors=True)
    wait()
    with saving(what, staged), no_progress_bar():
        yield staged
        wait()
        if main and replace_files and target.exists():
            for file in sorted(staged.iterdir()):
                os.replace(file, target / file.name)
            staged.rmdir()
        elif main:
            publish(staged, target)
    if main:
        with suppress(OSError):
            staged.parent.rmdir()
    wait()


@contextmanager
def saving(what: str, staged: Path) -> Iterator[None]:
    """Turn a failure to write (a full disk above all) into a RunError, and remove what was half written."""
    try:
        yield
    except BaseException as error:
        shutil.rmtree(staged, ignore_errors=True)
        reason = fault(error) or (str(error) if isinstance(error, (RunError, SafetensorError)) else None)
        if reason is None:
            raise
        kept = last_complete_checkpoint(staged.parent.parent)
        intact = f"{kept} is intact" if kept else "there is no earlier checkpoint"
        raise RunError(f"could not save {what} in {staged.parent.parent}: {reason}; {intact}") from error


@contextmanager
def reading(checkpoint: Path, what: str = "") -> Iterator[None]:
    """Turn what a damaged checkpoint makes libraries raise into a RunError. No pickle in it may name code."""
    forced = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"  # torch unpickles parts of a sharded checkpoint
    before = os.environ.get(forced)
    os.environ[forced] = "1"
    try:
        with foreign(f"{checkpoint} is damaged or incomplete: {what}", then=f"; {way_on(checkpoint)}"):
            yield
    finally:
        del os.environ[forced]
        os.environ.update({} if before is None else {forced: before})


def way_on(checkpoint: Path) -> str:
    """How to continue without a checkpoint."""
    earlier = [path.name for path in checkpoints(checkpoint.parent) if path != checkpoint]
    return f"remove it to {f'resume from {earlier[-1]}' if earlier else 'begin anew'}"


def check_files(checkpoint: Path) -> None:
    """Raise RunError for a file of a checkpoint that is cut off or no file at all, or a pickle that names code."""
    files = (".pt", ".pth", ".bin", ".json", ".safetensors")  # a folder of such a name is passed over by transformers
    for path in sorted(p for p in checkpoint.rglob("*") if not p.is_dir() or p.suffix in files):
        with reading(checkpoint, f"{path.relative_to(checkpoint)}: "):
            regular_file(path)
            if path.suffix in (".pt", ".pth", ".bin"):
                zipfile.ZipFile(path).close()
            elif path.suffix == ".json":
                json.loads(path.read_bytes())
            elif path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.name == ".metadata":
                with path.open("rb") as index:
                    _Metadata(index).load()


class _Metadata(pickle.Unpickler):
    """Reads the index of a sharded checkpoint, which torch unpickles as it is: it may name torch's own records only."""

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle names, if that is a plain record, size or type; no other code is reached from there."""
        known = name in _RECORDS.get(module, "").split()
        known = known or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype))
        require(known, RunError, f"the checkpoint's .metadata names {module}.{name}; it is not loaded")
        return super().find_class(module, name)


_STORED = "torch.distributed.checkpoint."
_RECORDS = {
    f"{_STORED}metadata": "Metadata MetadataIndex StorageMeta TensorStorageMetadata BytesStorageMetadata "
    "TensorProperties ChunkStorageMetadata _MEM_FORMAT_ENCODING",
    f"{_STORED}filesystem": "_StorageInfo _StoragePrefix",
    "torch": "Size",
    "torch.serialization": "_get_layout",
    "collections": "OrderedDict",
    "builtins": "set",
    "pathlib": "PosixPath Path",
}


def check_shared(folder: Path, exchange: Callable[[Any], list[Any]]) -> None:
    """Raises `RunError` on all ranks if one of them cannot write into the run folder, or has another one there."""
    own, refused = folder / f".{secrets.token_hex(8)}", None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.touch()
    except OSError as error:
        refused = fault(error, named=False)
    ranks = exchange((socket.gethostname(), own.name, refused))
    others = exchange([name for _, name, error in ranks if error is None and not (folder / name).exists()])
    with suppress(OSError):
        own.unlink()
    for number, ((host, _, reason), unseen) in enumerate(zip(ranks, others, strict=True)):
        what = f"rank {number} ({host}) cannot write into {folder}: {reason}"
        require(reason is None, RunError, f"{what}; expected a folder that all ranks share")
        what = f"rank {number} ({host}) does not see in {folder} what another rank has written there"
        require(not unseen, RunError, f"{what}; expected a folder that all ranks share")


def publish(staged: Path, target: Path) -> None:
    """Sync everything in `staged` to disk and rename it to `target`, replacing what is there."""
    for path in [*staged.rglob("*"), staged]:
        _sync(path)
    if target.exists():
        remove_folder(target)
    os.replace(staged, target)
    _sync(target.parent)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_folder(path: Path) -> None:
    """Remove a checkpoint so that a kill in the middle does not leave a part of it under its name."""
    doomed = path.parent / STAGING / f"removed-{path.name}"
    doomed.parent.mkdir(exist_ok=True)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(path, doomed)
    shutil.rmtree(doomed, ignore_errors=True)
    with suppress(OSError):  # unless a checkpoint is being saved there
        doomed.parent.rmdir()


def rotate(output_dir: str | os.PathLike[str], limit: int | None, best: str | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest one or the best one."""
    if limit is None or limit <= 0:
        return
    found = checkpoints(output_dir)
    keep = {*found[-1:], *([Path(best)] if best and found else [])}
    removable = [path for path in found if path not in keep]
    for path in removable[: max(0, len(found) - max(limit, len(keep)))]:
        remove_folder(path)


@contextmanager
def no_progress_bar() -> Iterator[None]:
    """No progress bars of transformers and datasets, which show one for the files of every model and data set."""
    models, rows = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()
    disable_progress_bars()
    try:
        yield
    finally:
        if models:
            logging.enable_progress_bar()
        if rows:
            enable_progress_bars()


def append_text(path: Path, text: str) -> None:
    """Add text (whole lines) to the end of a file; its folder is made if need be."""
    with explained(RunError, f"could not write {path}: "):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)


class JsonlLog(TrainerCallback):
    """Appends every logged dictionary to `output_dir/log.jsonl`, one line each, with its step; NaN is null.

    A resumed run cuts off what the earlier attempt logged after its checkpoint, so that no step is logged twice.
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
            kept.append(json.dumps(finite(entry), ensure_ascii=False) + "\n")
        if kept or self.path.exists():
            write_text(self.path, "".join(kept))

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        entry = json.loads(json.dumps({"step": state.global_step, **logs}, default=float))
        line = json.dumps(finite(entry), ensure_ascii=False) + "\n"
        if self._before is not None:
            self._before.append(line)
        append_text(self.path, line)
