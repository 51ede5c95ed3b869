"""Rows: mappings from column to value, numbered from 0, and where each came from.

`Rows.place` gives back the file and the row or line in it, for messages.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tokengrain.data.lines import Record, row_label
from tokengrain.data.readers import read_file
from tokengrain.errors import DataError
from tokengrain.files import fingerprint


class Rows(ABC):
    """Rows from one source: iterating gives `(row number, fields)`, as often as you like.

    Attributes:
        name: the file, folder, hub name or other description, used in messages.
        streaming: whether rows are read as they are asked for; there is no `len` then.
    """

    streaming: bool = False

    def __init__(self, name: str, fingerprint_of: Callable[[], str]) -> None:
        self.name = name
        self._fingerprint_of = fingerprint_of
        self._fingerprint: str | None = None

    @abstractmethod
    def __iter__(self) -> Iterator[tuple[int, Any]]:
        """From the first row on."""

    def place(self, number: int) -> tuple[str, str]:
        """(file, row and line in that file) of row `number`, as text."""
        return self.name, str(number)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that identify the content (for local files: their bytes)."""
        if self._fingerprint is None:
            self._fingerprint = self._fingerprint_of()
        return self._fingerprint


class _Places:
    """Remembers where rows came from: one mark wherever the file or the distance of row and line changes."""

    def __init__(self) -> None:
        self._marks: list[tuple[int, Record]] = []

    def note(self, number: int, record: Record) -> None:
        if self._marks:
            at, last = self._marks[-1]
            same_lines = (record.line is None) == (last.line is None) and (
                record.line is None or last.line is None or record.line - last.line == number - at
            )
            if number <= at or (last.file == record.file and same_lines):
                return
        self._marks.append((number, record._replace(fields=None)))

    def place(self, number: int) -> tuple[str, str]:
        index = bisect_right(self._marks, number, key=lambda mark: mark[0]) - 1
        at, record = self._marks[max(index, 0)]
        line = None if record.line is None else record.line + number - at
        return record.file, row_label(record.row + number - at, line)


class StoredRows(Rows):
    """Rows at hand: a sequence, or some numbers of one."""

    def __init__(
        self,
        name: str,
        items: Sequence[Any],
        fingerprint_of: Callable[[], str],
        places: _Places | None = None,
        numbers: Sequence[int] | None = None,
    ) -> None:
        super().__init__(name, fingerprint_of)
        if not len(items):
            raise DataError("there are no rows", file=name, expected="at least one row")
        self._items, self._places, self._numbers = items, places, numbers

    def __len__(self) -> int:
        return len(self._items) if self._numbers is None else len(self._numbers)

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        if self._numbers is None:
            return enumerate(self._items)
        return ((n, self._items[n]) for n in self._numbers)

    def place(self, number: int) -> tuple[str, str]:
        return self._places.place(number) if self._places is not None else super().place(number)

    def subset(self, positions: Sequence[int]) -> StoredRows:
        """The rows at these positions; they keep their numbers."""
        numbers = [p if self._numbers is None else self._numbers[p] for p in positions]
        return StoredRows(
            self.name, self._items, lambda: fingerprint([self.fingerprint, numbers]), self._places, numbers
        )


class RowStream(Rows):
    """Rows that are read as they are asked for; their number is not known beforehand."""

    streaming = True


class FileRows(RowStream):
    """Rows read from files one by one."""

    def __init__(self, name: str, paths: Sequence[Path], fingerprint_of: Callable[[], str]) -> None:
        super().__init__(name, fingerprint_of)
        self._paths, self._places = paths, _Places()

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        number = -1
        for record in (r for path in self._paths for r in read_file(path)):
            number += 1
            self._places.note(number, record)
            yield number, record.fields
        if number < 0:
            raise DataError("there are no rows", file=self.name, expected="at least one row")

    def place(self, number: int) -> tuple[str, str]:
        return self._places.place(number)

    def stored(self) -> StoredRows:
        """All rows in memory."""
        items = [fields for _, fields in self]
        return StoredRows(self.name, items, self._fingerprint_of, self._places)


class IteratedRows(RowStream):
    """Rows of a `datasets.IterableDataset`, or of a `datasets.Dataset` read as a stream."""

    def __init__(self, name: str, items: Any, fingerprint_of: Callable[[], str]) -> None:
        super().__init__(name, fingerprint_of)
        self._items = items

    def __iter__(self) -> Iterator[tuple[int, Any]]:
        number = -1
        for number, fields in enumerate(self._items):
            yield number, fields
        if number < 0:
            raise DataError("there are no rows", file=self.name, expected="at least one row")
