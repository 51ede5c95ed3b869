"""The cache of the worlds' base models: each is trained once per machine and written atomically."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokengrain.files import write_json
from tokengrain.worlds.threads import single_thread

Progress = Callable[[int, float], None]
"""Called after every step with (steps done, cross-entropy in nats per token)."""


def cache_folder() -> Path:
    """`$TOKENGRAIN_CACHE`, or `~/.cache/tokengrain`."""
    return Path(os.environ.get("TOKENGRAIN_CACHE") or Path.home() / ".cache" / "tokengrain").expanduser()


def model_folder(name: str, key: str) -> Path:
    """Where the base model of a world with these settings is or will be."""
    return cache_folder() / "worlds" / f"{name}-{key}"


def ensure_model(
    folder: Path, train: Callable[[Progress], tuple[Any, dict[str, Any]]], tokenizer: Any, title: str, steps: int
) -> Path:
    """Folder with a base model, its tokenizer and `pretraining.json`; trains it, on one thread, if it is not there.

    Several processes may ask at once: one trains, the others wait. A training that is interrupted leaves nothing.

    Args:
        folder: of `model_folder`.
        train: gives the model and a report; called only if the folder is missing.
        title, steps: for the progress bar.
    """
    from filelock import FileLock

    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _train_into(folder, train, tokenizer, title, steps)
    return folder


def _train_into(
    folder: Path, train: Callable[[Progress], tuple[Any, dict[str, Any]]], tokenizer: Any, title: str, steps: int
) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as ProgressBar

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with single_thread(), ProgressBar(*columns, console=Console(file=sys.stderr)) as bar:
        task = bar.add_task(f"base model of {title} (once per machine)", total=steps)
        model, report = train(lambda step, _: bar.update(task, completed=step))
    # Only now, so that a kill in the minutes before leaves nothing.
    temporary = Path(tempfile.mkdtemp(prefix=".training-", dir=folder.parent))
    try:
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        write_json(temporary / "pretraining.json", report)
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
