"""Rows: mappings from column to value, numbered from 0, and where each came from, for messages."""

from __future__ import annotations

import copy
import csv
import difflib
import glob
import gzip
import hashlib
import json
import math
import random
import re
import shutil
import sys
import tempfile
import zlib
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from io import BufferedIOBase, TextIOWrapper
from os import PathLike
from pathlib import Path
from string import Formatter
from typing import Any, Literal, NamedTuple, TypeVar, overload

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

from tokengrain.data.config import RowError
from tokengrain.errors import (
    DataError,
    RecipeError,
    explained,
    file_fingerprint,
    fingerprint,
    no_constant,
    once,
    problem,
    read_text,
    regular_file,
    require,
    shown,
)
from tokengrain.settings import parse_yaml

R = TypeVar("R", bound="Rows")
HUB_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
CHUNK = 1 << 20  # bytes
MOST_ROWS = 100_000_000  # that weights may make of a source
TAIL = 64  # a JSON error nearer than this to the end of what was read may only mean that more must be read

# Files of rows, read one row at a time: JSON lines, JSON arrays, CSV, parquet, time series, each also gzipped. Every
# reader is a generator of `Record`s that holds one row, line or batch in memory, never the file. Damage is a
# `DataError` that says where in the file it is.


class Record(NamedTuple):
    """One row of a file."""

    fields: Any
    file: str
    row: int  # its number in the file, from 0
    line: int | None = None  # from 1


def row_label(row: int, line: int | None) -> str:
    return str(row) if line is None else f"{row} (line {line})"


@contextmanager
def opened(path: Path) -> Iterator[BufferedIOBase]:
    """The file's bytes, gunzipped if its name ends in .gz; damage becomes a `DataError`."""
    opener: Any = gzip.open if path.suffix.lower() == ".gz" else open
    regular_file(path, DataError)
    try:
        with opener(path, "rb") as stream:
            yield stream
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        what = f"gzip file is {'truncated' if isinstance(error, EOFError) else 'damaged'}"
        raise DataError(what, file=path, value=str(error), expected="a complete gzip file") from error
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
                raise _utf8_error(f"at byte {position + error.start} (line {number})", error, file=path) from error
            position += len(line)
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _utf8_error(where: str, error: UnicodeDecodeError, **details: Any) -> DataError:
    around = error.object[max(0, error.start - 12) : error.end + 12]
    return DataError(f"broken UTF-8 {where}: {error.reason}", value=around, expected="text encoded as UTF-8", **details)


def read_jsonl(path: Path) -> Iterator[Record]:
    """A row per line; blank lines are passed over."""
    filled = ((number, text) for number, text in lines(path) if text.strip())
    for row, (number, text) in enumerate(filled):
        try:
            fields, end = _decoded(text, len(text) - len(text.lstrip()))
            if text[end:].strip():
                raise json.JSONDecodeError("Extra data", text, end)
        except (RecursionError, ValueError) as error:
            at = getattr(error, "pos", 0)
            raise _json_error(path, row, number, at + 1, text, at, _why(error)) from error
        yield Record(fields, str(path), row, number)


def read_json(path: Path) -> Iterator[Record]:
    """A JSON array of rows, or JSON lines under the name `.json` (as many tools write them)."""
    with opened(path) as stream:
        first = b""
        while not first.strip(b"\xef\xbb\xbf \t\r\n") and (block := stream.read(CHUNK)):
            first = block
        if first.strip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            stream.seek(0)
            window = _Window(stream)
            try:
                yield from _array_rows(path, window)
            except UnicodeDecodeError:
                for _ in lines(path):
                    pass  # raises the error that says where
            finally:
                window.stream.detach()  # the file below is closed by whoever opened it
            return
    yield from read_jsonl(path)


class _Window:
    """A window on the text of a file: what was read and not yet consumed."""

    def __init__(self, stream: Any) -> None:
        self.stream = TextIOWrapper(stream, "utf-8-sig", newline="")
        self.text, self.position = "", 0
        # Lines are counted up to `_counted`; `_line_start` is where the line it lies in begins.
        self._line, self._line_start, self._counted = 1, 0, 0

    def more(self) -> bool:
        """Read as much again as is left (at least a chunk); False, and no change, at the end of the file."""
        new = self.stream.read(max(CHUNK, len(self.text) - self.position))
        if not new:
            return False
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
            while self.text[self.position : self.position + 1] in (" ", "\t", "\r", "\n"):
                self.position += 1
            if self.position < len(self.text) or not self.more():
                return self.text[self.position : self.position + 1]


def _array_rows(path: Path, source: _Window) -> Iterator[Record]:
    def need(condition: object, position: int, why: str) -> None:
        if not condition:
            raise _json_error(path, row, *source.where(position), source.text, position, why)

    row = 0
    source.peek()
    source.position += 1  # the opening bracket
    separator = source.peek()
    source.position += separator == "]"
    while separator != "]":
        need(source.peek(), source.position, "the array is not closed")
        try:
            fields, end = _decoded(source.text, source.position)
        except (RecursionError, ValueError) as error:
            at = getattr(error, "pos", None)
            unfinished = at is not None and (_why(error).startswith("Unterminated") or at > len(source.text) - TAIL)
            if unfinished and source.more():
                continue
            need(False, source.position if at is None else at, _why(error))
        line, _ = source.where(source.position, keep=True)
        source.position = end
        yield Record(fields, str(path), row, line)
        row += 1
        separator = source.peek()
        why = f"expected ',' or ']' behind a row, got {separator!r}" if separator else "the array is not closed"
        need(separator and separator in ",]", source.position, why)
        source.position += 1
    need(not source.peek(), source.position, "text behind the end of the array")


_STRICT = json.JSONDecoder(object_pairs_hook=once, parse_constant=no_constant)
_HUGE = re.compile(r"\d[eE]\+?\d{3}")


def _decoded(text: str, start: int) -> tuple[Any, int]:
    """The JSON value that begins there, and its end. Raises `ValueError`, also for repeated keys, NaN and infinity."""
    try:
        fields, end = _STRICT.raw_decode(text, start)
        suspicious = _HUGE.search(text, start, end) is not None
    except ArithmeticError:
        fields, end = json.JSONDecoder().raw_decode(text, start)
        suspicious = True
    for place, value in _numbers(fields) if suspicious else ():
        if not math.isfinite(value):
            raise ValueError(f"field {place} is {value}, which is no number")
    return fields, end


def _numbers(value: Any, place: str = "") -> Iterator[tuple[str, float]]:
    """Every number with a point in a JSON value, and where it stands."""
    if isinstance(value, float):
        yield place, value
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in inside:
        yield from _numbers(part, f"{place}[{key!r}]" if place else repr(key))


def _why(error: Exception) -> str:
    """What is wrong with JSON, without its own position."""
    return getattr(error, "msg", problem(error))


def _json_error(path: Path, row: int, line: int, column: int, text: str, position: int, why: str) -> DataError:
    what, around = f"malformed JSON at line {line}, column {column}: {why}", text[max(0, position - 30) : position + 30]
    return DataError(what, file=path, row=row, value=around, expected="one JSON object per row")


def read_file(path: Path) -> Iterator[Record]:
    readers = {"jsonl": read_jsonl, "json": read_json, "csv": _read_csv, "parquet": _read_parquet, "ts": read_series}
    kind, expected = file_kind(path), ".jsonl, .json, .csv, .parquet or .ts (each also with .gz)"
    if kind is None:
        raise DataError("is not of a known format", file=path, value="".join(path.suffixes), expected=expected)
    return readers[kind](path)


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # the default refuses fields beyond 128 KiB
    reader = csv.reader((text for _, text in lines(path)), strict=True)
    row = -1
    try:
        header = next(reader, None)
        if header is None:
            return
        _check_names(path, header)
        for values in reader:
            if not values:  # a blank line
                continue
            row += 1
            if len(values) != len(header):
                what, where = "row has another number of fields than the header", row_label(row, reader.line_num)
                expected = f"{len(header)} ({', '.join(header)})"
                raise DataError(what, file=path, row=where, value=len(values), expected=expected)
            yield Record(dict(zip(header, values)), str(path), row)
    except csv.Error as error:
        label = row_label(row + 1, reader.line_num)
        raise DataError(f"malformed CSV: {error}", file=path, row=label, expected="comma-separated values") from error


def _check_names(path: Path, names: Sequence[str]) -> None:
    repeated = [name for name, count in Counter(names).items() if count > 1]
    require(not repeated, DataError, "column name is repeated in the header", file=path, value="".join(repeated[:1]))


def read_series(path: Path) -> Iterator[Record]:
    """Time series with classes, `v1,v2,...:label` below `@data`: rows with `series`, lists of numbers, and `label`.

    Classes are taken from the rows, as headers are not always right about them. A row of several channels has a list
    for each, with colons between.
    """
    row, data = 0, False
    for number, line in lines(path):
        text = line.strip()
        if not text or text.startswith(("#", "@")):
            data = data or text.lower() == "@data"
            continue
        where = {"file": path, "row": row_label(row, number)}
        require(data, DataError, "values stand before @data", value=text[:30], expected="a .ts file", **where)
        *channels, label = text.split(":")
        what = "has no label"
        require(channels and label, DataError, what, value=text[-30:], expected="v1,v2,...:label", **where)
        try:
            series = [[float(value) for value in channel.split(",")] for channel in channels]
        except ValueError as error:
            raise DataError(f"holds what is no number: {error}", field="series", expected="v1,v2", **where) from None
        finite = all(math.isfinite(value) for channel in series for value in channel)
        require(finite, DataError, "holds a number that is not finite", field="series", expected="numbers", **where)
        yield Record({"series": series, "label": label}, str(path), row, number)
        row += 1


def _read_parquet(path: Path) -> Iterator[Record]:
    with opened(path) as stream, tempfile.TemporaryFile() as unzipped:
        if path.suffix.lower() == ".gz":  # parquet is read from its end, which a gzip stream cannot do
            shutil.copyfileobj(stream, unzipped)
            unzipped.seek(0)
            stream = unzipped
        try:
            row = 0
            file = pq.ParquetFile(stream)
            _check_names(path, file.schema_arrow.names)
            for batch in file.iter_batches(batch_size=1024):
                named = zip(batch.schema.names, batch.columns)
                columns = {name: _values(path, name, column, row) for name, column in named}
                for index in range(batch.num_rows):
                    fields = {name: values[index] for name, values in columns.items()}
                    yield Record(fields, str(path), row + index)
                row += batch.num_rows
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"damaged parquet file: {error}", file=path, expected="a complete parquet file") from error


def _values(path: Path, field: str, column: pa.Array, start: int) -> list[Any]:
    values: list[Any] = []
    try:
        values.extend(value.as_py() for value in column)
    except UnicodeDecodeError as error:
        where, row = f"at byte {error.start} of the text", start + len(values)
        raise _utf8_error(where, error, file=path, row=row, field=field) from error
    except (ValueError, OverflowError) as error:  # of dates and times that Python lacks
        what, row = f"cannot be read as {column.type}: {error}", start + len(values)
        raise DataError(what, file=path, row=row, field=field) from error
    return values


class Rows:
    """Rows from one source: iterating gives `(row number, fields)`, as often as you like; `name` is for messages."""

    streaming: bool = False  # whether rows are read as they are asked for; there is no `len` then

    def __init__(
        self,
        name: str,
        items: Iterable[Any],
        fingerprint_of: Callable[[], str],
        places: _Places | _Origins | None = None,
    ) -> None:
        self.name, self._items, self._fingerprint_of, self._places = name, items, fingerprint_of, places
        self._columns: tuple[Mapping[str, str] | LlamaFactorySet, ...] = ()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, fields in self._read():
            for columns in self._columns:
                fields = columns.read(fields) if isinstance(columns, LlamaFactorySet) else _changed(fields, columns)
            yield number, fields

    def _read(self) -> Iterator[tuple[int, Any]]:
        number = -1
        for number, fields in enumerate(self._items):
            yield number, fields
        require(number >= 0, DataError, "there are no rows", file=self.name, expected="at least one row")

    def place(self, number: int) -> tuple[str, str]:
        """(file, row and line in that file) of row `number`, as text."""
        return (self.name, str(number)) if self._places is None else self._places.place(number)

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits that identify the content (for local files: their bytes)."""
        return self._fingerprint_of()


class _Places:
    """Remembers where rows came from: one mark wherever the file or the distance of row and line changes."""

    def __init__(self) -> None:
        self._marks: list[tuple[int, Record]] = []

    def note(self, number: int, record: Record) -> None:
        if self._marks:
            at, last = self._marks[-1]
            line = None if last.line is None else last.line + number - at
            if number <= at or (record.file, record.line) == (last.file, line):
                return
        self._marks.append((number, record._replace(fields=None)))

    def place(self, number: int) -> tuple[str, str]:
        index = bisect_right(self._marks, number, key=lambda mark: mark[0]) - 1
        at, record = self._marks[max(index, 0)]
        line = None if record.line is None else record.line + number - at
        return record.file, row_label(record.row + number - at, line)


class StoredRows(Rows):
    """Rows at hand: a sequence, or some numbers of one."""

    _items: Sequence[Any]

    def __init__(self, name: str, items: Sequence[Any], *details: Any) -> None:
        super().__init__(name, items, *details)
        require(len(items), DataError, "there are no rows", file=name, expected="at least one row")
        self._numbers: Sequence[int] = range(len(items))

    def __len__(self) -> int:
        return len(self._numbers)

    def _read(self) -> Iterator[tuple[int, Any]]:
        if isinstance(self._numbers, range):  # all of them: a `datasets.Dataset` is read faster in order
            return enumerate(self._items)
        return ((n, self._items[n]) for n in self._numbers)

    def subset(self, positions: Sequence[int]) -> StoredRows:
        """The rows at these positions; they keep their numbers."""
        numbers = [self._numbers[p] for p in positions]
        part = _copied(self, lambda: fingerprint([self.fingerprint, numbers]))
        part._numbers = numbers
        return part


def _copied(rows: R, fingerprint_of: Callable[[], str]) -> R:
    made = copy.copy(rows)
    made.__dict__.pop("fingerprint", None)
    made._fingerprint_of = fingerprint_of
    return made


def joined(sources: Sequence[tuple[Rows, float]]) -> StoredRows:
    """The rows of several sources, one behind the other.

    The weight of a source is how often its rows come; of a fraction, that share of them is drawn.
    """
    items, origin = [], _Origins()
    for rows, weight in sources:
        stored = list(rows)
        right = not isinstance(weight, bool) and weight > 0 and weight * len(stored) <= MOST_ROWS
        expected = f"a positive number: how often the rows come; {MOST_ROWS:,} in all at most"
        require(right, DataError, "has an unusable weight", file=rows.name, value=weight, expected=expected)
        drawn = random.Random(0).sample(range(len(stored)), round(weight % 1 * len(stored)))
        for at in [*range(len(stored))] * int(weight) + sorted(drawn):
            items.append(stored[at][1])
            origin.append((rows, stored[at][0]))
    name = " + ".join(rows.name for rows, _ in sources)
    return StoredRows(name, items, lambda: fingerprint([[r.fingerprint, w] for r, w in sources]), origin)


class _Origins(list[tuple[Rows, int]]):
    """Of each row of several sources, the source and its number there."""

    def place(self, number: int) -> tuple[str, str]:
        rows, own = self[number]
        return rows.place(own)

    def key(self, number: int) -> tuple[int, int]:
        """What the copies of a row have in common."""
        rows, own = self[number]
        return id(rows), own


class RowStream(Rows):
    """Rows that are read as they are asked for; their number is not known beforehand."""

    streaming = True


class _FileItems:
    """The rows of files, read anew at each iteration; `places` remembers where each came from."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths, self.places = paths, _Places()

    def __iter__(self) -> Iterator[Any]:
        for number, record in enumerate(record for path in self.paths for record in read_file(path)):
            self.places.note(number, record)
            yield record.fields


@overload
def load_rows(source: Any, *, split: str | None = ..., streaming: Literal[True]) -> RowStream: ...
@overload
def load_rows(source: Any, *, split: str | None = ..., streaming: bool = ...) -> Rows: ...
def load_rows(source: Any, *, split: str | None = None, streaming: bool = False) -> Rows:
    """Rows from a source, whatever it is.

    Args:
        source: a path of a .jsonl, .json (an array, or lines), .csv, .parquet or .ts file, each also gzipped, or a
            pattern of such paths (`data/train-*.parquet`); a folder of such files, or one written by
            `datasets.save_to_disk`; a list of mappings; a `datasets.Dataset`, `IterableDataset` or dictionary of them;
            or, where no such path exists, the name of a dataset on the hub. Several: a list of names, or name ->
            weight. A `Rows` is returned as it is.
        split: which split of a folder, dataset dictionary or hub dataset. Default: the only one, or "train".
        streaming: read rows as they are asked for; for sets larger than memory.

    Raises:
        DataError: there is no such source, it is empty, or it is damaged (streaming: once read that far).
    """
    if isinstance(source, Rows):
        return source
    if isinstance(source, (str, PathLike)):
        with explained(DataError):
            return _from_name(source, split, streaming)
    if type(source).__module__.split(".")[0] == "datasets":
        return _from_datasets(source, "dataset", split, streaming)
    weights = source if isinstance(source, Mapping) else {}
    if isinstance(source, Sequence) and all(isinstance(name, (str, PathLike)) for name in source):
        weights = dict.fromkeys(source, 1)
    if weights and all(isinstance(weight, (int, float)) for weight in weights.values()):
        what, expected = "several sources cannot be streamed", "streaming off, or files of one pattern"
        require(not streaming, DataError, what, file=str(list(weights)), expected=expected)
        return joined([(load_rows(name, split=split), weight) for name, weight in weights.items()])
    what, expected = "this is not a source of rows", "a path, a list of mappings, a datasets.Dataset or a hub name"
    if not isinstance(source, Sequence) or isinstance(source, (bytes, bytearray)):
        raise DataError(what, value=type(source).__name__, expected=expected)
    what, expected = "a list of rows has no splits", "split: none"
    require(split is None, DataError, what, file="list of rows", value=split, expected=expected)
    return StoredRows("list of rows", source, lambda: fingerprint(list(source)))


def split_rows(rows: Any, eval_fraction: float, seed: int) -> tuple[StoredRows, StoredRows]:
    """Split rows at random into (training, evaluation); the same for the same number of rows and seed.

    Either side gets at least one row. The rows keep their numbers and, on either side, their order.
    """
    rows = load_rows(rows)
    if not isinstance(rows, StoredRows):
        expected = "a separate evaluation set, or streaming off"
        raise DataError("a streamed set cannot be split", file=rows.name, expected=expected)
    what, expected = "eval_fraction is out of range", "a number between 0 and 1"
    require(0 < eval_fraction < 1, DataError, what, value=eval_fraction, expected=expected)
    # A source with a weight may give a row several times: all of them go to one side, and one is evaluated.
    first, places = dict[Any, int](), rows._places if isinstance(rows._places, _Origins) else None
    same = [first.setdefault(i if places is None else places.key(n), i) for i, n in enumerate(rows._numbers)]
    different = sorted(first.values())
    expected = "at least 2 rows, or eval_fraction 0, which holds none out"
    few = {"file": rows.name, "value": len(different), "expected": expected}
    require(len(different) >= 2, DataError, "too few rows to split", **few)
    count = min(max(round(eval_fraction * len(different)), 1), len(different) - 1)
    held_out = set(random.Random(seed).sample(different, count))
    train = [i for i in range(len(rows)) if same[i] not in held_out]
    return rows.subset(train), rows.subset(sorted(held_out))


def _from_name(source: str | PathLike[str], split: str | None, streaming: bool) -> Rows:
    path, name = Path(source).expanduser(), str(source)
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            return _from_datasets(_loaded(path), name, split, streaming)
        if (known := llama_factory_sets(path)) and (split is None or split in known):
            return known[choose_split(list(known), split, name)].rows(path, streaming)
        paths = files_of(path, split)
    elif path.exists():
        what, expected = "a single file has no splits", "split: none"
        require(split in (None, "train"), DataError, what, file=name, value=split, expected=expected)
        paths = [path]
    elif set(name) & set("*?["):
        matches = sorted(p for p in map(Path, glob.glob(str(path), recursive=True)) if p.is_file())
        what, expected = "no file matches the pattern", "a pattern that matches files of rows"
        require(matches, DataError, what, file=path, expected=expected)
        paths = _once(matches if split is None else _of_split(matches, split, path))
    elif isinstance(source, str) and file_kind(path) is None and HUB_NAME.fullmatch(source):
        return _from_hub(source, split, streaming)
    else:
        siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1, cutoff=0.7)
        expected = f"perhaps {str(path.with_name(near[0]))!r}" if near else "the path of a file of rows"
        raise DataError("there is no such file or folder", file=name, expected=expected)
    return _from_files(paths, name, streaming)


def _from_files(paths: Sequence[Path], name: str, streaming: bool) -> Rows:
    items = _FileItems(paths)
    rows = RowStream(name, items, lambda: file_fingerprint(*paths), items.places)
    return rows if streaming else StoredRows(name, [f for _, f in rows], rows._fingerprint_of, items.places)


def _loaded(path: Path) -> Any:
    try:
        return datasets.load_from_disk(str(path))
    except Exception as error:  # of many kinds, all with a message for the user
        what = f"is not what datasets' save_to_disk writes ({type(error).__name__}: {error})"
        raise DataError(what, file=path, expected="a complete folder of it, or a folder of files of rows") from error


def _from_hub(name: str, split: str | None, streaming: bool) -> Rows:
    try:
        loaded = datasets.load_dataset(name, split=split, streaming=streaming)
    except Exception as error:  # the hub client raises many kinds, all with a message for the user
        why = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
        what = f"is neither a local file or folder nor a dataset that the hub gave ({why})"
        expected = "an existing path, or a hub dataset that is cached or reachable"
        raise DataError(what, file=name, expected=expected) from error
    return _from_datasets(loaded, name, None, streaming)


def _from_datasets(source: Any, name: str, split: str | None, streaming: bool) -> Rows:
    """Rows of a `datasets` object; `name` describes it."""
    if isinstance(source, Mapping):
        chosen = choose_split(list(source), split, name)
        return _from_datasets(source[chosen], name, None, streaming)
    there = split is None or str(getattr(source, "split", None)) == split
    require(there, DataError, "the dataset has no such split", file=name, value=split, expected="split: none")
    if isinstance(source, datasets.IterableDataset):
        # What it will yield is not known without reading all of it.
        return RowStream(name, source, lambda: fingerprint([name, str(source.split), str(source.info.version)]))
    what, kind = "this is not a source of rows", type(source).__name__
    require(isinstance(source, datasets.Dataset), DataError, what, value=kind, expected="a datasets.Dataset")
    features = {name: _undecoded(feature) for name, feature in source.features.items()}
    if features != dict(source.features):
        source = source.cast(datasets.Features(features))

    def fingerprint_of() -> str:
        # Of the rows themselves: `Dataset._fingerprint` differs between processes for some transforms.
        return hashlib.sha256("".join(map(fingerprint, source)).encode()).hexdigest()[:16]

    return (RowStream if streaming else StoredRows)(name, source, fingerprint_of)


def _undecoded(feature: Any) -> Any:
    """A column's type with its pictures as bytes and paths, which are the same in every process."""
    if isinstance(feature, (datasets.Image, datasets.Video)):
        return type(feature)(decode=False)
    if isinstance(feature, datasets.List):
        return datasets.List(_undecoded(feature.feature), length=feature.length)
    return {name: _undecoded(part) for name, part in feature.items()} if isinstance(feature, dict) else feature


def with_columns(rows: R, columns: Mapping[str, str]) -> R:
    """The same rows with columns added or replaced: `question` and `answer` as the formats' `prompt` and `completion`.

    `columns` is name -> the column to copy, or text with `{column}` placeholders to fill in ("Q: {question}\\nA:"). A
    row that lacks a column, or fills a template with null, is given as the `RowError` that says so.
    """
    for name, template in columns.items():
        try:
            slots = [slot for _, slot, _, _ in Formatter().parse(template) if slot is not None]
        except ValueError as error:
            raise RecipeError(f"columns.{name}: {shown(template)} is no template: {error}") from None
        what = f"columns.{name}: {shown(template)} has a slot without a name; expected {{column}}"
        require(all(slots) and not any(slot.isdigit() for slot in slots), RecipeError, what)
    made = _copied(rows, lambda: fingerprint([rows.fingerprint, dict(columns)]))
    made._columns = (*rows._columns, columns)
    return made


class _Filler(Formatter):
    """Fills in a template; null is no text."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise ValueError("a column is null")
        return super().format_field(value, format_spec)


# ----------------------------------------------------------------------------------------------------
# LLaMA-Factory's `dataset_info.json`: which file a set is, and what its columns and roles are called.

ALPACA = {"prompt": "instruction", "query": "input", "response": "output"}
SAME = ("history", "system", "tools", "chosen", "rejected")
TAGS = {"user": "human", "assistant": "gpt", "observation": "observation", "function": "function_call"}


@dataclass(frozen=True)
class LlamaFactorySet:
    """One set of a `dataset_info.json`: its name, and what is said of it."""

    name: str
    about: Mapping[str, Any]

    def rows(self, folder: Path, streaming: bool) -> Rows:
        """Its rows, in columns that are read everywhere. Raises `DataError` for what is not read."""
        for key in ("columns", "tags"):
            value = self.about.get(key) or {}
            what, expected = f"set {self.name!r} of dataset_info.json: {key} is no object of names", "names by ours"
            right = isinstance(value, dict) and all(isinstance(name, str | None) for name in value.values())
            require(right, DataError, what, file=folder, value=value, expected=expected)
        path, columns = folder / self.about["file_name"], self.about.get("columns") or {}
        other = [*(set(columns) - {*ALPACA, *SAME, "messages"}), *(set(self.about) & {"num_samples"})]
        what, expected = f"set {self.name!r} of dataset_info.json has {other}", "text; `data.limit` for fewer rows"
        require(not other, DataError, what, file=folder, expected=expected)
        rows = _from_files(files_of(path, None) if path.is_dir() else [path], str(path), streaming)
        if not columns and not self.about.get("tags"):
            return rows
        made = _copied(rows, lambda: fingerprint([rows.fingerprint, dict(self.about)]))
        made._columns = (*rows._columns, self)
        return made

    def read(self, row: Any) -> Any:
        """A row of the file under the names of its format's defaults; a `RowError` where it lacks a column."""
        if not isinstance(row, Mapping):
            return row
        columns, shared = self.about.get("columns") or {}, self.about.get("formatting") == "sharegpt"
        names = {"messages": "conversations"} if shared else ALPACA
        names = {**names, **{name: name for name in SAME}}
        taken = {key: column for key, column in columns.items() if key in names and column is not None}
        if missing := [column for column in taken.values() if column not in row]:
            where = {"field": missing[0], "expected": f"a column among {list(row)}"}
            return RowError("missing column", "dataset_info.json names a column that is missing", **where)
        kept = {k: v for k, v in row.items() if k not in taken.values()}
        made = {names[key]: row[column] for key, column in taken.items()}
        if shared:
            spoken = {"conversations", "chosen", "rejected"} & made.keys()
            made |= {name: self._messages(made[name]) for name in spoken}
        return {**kept, **made}

    def _messages(self, value: Any) -> Any:
        """Messages under ShareGPT's own names of roles."""
        if isinstance(value, list):
            return [self._messages(one) for one in value]
        tags = self.about.get("tags") or {}
        role, text = tags.get("role_tag", "from"), tags.get("content_tag", "value")
        if not isinstance(value, Mapping) or role not in value:
            return value
        roles = {tags.get(f"{who}_tag", usual): usual for who, usual in {**TAGS, "system": "system"}.items()}
        return {"from": roles.get(value[role], value[role]), "value": value.get(text)}


def llama_factory_sets(folder: Path) -> dict[str, LlamaFactorySet]:
    """The sets of files that a folder's `dataset_info.json` lists, by name; none if it is another tool's."""
    path = folder / "dataset_info.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    listed = found.items() if isinstance(found, dict) else ()
    own = {name: about for name, about in listed if isinstance(about, dict) and isinstance(about.get("file_name"), str)}
    return {name: LlamaFactorySet(name, about) for name, about in own.items()}


def _changed(fields: Any, columns: Mapping[str, str]) -> Any:
    if not isinstance(fields, Mapping):
        return fields  # whoever reads it says what is wrong with it
    made = {}
    for name, template in columns.items():
        try:
            filled = "{" in template or "}" in template
            made[name] = _Filler().vformat(template, (), fields) if filled else fields[template]
        except (LookupError, ValueError, AttributeError, TypeError) as error:
            what = f"cannot make the column ({type(error).__name__}: {error})"
            expected = f"columns with a value among {list(fields)}"
            return RowError("missing column", what, field=name, value=template, expected=expected)
    return {**fields, **made}


# ----------------------------------------------------------------------------------------------------
# Which files of a folder are meant, by split: as `datasets` reads folders, but what is ambiguous is an error.

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
    ".ts": "ts",
}
# Words that name a split, and the ones that `datasets` takes for the same.
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
WORDS = tuple(word for words in SPLITS.values() for word in words)
PART = re.compile(r"[-_.]?(part|shard)?[-_.]?\d+([-_.]?of[-_.]?\d+)?$", re.IGNORECASE)
# Files beside the rows that tools write about them.
NOT_ROWS = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")


def files_of(folder: Path, split: str | None) -> list[Path]:
    """The files of one split of a folder, sorted; without `split` the only one, or "train"."""
    declared = _declared(folder)
    if declared:
        found = _once(declared[choose_split(list(declared), split, str(folder))])
        what = "the files that README.md names for the split are not there"
        require(found, DataError, what, file=folder, value=split)
        return found
    paths = _rows_in(folder)
    below = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")]
    if not paths and len(below) == 1 and not _rows_in(below[0]):  # default/train/0000.parquet, as the hub converts
        return files_of(below[0], split)
    if not paths:
        folders = sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".") and _rows_in(p))
        named = [p for p in folders if p.name == "data" or _words(p.name) & set(WORDS)]
        paths = [path for inner in named or folders for path in _rows_in(inner)]
        which = {"file": folder, "value": [p.name for p in folders], "expected": "the path of one of them"}
        require(named or len(folders) < 2, DataError, "which of the subfolders is meant is not clear", **which)
    what = "the folder holds no file of rows"
    require(paths, DataError, what, file=folder, expected=".jsonl, .json, .csv, .parquet or .ts")
    return _once(_of_split(paths, split, folder))


def choose_split(names: Collection[str], split: str | None, source: str) -> str:
    """The split that is meant: the given one, else the only one, else "train"."""
    wanted = split if split is not None else next(iter(names)) if len(names) == 1 else "train"
    what = "there is no such split" if split is not None else "which split is meant is not clear"
    expected = f"one of {', '.join(names)}" if names else "split: none"
    require(wanted in names, DataError, what, file=source, value=split, expected=expected)
    return wanted


def file_kind(path: Path) -> str | None:
    """The format by suffix ("jsonl", "json", "csv", "parquet", "ts"), `.gz` aside; None if it is another."""
    return KINDS.get(Path(path.name.lower().removesuffix(".gz")).suffix)


def _rows_in(folder: Path) -> list[Path]:
    files = (p for p in folder.iterdir() if p.is_file() and file_kind(p) and p.name not in NOT_ROWS)
    return sorted(p for p in files if not p.name.startswith("."))


def _label(path: Path) -> str:
    """The name of the split that a file is of, if it is of one: its name without the number of its part."""
    label, folder = PART.sub("", _stem(path)), path.parent.name
    return folder if folder in WORDS and not _words(label) & set(WORDS) else label


def _stem(path: Path) -> str:
    """The name without its suffix and `.gz`."""
    return path.name[: path.name.lower().removesuffix(".gz").rindex(".")]


def _words(label: str) -> set[str]:
    return set(re.split(r"[^a-z]+", label.lower()))


def _of_split(paths: Sequence[Path], split: str | None, source: Path) -> list[Path]:
    by_label: dict[str, list[Path]] = {}
    for path in paths:
        by_label.setdefault(_label(path), []).append(path)
    named = sorted(label for label in by_label if _words(label) & set(WORDS))
    if split in (None, "train") and not named:
        return list(paths)
    if split is None and not _matching(by_label, "train"):
        # One named split beside other files is no choice.
        other = next((label for label in by_label if label not in named), None)
        if other is not None:
            what = f"which files are meant is not clear: {by_label[other][0].name!r} belongs to no split"
            expected = f"split: {' or '.join(named)}, files named after their splits, or the path of one file"
            raise DataError(what, file=source, value=[p.name for p in paths], expected=expected)
        return by_label[choose_split(named, None, str(source))]
    found = _matching(by_label, split or "train")
    if len(found) != 1:
        what = "which split is meant is not clear" if found or split is None else "there is no such split"
        expected = f"one of {', '.join(found or named)}" if found or named else "split: none"
        raise DataError(what, file=source, value=split, expected=expected)
    return by_label[found[0]]


def _matching(labels: Iterable[str], split: str) -> list[str]:
    """The labels that `split` may mean: itself, else those that begin with it, else those that have it as a word."""
    labels = sorted(labels)
    begin = [label for label in labels if re.match(rf"{re.escape(split)}[^a-zA-Z]", label)]
    synonyms = set(SPLITS.get(split, (split,)))
    return [label for label in labels if label == split] or begin or [x for x in labels if _words(x) & synonyms]


def _once(paths: Sequence[Path]) -> list[Path]:
    """The same files; one that is there in two formats (`x.jsonl` beside `x.jsonl.gz`) is an error."""
    seen: dict[Path, Path] = {}
    for path in paths:
        first = seen.setdefault(path.with_name(_stem(path)), path)
        both = {"file": path.parent, "value": [first.name, path.name], "expected": "one of them, or the path of one"}
        require(first is path, DataError, "the same rows may be there twice", **both)
    return list(paths)


def _declared(folder: Path) -> dict[str, list[Path]]:
    """Split -> files, as the header of a hub data set's README says; {} where it does not."""
    readme = folder / "README.md"
    header = re.match(r"---\n(.*?)\n---", read_text(readme, DataError), re.DOTALL) if readme.exists() else None
    try:
        configs: Any = (parse_yaml(header.group(1), "") or {}).get("configs") if header is not None else None
        if not configs:
            return {}
        chosen = configs[0] if len(configs) == 1 else next(c for c in configs if c.get("config_name") == "default")
        files = chosen["data_files"]
        entries = files if isinstance(files, list) else [{"split": "train", "path": files}]
        found = {}
        for entry in entries:
            patterns = [entry["path"]] if isinstance(entry["path"], str) else entry["path"]
            if any(Path(pattern).is_absolute() or ".." in Path(pattern).parts for pattern in patterns):
                return {}
            matches = [p for pattern in patterns for p in folder.glob(pattern) if p.is_file() and file_kind(p)]
            found[str(entry["split"])] = sorted(set(matches))
        return found
    except (RecipeError, AttributeError, KeyError, TypeError, ValueError, StopIteration):
        return {}  # a header that says something else
