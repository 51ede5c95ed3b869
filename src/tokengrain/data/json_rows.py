"""Rows of JSON: lines, or one array that is decoded row by row as it is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from io import BufferedIOBase
from pathlib import Path

from tokengrain.data.lines import Record, lines, opened, utf8_error
from tokengrain.errors import DataError

CHUNK = 1 << 20
# A JSON error nearer than this to the end of what was read may only mean that more must be read.
TAIL = 64


def read_jsonl(path: Path) -> Iterator[Record]:
    """A row per line; blank lines are passed over."""
    row = 0
    for number, text in lines(path):
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
        except json.JSONDecodeError as error:
            raise _json_error(path, row, number, error.pos + 1, text, error.pos, error.msg) from error
        except (RecursionError, ValueError) as error:
            raise _json_error(path, row, number, 1, text, 0, _too_much(error)) from error
        yield Record(fields, str(path), row, number)
        row += 1


def read_json(path: Path) -> Iterator[Record]:
    """A JSON array of rows, or JSON lines under the name `.json` (as many tools write them)."""
    with opened(path) as stream:
        first = b""
        while not first.strip(b"\xef\xbb\xbf \t\r\n") and (block := stream.read(CHUNK)):
            first = block
        if first.strip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
            stream.seek(0)
            yield from _array_rows(path, stream)
            return
    yield from read_jsonl(path)


class _Text:
    """A window on the text of a file: what was read and not yet consumed, and where that is."""

    def __init__(self, path: Path, stream: BufferedIOBase) -> None:
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
                raise utf8_error(self.path, error, self._bytes, line) from error
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


def _array_rows(path: Path, stream: BufferedIOBase) -> Iterator[Record]:
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
        except (RecursionError, ValueError) as error:
            raise source.error(row, source.position, _too_much(error)) from error
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


def _too_much(error: Exception) -> str:
    """JSON that Python will not read: brackets nested too deeply, or a whole number of thousands of digits."""
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _json_error(path: Path, row: int, line: int, column: int, text: str, position: int, why: str) -> DataError:
    return DataError(
        f"malformed JSON at line {line}, column {column}: {why}",
        file=path,
        row=row,
        value=text[max(0, position - 30) : position + 30],
        expected="one JSON object per row",
    )
