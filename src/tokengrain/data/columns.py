"""Columns made from a row's own: `question` and `answer` as the `prompt` and `completion` that the formats know."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Any

from tokengrain.data.config import RowError
from tokengrain.data.rows import Rows, RowStream, StoredRows
from tokengrain.errors import RecipeError, shown
from tokengrain.files import fingerprint


def with_columns(rows: Rows, columns: Mapping[str, str]) -> Rows:
    """The same rows with columns added or replaced.

    Args:
        rows: of any kind; they are changed as they are read and keep their numbers and places.
        columns: name -> the column to copy, or text with `{column}` placeholders to fill in ("Q: {question}\\nA:").

    A row that lacks a column, or fills a template with null, is given as the `RowError` that says so: whoever parses it
    (`check_row`) refuses or skips it as any other invalid row.

    Raises:
        RecipeError: a text that is no template.
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


class _Filler(Formatter):
    """Fills in a template; null is no text."""

    def format_field(self, value: Any, format_spec: str) -> str:
        if value is None:
            raise ValueError("a column is null")
        return super().format_field(value, format_spec)


def _changed(fields: Any, columns: Mapping[str, str]) -> Any:
    if not isinstance(fields, Mapping):
        return fields  # whoever reads it says what is wrong with it
    made = {}
    for name, template in columns.items():
        try:
            filled = "{" in template or "}" in template
            made[name] = _Filler().vformat(template, (), fields) if filled else fields[template]
        except (LookupError, ValueError, AttributeError) as error:
            return RowError(
                "missing column",
                f"cannot make the column ({type(error).__name__}: {error})",
                field=name,
                value=template,
                expected=f"columns with a value among {list(fields)}",
            )
    return {**fields, **made}


class _Made(Rows):
    """Rows with made columns; they are made when a row is read."""

    _rows: Rows
    _columns: Mapping[str, str]

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        for number, fields in self._rows:
            yield number, _changed(fields, self._columns)

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
