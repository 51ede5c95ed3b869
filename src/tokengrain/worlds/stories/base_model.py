"""The base model's cache: trained once per machine, written atomically, keyed by grammar and settings."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tokengrain.files import fingerprint, write_json
from tokengrain.worlds.stories.grammar import Grammar
from tokengrain.worlds.stories.pretraining import Pretraining, pretrain
from tokengrain.worlds.stories.tokenizer import build_tokenizer
from tokengrain.worlds.threads import single_thread

FORMAT = 2
"""Raised when training changes in a way that its settings do not show: cached models are trained anew."""
SETTINGS = {
    "full": Pretraining(),
    "small": Pretraining(hidden_size=48, layers=2, mlp_size=96, steps=300, pool=2000),
    "one-sentence": Pretraining(hidden_size=32, layers=2, mlp_size=64, steps=250, pool=1000),
    "one-phrase": Pretraining(hidden_size=32, layers=2, mlp_size=64, steps=250, pool=1000),
}


def cache_folder() -> Path:
    """`$TOKENGRAIN_CACHE`, or `~/.cache/tokengrain`."""
    return Path(os.environ.get("TOKENGRAIN_CACHE") or Path.home() / ".cache" / "tokengrain").expanduser()


def base_model_folder(grammar: Grammar, settings: Pretraining) -> Path:
    """Where the base model of these settings is or will be."""
    key = fingerprint([FORMAT, grammar.fingerprint, asdict(settings)])
    return cache_folder() / "worlds" / f"stories-{grammar.size.name}-{key}"


def ensure_base_model(grammar: Grammar, settings: Pretraining | None = None) -> Path:
    """Folder with the base model, its tokenizer and `pretraining.json`; trains it if it is not there.

    Several processes may ask at once: one trains, the others wait. A training that is interrupted leaves
        nothing.
    """
    from filelock import FileLock

    settings = settings or SETTINGS[grammar.size.name]
    folder = base_model_folder(grammar, settings)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if not folder.is_dir():
            _train_into(folder, grammar, settings)
    return folder


def _train_into(folder: Path, grammar: Grammar, settings: Pretraining) -> None:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    temporary = Path(tempfile.mkdtemp(prefix=".training-", dir=folder.parent))
    try:
        with single_thread(), Progress(*columns, console=Console(file=sys.stderr)) as bar:
            task = bar.add_task("base model of world://stories (once per machine)", total=settings.steps)
            model, report = pretrain(grammar, settings, lambda step, _: bar.update(task, completed=step))
        model.save_pretrained(temporary)
        build_tokenizer(grammar).save_pretrained(temporary)
        write_json(temporary / "pretraining.json", {**asdict(settings), **report})
        for path in temporary.iterdir():
            with open(path, "rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        os.replace(temporary, folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
