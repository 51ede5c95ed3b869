"""One row in any of TRL's formats -> `Example`: a prompt and its completions, as text or as messages.

Preference rows (`pair_example`): `prompt`, `chosen`, `rejected`, each a string (standard) or a list of
messages `{"role": ..., "content": ...}` (conversational). Without `prompt` it is implicit:

- messages: the messages both sides begin with;
- dialogues "\n\nHuman: … \n\nAssistant: …" (HH): everything up to and including the last
  "\n\nAssistant:", which must be equal on both sides;
- other strings: the longest common beginning, cut back to the end of a word, so that the completions begin
  with the space before the first word that differs.

Rows with one completion (`single_example`): `prompt` + `completion`, `messages`, `text`, or a preference
row, whose chosen side is taken.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokengrain.data.config import RowError

# ----------------------------------------------------------------------------------------------------
# Looking at the columns of one row: are they there, of the right type, not empty? Raises `RowError`.

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


# ----------------------------------------------------------------------------------------------------
# A helper for sequences of any kind.


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the longest beginning that two sequences (strings, lists) share."""
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)


HUMAN, ASSISTANT = "Human:", "\n\nAssistant:"


@dataclass(frozen=True)
class Example:
    """A prompt with its completions, text or messages throughout.

    Attributes:
        prompt: "" only for a row of plain `text`.
        completions: chosen and rejected, or a single one.
        fields: the column of each completion, for messages.
        token_columns: per completion, the values of `token_rewards` and `ref_logps` as they stand in the row.
        prefix: what the columns' names begin with, per completion ("chosen_" for `chosen_token_rewards`).
        tools: tools for the chat template.
    """

    prompt: Content
    completions: tuple[Content, ...]
    fields: tuple[str, ...]
    token_columns: tuple[dict[str, Any], ...]
    prefix: tuple[str, ...]
    tools: list[Any] | None = None

    @property
    def raw(self) -> dict[str, Content]:
        """Prompt and completions under their columns' names."""
        return {"prompt": self.prompt, **dict(zip(self.fields, self.completions))}


def pair_example(row: Any) -> Example:
    """The prompt, chosen and rejected completion of a preference row. Raises `RowError`."""
    check_row(row)
    chosen, rejected = content(row, "chosen"), content(row, "rejected")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowError(
            "mixed types",
            "is text while the other completion is messages",
            field="chosen" if isinstance(chosen, str) else "rejected",
            value=row["chosen" if isinstance(chosen, str) else "rejected"],
            expected="both strings or both lists of messages",
        )
    check_equal(chosen, rejected)
    if "prompt" in row:
        prompt, chosen, rejected = _explicit(content(row, "prompt"), chosen, rejected)
        check_prompt(prompt)
    else:
        check_misspelt(row, "prompt", 0.82)
        prompt, chosen, rejected = _split_pair(chosen, rejected)
    check_completion(chosen, "chosen")
    check_completion(rejected, "rejected")
    return Example(
        prompt,
        (chosen, rejected),
        ("chosen", "rejected"),
        (token_columns(row, "chosen_"), token_columns(row, "rejected_")),
        ("chosen_", "rejected_"),
        row.get("tools") or None,
    )


def single_example(row: Any) -> Example:
    """The prompt and the only completion of a row (of a pair: chosen). Raises `RowError`."""
    check_row(row)
    present = {name for name in KNOWN_COLUMNS if row.get(name) is not None}
    if {"chosen", "rejected"} <= present:
        pair = pair_example(row)
        return Example(pair.prompt, pair.completions[:1], ("chosen",), pair.token_columns[:1], ("chosen_",), pair.tools)
    if "prompt" in present:
        name = "chosen" if "chosen" in present else "completion"
        completion, prefix = content(row, name), "chosen_" if name == "chosen" else ""
        prompt, completion = _explicit(content(row, "prompt"), completion, field=name)
        check_prompt(prompt)
    elif "messages" in present:
        name, prefix = "messages", ""
        prompt, completion = _split_messages(content(row, "messages"))
        check_prompt(prompt, "messages")
    elif "text" in present:
        name, prefix = "text", ""
        prompt, completion = "", content(row, "text")
        if not isinstance(completion, str):
            raise RowError("wrong type", "is not text", field="text", value=completion, expected="a string")
    else:
        for wanted in ("prompt", "completion", "messages", "text"):
            check_misspelt(row, wanted, 0.75)
        raise RowError(
            "missing column",
            "the row has none of the columns that hold a completion",
            value=list(row),
            expected="prompt + completion, messages, text, or prompt + chosen + rejected",
        )
    check_completion(completion, name)
    return Example(prompt, (completion,), (name,), (token_columns(row, prefix),), (prefix,), row.get("tools") or None)


def _explicit(prompt: Content, *completions: Content, field: str = "chosen") -> tuple[Any, ...]:
    """Prompt and completions of one kind; completions that repeat the prompt's messages lose them."""
    conversational = not isinstance(completions[0], str)
    if isinstance(prompt, str):
        if not conversational:
            return prompt, *completions
        # Some sets give the prompt as text beside whole conversations, which then begin with it.
        first, last = completions[0], completions[-1]
        shared = first[: common_length(first, last)] if len(completions) > 1 else first[:-1]
        if any(m["role"] == "user" and m.get("content") == prompt for m in shared if isinstance(m, dict)):
            return shared, *(c[len(shared) :] for c in completions)
    elif conversational:
        if all(c[: len(prompt)] == prompt for c in completions):
            return prompt, *(c[len(prompt) :] for c in completions)
        return prompt, *completions
    kinds = ("messages", "text") if conversational else ("text", "messages")
    raise RowError(
        "mixed types",
        f"is {kinds[0]} while the prompt is {kinds[1]}",
        field=field,
        value=completions[0],
        expected="prompt and completions all strings or all lists of messages",
    )


def _split_pair(chosen: Content, rejected: Content) -> tuple[Content, Content, Content]:
    """The implicit prompt, and what is left of either side."""
    if isinstance(chosen, str) and isinstance(rejected, str):
        if _is_dialogue(chosen) and _is_dialogue(rejected):
            return _split_dialogues(chosen, rejected)
        at = _common_words(chosen, rejected)
    else:
        at = common_length(chosen, rejected)
    prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
    if not prompt:
        raise RowError(
            "empty prompt",
            "there is no prompt: no such column, and the completions do not begin alike",
            field="prompt",
            value={"chosen": chosen, "rejected": rejected},
            expected="a column 'prompt', or chosen and rejected that both begin with it",
        )
    check_prompt(prompt)
    return prompt, chosen, rejected


def _is_dialogue(text: str) -> bool:
    return text.lstrip().startswith(HUMAN) and ASSISTANT in text


def _split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    parts = []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        prompt, mark, completion = text.rpartition(ASSISTANT)
        if f"\n\n{HUMAN}" in completion:
            raise RowError(
                "no completion",
                "the dialogue ends with a turn of the human",
                field=name,
                value=completion[-60:],
                expected="the assistant's turn at the end",
            )
        parts.append((prompt + mark, completion))
    if parts[0][0] != parts[1][0]:
        at = common_length(parts[0][0], parts[1][0])
        raise RowError(
            "different prompts",
            f"the dialogues differ before their last {ASSISTANT.strip()!r}, from character {at} on",
            field="rejected",
            value=parts[1][0][at : at + 60],
            expected=f"the prompt of 'chosen', {parts[0][0][at : at + 60]!r}",
        )
    return parts[0][0], parts[0][1], parts[1][1]


def _common_words(first: str, second: str) -> int:
    """Length of the common beginning, without a word that goes on differently and the spaces before it."""
    shared = first[: common_length(first, second)]
    goes_on = [side[len(shared) : len(shared) + 1] for side in (first, second)]
    if any(c.isalnum() for c in goes_on):
        while shared and shared[-1].isalnum():
            shared = shared[:-1]
    return len(shared.rstrip(" "))


def _split_messages(messages: Content) -> tuple[Content, Content]:
    if isinstance(messages, str):
        raise RowError(
            "wrong type",
            "is text",
            field="messages",
            value=messages,
            expected="a list of messages with role and content",
        )
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    last = max((i for i, m in enumerate(messages) if m["role"] == "assistant"), default=-1)
    return messages[:first], messages[first : last + 1]
