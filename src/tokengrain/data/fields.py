"""Looking at the columns of one row: are they there, of the right type, not empty? Raises `RowError`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from tokengrain.data.config import RowError

Message = dict[str, Any]
Content = str | list[Message]

TOKEN_COLUMNS = ("token_rewards", "ref_logps")
_OPTIONAL = tuple(prefix + name for prefix in ("", "chosen_", "rejected_") for name in TOKEN_COLUMNS)
KNOWN_COLUMNS = ("prompt", "chosen", "rejected", "completion", "text", "messages", "tools", *_OPTIONAL)


def check_mapping(row: Any) -> None:
    """Raises `RowError` if a row is no mapping; or is such an error itself (see `with_columns`)."""
    if isinstance(row, RowError):
        raise row
    if not isinstance(row, Mapping):
        raise RowError("wrong type", "the row is not an object", value=row, expected="an object with named columns")


def check_row(row: Any) -> None:
    """`check_mapping`, and that no column looks like a misspelt one of token numbers. Raises `RowError`."""
    check_mapping(row)
    for name in row:
        if name in KNOWN_COLUMNS:
            continue
        near = difflib.get_close_matches(str(name), _OPTIONAL, n=1, cutoff=0.9)
        if near and near[0] not in row:
            raise RowError("misspelt column", "unknown column", field=str(name), expected=f"{near[0]!r}")


def check_misspelt(row: Mapping[str, Any], name: str, cutoff: float) -> None:
    others = [str(k) for k in row if k not in KNOWN_COLUMNS]
    near = difflib.get_close_matches(name, others, n=1, cutoff=cutoff)
    if near:
        raise RowError(
            "missing column",
            f"column is missing; {near[0]!r} has a similar name",
            field=name,
            expected=repr(name),
        )


def content(row: Mapping[str, Any], name: str) -> Content:
    """The text or messages in a column."""
    if name not in row:
        check_misspelt(row, name, 0.6)
        raise RowError("missing column", "column is missing", field=name, expected=f"{name!r} among {list(row)}")
    value = row[name]
    if isinstance(value, str):
        _check_encodable(value, name)
        return value
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        if not value:
            raise RowError(
                f"empty {_kind_of(name)}",
                "has no messages",
                field=name,
                value=value,
                expected="at least one message",
            )
        return [_message(m, name, i) for i, m in enumerate(value)]
    raise RowError(
        "wrong type",
        f"is of type {type(value).__name__}",
        field=name,
        value=value,
        expected="a string, or a list of messages with role and content",
    )


def _message(value: Any, name: str, index: int) -> Message:
    where = f"message {index}"
    if not isinstance(value, Mapping):
        raise RowError(
            "wrong type",
            f"{where} is not an object",
            field=name,
            value=value,
            expected="an object with role and content",
        )
    message = {k: v for k, v in value.items() if v is not None}  # parquet gives absent keys as None
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise RowError("wrong type", f"{where} has no role", field=name, value=value, expected="a role, a string")
    content = message.get("content")
    if content is None and message.get("tool_calls"):
        return message
    if not isinstance(content, str):
        raise RowError(
            "wrong type",
            f"the content of {where} is of type {type(content).__name__}",
            field=name,
            value=content,
            expected="a string",
        )
    _check_encodable(content, name)
    return message


def _check_encodable(text: str, name: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RowError(
            "broken text",
            f"half of a surrogate pair at character {error.start}, which UTF-8 cannot hold",
            field=name,
            value=text[max(0, error.start - 20) : error.end + 20],
            expected="valid Unicode text",
        ) from error


def check_equal(chosen: Content, rejected: Content) -> None:
    if chosen == rejected and not (isinstance(chosen, str) and not chosen.strip()):  # that is an empty completion
        raise RowError(
            "chosen equals rejected",
            "is equal to 'chosen'",
            field="rejected",
            value=rejected,
            expected="two different completions",
        )


def check_prompt(prompt: Content, name: str = "prompt") -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowError("empty prompt", "is empty", field=name, value=prompt, expected="some text")
    elif not prompt:
        raise RowError("empty prompt", "has no messages", field=name, value=prompt, expected="at least one message")
    elif prompt[-1]["role"] == "assistant":
        raise RowError(
            "wrong roles",
            "ends with the assistant's message",
            field=name,
            value=prompt[-1],
            expected="a prompt that the assistant is to answer",
        )


def check_completion(completion: Content, name: str) -> None:
    reason = "empty completion"
    if isinstance(completion, str):
        if not completion.strip():
            raise RowError(reason, "completion is empty", field=name, value=completion, expected="some text")
        return
    if not completion:
        raise RowError(
            reason,
            "no message is left beside the prompt",
            field=name,
            value=completion,
            expected="an assistant's message",
        )
    for message in (completion[0], completion[-1]):
        if message["role"] != "assistant":
            raise RowError(
                "wrong roles",
                f"a completion begins or ends with the role {message['role']!r}",
                field=name,
                value=message,
                expected="the assistant's message at the start and at the end",
            )
    for message in completion:
        empty = not message.get("content", "").strip() and not message.get("tool_calls")
        if message["role"] == "assistant" and empty:
            raise RowError(reason, "completion is empty", field=name, value=message, expected="some text")


def token_columns(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name: row[prefix + name] for name in TOKEN_COLUMNS if row.get(prefix + name) is not None}


def _kind_of(name: str) -> str:
    return "prompt" if name == "prompt" else "completion"
