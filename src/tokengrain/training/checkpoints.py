"""Checkpoints that are whole or not there: written to a staging folder, synced, renamed.

`transformers.Trainer` writes a checkpoint file by file into its final folder, and takes the folder with the
largest number for the latest. A process killed in between leaves a folder that looks like a checkpoint and is
not. Here `checkpoint-K` appears by one rename, after everything in it is on disk.
"""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokengrain.errors import RunError
from tokengrain.files import read_json, write_json

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
