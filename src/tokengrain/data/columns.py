"""Columns made from a row's own: `question` and `answer` as the `prompt` and `completion` that the formats know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Any

from tokengrain.data.rows import Rows, RowStream, StoredRows
from tokengrain.errors import DataError, RecipeError, shown
from tokengrain.files import fingerprint


def with_columns(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """The same rows with columns added or replaced.

    Args:
        rows: of any kind; they are changed as they are read and keep their numbers and places.
        columns: name -> the column to copy, or text with `{column}` placeholders to fill in ("Q: {question}\\nA:").

    Raises:
        RecipeError: a text that is no template.
        DataError: while reading, a row that lacks a column; names file and row.
    """
    for name, template in columns.items():
        _check(name, template)
    return _Stored(rows, columns) if isinstance(rows, StoredRows) else _Stream(rows, columns)


def _check(name: str, template: str) -> None:
    try:
        slots = [slot for _, slot, _, _ in Formatter().parse(template) if slot is not None]
    except ValueError as error:
        raise RecipeError(f"columns.{name}: {shown(template)} is no template: {error}") from None
    if not all(slots) or any(slot.isdigit() for slot in slots):
        raise RecipeError(f"columns.{name}: {shown(template)} has a slot without a name; expected {{column}}")


def _changed(rows: Rows, number: int, fields: Any, columns: Mapping[str, str]) -> Any:
    if not isinstance(fields, Mapping):
        return fields  # whoever reads it says what is wrong with it
    made = {}
    for name, template in columns.items():
        try:
            made[name] = template.format_map(fields) if "{" in template or "}" in template else fields[template]
        except (LookupError, ValueError, AttributeError) as error:
            file, row = rows.place(number)
            raise DataError(
                f"cannot make the column {name!r} ({type(error).__name__}: {error})",
                file=file,
                row=row,
                value=template,
                expected=f"columns among {list(fields)}",
            ) from None
    return {**fields, **made}


class _Made(Rows):
    """Rows with made columns; they are made when a row is read."""

    _rows: Rows
    _columns: Mapping[str, str]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, fields in self._rows:
            yield number, _changed(self._rows, number, fields, self._columns)

    def place(self, number: int) -> tuple[str, str]:
        return self._rows.place(number)


class _Stream(_Made, RowStream):
    """Rows with made columns, read as they are asked for."""

    def __init__(self, rows: Rows, columns: Mapping[str, str]) -> None:
        super().__init__(rows.name, lambda: fingerprint([rows.fingerprint, dict(columns)]))
        self._rows, self._columns = rows, columns


class _Stored(_Made, StoredRows):
    """Rows at hand with made columns."""

    _rows: StoredRows

    def __init__(self, rows: StoredRows, columns: Mapping[str, str]) -> None:
        StoredRows.__init__(self, rows.name, range(len(rows)), lambda: fingerprint([rows.fingerprint, dict(columns)]))
        self._rows, self._columns = rows, columns

    def subset(self, positions: Any) -> StoredRows:
        """The rows at these positions; they keep their numbers."""
        return _Stored(self._rows.subset(positions), self._columns)
