"""Errors a user can act on: each names what was wrong, the value seen and the value expected.

The command line prints the message without a traceback and exits with status 2.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import get_ident
from typing import Any

MAX_SHOWN = 120


def shown(value: Any) -> str:
    """`value` as a short repr, for use in messages."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


class TokengrainError(Exception):
    """Base class of every error raised on purpose."""


class DataError(TokengrainError):
    """Bad input data. The message reads `file: row N: field 'f': <what>; got <value>; expected <expected>`.

    Rows are counted from 0; `file` may be a hub name or another description of where they come from.
    """

    def __init__(
        self,
        what: str,
        *,
        file: object = None,
        row: object = None,
        field: str | None = None,
        value: Any = ...,
        expected: str | None = None,
    ) -> None:
        self.what, self.file, self.row, self.field, self.value, self.expected = what, file, row, field, value, expected
        where = [str(file)] if file is not None else []
        where += [f"row {row}"] if row is not None else []
        where += [f"field {field!r}"] if field is not None else []
        got = f"; got {shown(value)}" if value is not ... else ""
        super().__init__(": ".join([*where, what]) + got + (f"; expected {expected}" if expected is not None else ""))


class RecipeError(TokengrainError):
    """A recipe (or an override of it) that cannot be run: unknown key, wrong type, impossible combination."""


class ModelError(TokengrainError):
    """A model, adapter or tokenizer that does not fit: vocabulary, positions, template, architecture."""


class RunError(TokengrainError):
    """A run folder that is not what it should be: another run's, interrupted, incomplete, or no run at all."""


class NonFiniteLossError(TokengrainError):
    """The loss became NaN or infinite; training stopped and the rows of the batch were saved."""


class RolloutError(TokengrainError):
    """Completions that could not be sampled: a server that fails, an unfit model, an answer that is no answer."""


def require(condition: object, error: type[Exception], message: str, **details: Any) -> None:
    """Raise `error(message, **details)` unless the condition holds. Not for hot loops: the message is always built."""
    if not condition:
        raise error(message, **details)


# ---- Writing files so that a half-written one never passes for a whole one, and fingerprints of content ----


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it to disk and rename it to `path`.

    On any error (a full disk, Ctrl-C) the temporary file is removed and `path` is as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers such as pyarrow and pandas go by it. Threads may write one path at a time each.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{get_ident()}.tmp{path.suffix}")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    return json.loads(Path(path).read_text(encoding="utf-8"))


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a log with one per line; one that a kill cut off is left out, no file is an empty log."""
    entries = []
    # As bytes: a cut may go through a character, and JSON leaves other ends of lines, such as U+2028, as they are.
    for line in Path(path).read_bytes().split(b"\n") if Path(path).exists() else ():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return [entry for entry in entries if isinstance(entry, dict)]


def fingerprint(value: Any) -> str:
    """16 hex digits that identify a JSON-like value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def file_fingerprint(*paths: str | os.PathLike[str]) -> str:
    """16 hex digits that identify the content of files (not their names or times)."""
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digest.update(b"\0")
    return digest.hexdigest()[:16]
