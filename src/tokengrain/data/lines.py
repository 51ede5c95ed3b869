"""Files of text as bytes and numbered lines, gunzipped; damage is a `DataError` that says where it is."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedIOBase
from pathlib import Path
from typing import Any, NamedTuple

from tokengrain.errors import DataError


class Record(NamedTuple):
    """One row: its fields, the file it came from, its number in that file (from 0), its line (from 1)."""

    fields: Any
    file: str
    row: int
    line: int | None = None


def row_label(row: int, line: int | None) -> str:
    return str(row) if line is None else f"{row} (line {line})"


@contextmanager
def opened(path: Path) -> Iterator[BufferedIOBase]:
    """The file's bytes, gunzipped if its name ends in .gz; damage becomes a `DataError`."""
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rb") as stream:
                yield stream
        else:
            with open(path, "rb") as stream:
                yield stream
    except EOFError as error:
        raise DataError(
            "gzip file is truncated", file=path, value=str(error), expected="a complete gzip file"
        ) from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError("gzip file is damaged", file=path, value=str(error), expected="a complete gzip file") from error
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror or error}", file=path) from error


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text with its line end)."""
    with opened(path) as stream:
        position = 0
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise utf8_error(path, error, position, number) from error
            position += len(line)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def utf8_error(path: Path, error: UnicodeDecodeError, position: int, line: int) -> DataError:
    return DataError(
        f"broken UTF-8 at byte {position + error.start} (line {line}): {error.reason}",
        file=path,
        value=error.object[max(0, error.start - 12) : error.end + 12],
        expected="text encoded as UTF-8",
    )
