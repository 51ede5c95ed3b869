"""Errors a user can act on: each names what was wrong, the value seen and the value expected.

The command line prints the message without a traceback and exits with status 2.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
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


# ---- What the machine refuses: a disk that is full, a file that cannot be read, memory ----


def fault(error: BaseException, *, named: bool = True) -> str | None:
    """What the machine refused, in words (`named`: with the file); None: the error is about something else."""
    below: BaseException | None = error
    while below is not None:  # libraries raise errors of their own over that of the system
        full = isinstance(below, OSError) and below.errno in (errno.ENOSPC, errno.EDQUOT)
        if full or "No space left on device" in str(below) or "(os error 28)" in str(below):
            return "no space left on the device; free some, and run the same command again"
        below = below.__cause__ or below.__context__
    text = next(iter(str(error).splitlines()), "")
    memory = ("can't allocate memory", "not enough memory", "out of memory", "Storage size calculation overflowed")
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and any(m in str(error) for m in memory)):
        return f"not enough memory ({text or 'MemoryError'}); make the model, the batches or the texts smaller"
    if isinstance(error, RuntimeError) and ("StreamWriter" in text or "inline_container" in text):  # of torch.save
        return "the disk refused what was written; is it full?"
    if isinstance(error, OSError):
        reason = os.strerror(error.errno) if error.errno else text or type(error).__name__
        return f"{error.filename2 or error.filename}: {reason}" if named and error.filename is not None else reason
    found = re.search(r"\(os error (\d+)\)", text)  # of libraries in Rust
    return os.strerror(int(found[1])) if found else None


@contextmanager
def explained(kind: type[TokengrainError] = RunError, what: str = "") -> Iterator[None]:
    """Turns what the machine refuses within into an error of that kind, which begins with `what`."""
    try:
        yield
    except TokengrainError:
        raise
    except Exception as error:
        if (reason := fault(error, named=not what)) is None:
            raise
        raise kind(f"{what}{reason}") from error


@contextmanager
def foreign(what: str, kind: type[TokengrainError] = RunError, then: str = "") -> Iterator[None]:
    """Around reading what others may have written: what damage makes of our code and of libraries is one error."""
    try:
        yield
    except TokengrainError:
        raise
    except Exception as error:  # EOFError, UnpicklingError, KeyError, ...: damage has many kinds
        reason = fault(error) or f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        raise kind(f"{what}{reason}{then}") from error


# ---- Reading files: whole, and only those that end ----

_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}


def regular_file(path: str | os.PathLike[str], kind: type[TokengrainError] = RunError) -> Path:
    """The path of a file. Raises an error of that kind for anything else: pipes and devices may have no end."""
    with explained(kind):
        mode = os.stat(path).st_mode
    found = _KINDS.get(stat.S_IFMT(mode), "a device")
    require(stat.S_ISREG(mode), kind, f"{path} is {found}; expected a file")
    return Path(path)


def read_text(path: str | os.PathLike[str], kind: type[TokengrainError] = RunError) -> str:
    """A file's text (UTF-8). Raises an error of that kind, which names the file, if it has none."""
    try:
        with explained(kind):
            return regular_file(path, kind).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise kind(f"{path} is damaged: not a text file in UTF-8 ({error})") from error


def read_json(path: str | os.PathLike[str], kind: type[TokengrainError] = RunError) -> Any:
    """A file's JSON. Raises an error of that kind, which names the file, if it has none."""
    text = read_text(path, kind)
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is damaged: {problem(error)}") from error


def problem(error: Exception) -> str:
    """What is wrong with JSON or YAML in words; a file whose brackets nest too deeply ends Python's own recursion."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return str(getattr(error, "problem", None) or error)


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises `ValueError` for a key that is given twice, of which json would take the last."""
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"key {next(name for name, count in counts.items() if count > 1)!r} is given twice")
    return made


def some(names: Sequence[str], most: int = 5) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def no_constant(name: str) -> float:
    """Raises `ArithmeticError` for NaN and Infinity, which JSON lacks and Python takes."""
    raise ArithmeticError(f"{name} is no number")


def read_log(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The objects of a log with one per line; one that a kill cut off is left out, no file is an empty log."""
    entries = []
    # As bytes: a cut may go through a character, and JSON leaves other ends of lines, such as U+2028, as they are.
    with explained():
        lines = regular_file(path).read_bytes().split(b"\n") if Path(path).exists() else []
    for line in lines:
        with suppress(ValueError, RecursionError):
            entries.append(json.loads(line))
    return [entry for entry in entries if isinstance(entry, dict)]


# ---- Writing files so that a half-written one never passes for a whole one, and fingerprints of content ----

_TEMPORARY = re.compile(r"\..*\.\d+\.\d+\.tmp(\.[^.]*)?", re.DOTALL)


@contextmanager
def atomic_write(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it to disk and rename it to `path`.

    On any error (a full disk, Ctrl-C) the temporary file is removed and `path` is as it was. Raises `RunError` for what
    the machine refuses.
    """
    path = Path(path)
    # The suffix stays last: writers such as pyarrow and pandas go by it. Threads may write one path at a time each.
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.{get_ident()}.tmp{path.suffix}")
    with explained(RunError, f"{path} could not be written: "):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def is_temporary(path: Path) -> bool:
    """Whether a file is what `atomic_write` leaves if its process is killed."""
    return _TEMPORARY.fullmatch(path.name) is not None


def remove_temporaries(folder: Path) -> None:
    """Remove what killed processes left of `atomic_write` in a folder and below; nobody else may be writing there."""
    for path in folder.rglob(".*.tmp*"):
        if is_temporary(path):
            path.unlink(missing_ok=True)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` (UTF-8) atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(text, "utf-8", "backslashreplace")  # halves of surrogate pairs, as JSON writes them


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as `json_text`, atomically."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """`value` as indented JSON; a number that is not finite, which JSON lacks, as null."""
    return json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """A value of JSON with null in place of numbers that are not finite."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return [finite(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def check_output(target: Path, source: Any, overwrite: bool) -> Path:
    """`target`, which may be written: it is not the input, and exists only if it may be replaced.

    `source` is the path of a file, or what is none. Raises `RecipeError`, `RunError`.
    """
    named = isinstance(source, (str, os.PathLike)) and os.fspath(source)
    same = named and target.exists() and os.path.exists(source) and target.samefile(source)
    require(not same, RecipeError, f"output {str(target)!r} is the input")
    require(overwrite or not target.exists(), RunError, f"{target} exists; give another output, or overwrite it")
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def json_line(value: Any, default: Any = str) -> str:
    """`value` as a line of JSON; halves of surrogate pairs, which UTF-8 cannot hold, as JSON writes them."""
    text = json.dumps(value, ensure_ascii=False, default=default) + "\n"
    return text.encode(errors="backslashreplace").decode()


def fingerprint(value: Any) -> str:
    """16 hex digits that identify a JSON-like value, images and arrays in it too; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=_identified)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:16]


def _identified(value: Any) -> Any:
    """Values that JSON lacks: of images (PIL) and arrays the content, of others their text."""
    if not (hasattr(value, "tobytes") and (hasattr(value, "getbands") or getattr(value, "shape", None))):
        return str(value)
    kind = [str(getattr(value, name, "")) for name in ("mode", "size", "dtype", "shape")]
    return [*kind, hashlib.sha256(value.tobytes()).hexdigest()]


def file_fingerprint(*paths: str | os.PathLike[str]) -> str:
    """16 hex digits that identify the content of files (not their names or times)."""
    digest = hashlib.sha256()
    for path in paths:
        with explained(), open(regular_file(path), "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        digest.update(b"\0")
    return digest.hexdigest()[:16]
