"""Files of rows, read one row at a time: JSON lines, JSON arrays, CSV, parquet, each also gzipped.

Every reader is a generator of `Record`s that holds one row, line or batch in memory, never the file.
Damage is a `DataError` that says where in the file it is.
"""

from __future__ import annotations

import csv
import gzip
import json
import shutil
import sys
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from tokengrain.errors import DataError

CHUNK = 1 << 20
# A JSON error nearer than this to the end of what was read may only mean that more must be read.
TAIL = 64


class Record(NamedTuple):
    """One row: its fields, the file it came from, its number in that file (from 0), its line (from 1)."""

    fields: Any
    file: str
    row: int
    line: int | None = None


def row_label(row: int, line: int | None) -> str:
    return str(row) if line is None else f"{row} (line {line})"


def file_kind(path: Path) -> str | None:
    """The format by suffix ("jsonl", "json", "csv", "parquet"), `.gz` aside; None if it is another."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    return {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json", ".csv": "csv", ".parquet": "parquet"}.get(
        suffixes[-1] if suffixes else ""
    )


def read_file(path: Path) -> Iterator[Record]:
    """The rows of one file."""
    kind = file_kind(path)
    if kind is None:
        raise DataError(
            "is not of a known format",
            file=path,
            value="".join(path.suffixes),
            expected=".jsonl, .json, .csv or .parquet (each also with .gz)",
        )
    reader: Callable[[Path], Iterator[Record]] = {
        "jsonl": _read_jsonl,
        "json": _read_json,
        "csv": _read_csv,
        "parquet": _read_parquet,
    }[kind]
    return reader(path)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's bytes, gunzipped if its name ends in .gz; damage becomes a `DataError`."""
    try:
        if path.suffix.lower() == ".gz":
            with gzip.open(path, "rb") as stream:
                yield stream  # type: ignore[misc]  # it reads as IO[bytes] does
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


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text with its line end)."""
    with _opened(path) as stream:
        position = 0
        for number, line in enumerate(stream, start=1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise _utf8_error(path, error, position, number) from error
            position += len(line)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _utf8_error(path: Path, error: UnicodeDecodeError, position: int, line: int) -> DataError:
    return DataError(
        f"broken UTF-8 at byte {position + error.start} (line {line}): {error.reason}",
        file=path,
        value=error.object[max(0, error.start - 12) : error.end + 12],
        expected="text encoded as UTF-8",
    )


def _json_error(path: Path, row: int, line: int, column: int, text: str, position: int, why: str) -> DataError:
    return DataError(
        f"malformed JSON at line {line}, column {column}: {why}",
        file=path,
        row=row,
        value=text[max(0, position - 30) : position + 30],
        expected="one JSON object per row",
    )


def _read_jsonl(path: Path) -> Iterator[Record]:
    row = 0
    for number, text in _lines(path):
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise _json_error(path, row, number, error.pos + 1, text, error.pos, error.msg) from error
        except RecursionError as error:
            raise _json_error(path, row, number, 1, text, 0, "nested too deeply") from error
        yield Record(fields, str(path), row, number)
        row += 1


def _read_json(path: Path) -> Iterator[Record]:
    """A JSON array of rows, or JSON lines under the name `.json` (as many tools write them)."""
    with _opened(path) as stream:
        first = b""
        while not first.strip(b"\xef\xbb\xbf \t\r\n") and (block := stream.read(CHUNK)):
            first = block
        if first.strip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            stream.seek(0)
            yield from _array_rows(path, stream)
            return
    yield from _read_jsonl(path)


class _Text:
    """A window on the text of a file: what was read and not yet consumed, and where that is."""

    def __init__(self, path: Path, stream: IO[bytes]) -> None:
        self.path, self.stream = path, stream
        self.text, self.position = "", 0
        # Lines are counted up to `_counted`; `_line_start` is where the line it lies in begins.
        self._line, self._line_start, self._counted = 1, 0, 0
        self._bytes, self._rest = 0, b""

    def more(self) -> bool:
        """Read as much again as is left (at least a chunk); False, and no change, at the end of the file."""
        block = self.stream.read(max(CHUNK, len(self.text) - self.position))
        data = self._rest + block
        if not data:
            return False
        try:
            new, self._rest = data.decode("utf-8"), b""
        except UnicodeDecodeError as error:
            if not block or len(data) - error.start > 3:  # else: a character cut by the end of the block
                line = self.where(len(self.text))[0] + data[: error.start].count(b"\n")
                raise _utf8_error(self.path, error, self._bytes, line) from error
            new, self._rest = data[: error.start].decode("utf-8"), data[error.start :]
        if not self._bytes:
            new = new.removeprefix("\ufeff")
        self._bytes += len(data) - len(self._rest)
        self.where(self.position, keep=True)
        self.text = self.text[self.position :] + new
        self._line_start -= self.position
        self.position = self._counted = 0
        return True

    def where(self, position: int, keep: bool = False) -> tuple[int, int]:
        """(line, column), both from 1, of a position in `text`, not before the last one to `keep`."""
        line = self._line + self.text.count("\n", self._counted, position)
        newline = self.text.rfind("\n", self._counted, position)
        start = newline + 1 if newline >= 0 else self._line_start
        if keep:
            self._line, self._line_start, self._counted = line, start, position
        return line, position - start + 1

    def peek(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.more():
                return ""

    def error(self, row: int, position: int, why: str) -> DataError:
        return _json_error(self.path, row, *self.where(position), self.text, position, why)


def _array_rows(path: Path, stream: IO[bytes]) -> Iterator[Record]:
    decode = json.JSONDecoder().raw_decode
    source = _Text(path, stream)
    source.peek()
    source.position += 1  # the opening bracket
    row = 0
    if source.peek() == "]":
        return
    while True:
        if not source.peek():
            raise source.error(row, source.position, "the array is not closed")
        try:
            fields, end = decode(source.text, source.position)
        except json.JSONDecodeError as error:
            unfinished = error.msg.startswith("Unterminated") or error.pos > len(source.text) - TAIL
            if unfinished and source.more():
                continue
            raise source.error(row, error.pos, error.msg) from error
        except RecursionError as error:
            raise source.error(row, source.position, "nested too deeply") from error
        line, _ = source.where(source.position, keep=True)
        source.position = end
        yield Record(fields, str(path), row, line)
        row += 1
        separator = source.peek()
        if separator not in (",", "]"):
            why = f"expected ',' or ']' behind a row, got {separator!r}" if separator else "the array is not closed"
            raise source.error(row, source.position, why)
        source.position += 1
        if separator == "]":
            if source.peek():
                raise source.error(row, source.position, "text behind the end of the array")
            return


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # the default refuses fields beyond 128 KiB
    reader = csv.reader((text for _, text in _lines(path)), strict=True)
    row = -1
    try:
        header = next(reader, None)
        if header is None:
            return
        repeated = [name for name in header if header.count(name) > 1]
        if repeated:
            raise DataError("column name is repeated in the header", file=path, value=repeated[0])
        for values in reader:
            if not values:  # a blank line
                continue
            row += 1
            if len(values) != len(header):
                raise DataError(
                    "row has another number of fields than the header",
                    file=path,
                    row=row_label(row, reader.line_num),
                    value=len(values),
                    expected=f"{len(header)} ({', '.join(header)})",
                )
            yield Record(dict(zip(header, values)), str(path), row)
    except csv.Error as error:
        label = row_label(row + 1, reader.line_num)
        raise DataError(f"malformed CSV: {error}", file=path, row=label, expected="comma-separated values") from error


def _read_parquet(path: Path) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with _opened(path) as stream, tempfile.TemporaryFile() as unzipped:
        if path.suffix.lower() == ".gz":  # parquet is read from its end, which a gzip stream cannot do
            shutil.copyfileobj(stream, unzipped)
            unzipped.seek(0)
            stream = unzipped
        try:
            row = 0
            for batch in pq.ParquetFile(stream).iter_batches(batch_size=1024):
                columns = {name: batch.column(i) for i, name in enumerate(batch.schema.names)}
                for index, fields in enumerate(_parquet_rows(path, columns, row, batch.num_rows)):
                    yield Record(fields, str(path), row + index)
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"damaged parquet file: {error}", file=path, expected="a complete parquet file") from error


def _parquet_rows(path: Path, columns: dict[str, Any], start: int, count: int) -> list[dict[str, Any]]:
    values = {}
    for name, column in columns.items():
        try:
            values[name] = column.to_pylist()
        except UnicodeDecodeError:
            values[name] = [_parquet_value(path, name, start + i, column[i]) for i in range(count)]
    return [{name: column[i] for name, column in values.items()} for i in range(count)]


def _parquet_value(path: Path, field: str, row: int, value: Any) -> Any:
    try:
        return value.as_py()
    except UnicodeDecodeError as error:
        raise DataError(
            f"broken UTF-8 at byte {error.start} of the text: {error.reason}",
            file=path,
            row=row,
            field=field,
            value=error.object[max(0, error.start - 12) : error.end + 12],
            expected="text encoded as UTF-8",
        ) from error
