"""Errors a user can act on.

Each names what was wrong, the value seen and the value expected. The command line prints the message
without a traceback and exits with status 2; from Python they are ordinary exceptions.
"""

from __future__ import annotations

from typing import Any

MAX_SHOWN = 120


def shown(value: Any) -> str:
    """`value` as a short repr, for use in messages."""
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


class TokengrainError(Exception):
    """Base class of every error raised on purpose."""


class DataError(TokengrainError):
    """Bad input data. The message reads `file: row N: field 'f': <what>, got <value>, expected <expected>`.

    Args:
        what: what is wrong, in words.
        file: file, hub name or other description of where the rows come from.
        row: row number in the file, counted from 0 (a line number for a line that is not JSON).
        field: column.
        value: the value seen.
        expected: what was expected instead.
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
        self.what, self.file, self.row, self.field = what, file, row, field
        self.value, self.expected = value, expected
        where = [str(file)] if file is not None else []
        if row is not None:
            where.append(f"row {row}")
        if field is not None:
            where.append(f"field {field!r}")
        message = ": ".join([*where, what])
        if value is not ...:
            message += f"; got {shown(value)}"
        if expected is not None:
            message += f"; expected {expected}"
        super().__init__(message)


class RecipeError(TokengrainError):
    """A recipe (or an override of it) that cannot be run: unknown key, wrong type, impossible combination."""


class ModelError(TokengrainError):
    """A model, adapter or tokenizer that does not fit: vocabulary, positions, template, architecture."""


class RunError(TokengrainError):
    """A run folder that is not what it should be: another run's, interrupted, incomplete, or no run at all."""


class NonFiniteLossError(TokengrainError):
    """The loss became NaN or infinite; training stopped and the rows of the batch were saved."""
