"""Files of rows, read one row at a time: JSON lines, JSON arrays, CSV, parquet, each also gzipped.

Every reader is a generator of `Record`s that holds one row, line or batch in memory, never the file.
Damage is a `DataError` that says where in the file it is.
"""

from __future__ import annotations

import csv
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tokengrain.data.json_rows import read_json, read_jsonl
from tokengrain.data.lines import Record, lines, opened, row_label
from tokengrain.errors import DataError


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
        "jsonl": read_jsonl,
        "json": read_json,
        "csv": _read_csv,
        "parquet": _read_parquet,
    }[kind]
    return reader(path)


def _read_csv(path: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # the default refuses fields beyond 128 KiB
    reader = csv.reader((text for _, text in lines(path)), strict=True)
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

    with opened(path) as stream, tempfile.TemporaryFile() as unzipped:
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
