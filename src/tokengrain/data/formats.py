"""One row in any format that people use -> `Example`: a prompt and its completions, as text or as messages.

`canonical` first brings other tools' columns into TRL's. Preference rows (`pair_example`) then have `prompt`, `chosen`,
`rejected`, each a string (standard) or a list of messages `{"role": ..., "content": ...}` (conversational). Without
`prompt` it is implicit:

- messages: the messages both sides begin with;
- dialogues "\n\nHuman: … \n\nAssistant: …" (HH): everything up to and including the last "\n\nAssistant:", which must
  be equal on both sides;
- other strings: the longest common beginning, cut back to the end of a word, so that the completions begin with the
  space before the first word that differs.

Several rejected completions stand in a list, beside a `prompt`; their per-token columns then are lists of lists. A list
of whole numbers in the place of a text is token ids, which are used as they are (docids of generative retrieval, say).

Rows with one completion (`single_example`): `prompt` + `completion`, `messages`, `text`, or a preference row, whose
chosen side is taken.

Pictures stand in the prompt: as parts of its messages, or in the columns `image` or `images`, `video` or `videos`,
which fill the places that messages have for them (`{"type": "image"}`), or stand before the first user's text.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from tokengrain.data.config import RowError, check
from tokengrain.data.pictures import KINDS, held, stored
from tokengrain.errors import no_constant, once, problem

Message = dict[str, Any]


class TokenIds(tuple[int, ...]):
    """Token ids in the place of a text."""


Content = str | list[Message] | TokenIds

TOKEN_COLUMNS = ("token_rewards", "ref_logps")
_OPTIONAL = tuple(prefix + name for prefix in ("", "chosen_", "rejected_") for name in TOKEN_COLUMNS)
KNOWN_COLUMNS = ("prompt", "chosen", "rejected", "completion", "text", "messages", "tools", *_OPTIONAL)
COMPLETIONS = ("chosen", "rejected", "completion", "chosen_masked", "rejected_masked")
COUNTING = ("spans", "token_rewards")  # columns of a completion that may count its characters
SYSTEM = ("system", "system_prompt")

HUMAN, ASSISTANT = "Human:", "\n\nAssistant:"
# The names that ShareGPT's data and LLaMA-Factory give to roles.
ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", "function_response": "tool"}
TOOLS = ("tool", "ipython", "function")  # the roles of what a tool says


class Given(NamedTuple):
    """The images or the videos of a prompt, in the order of its text, as the row has them."""

    column: str  # for messages
    sources: list[Any]


@dataclass(frozen=True)
class Example:
    """A prompt with its completions, text or messages throughout, or token ids.

    `tools` and `template_kwargs` are for the template.
    """

    prompt: Content  # "" only for a row of plain `text`
    completions: tuple[Content, ...] = ()  # chosen and each rejected one, or a single one
    fields: tuple[str, ...] = ()  # the column of each completion, for messages
    token_columns: tuple[dict[str, Any], ...] = ()  # of each completion, `token_rewards` and `ref_logps` as in the row
    prefix: tuple[str, ...] = ()  # of the columns' names, per completion ("chosen_" for `chosen_token_rewards`)
    tools: list[Any] | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    pictures: Mapping[str, Given] = field(default_factory=dict)  # by kind; none of a kind that the row lacks

    @property
    def messages(self) -> list[Message]:
        """The prompt's messages; none of a text."""
        return [m for m in self.prompt if isinstance(m, dict)]

    @property
    def begun(self) -> Message | None:
        """The assistant's message that ends the prompt, if one does: the beginning of every completion's first."""
        return next((m for m in self.messages[-1:] if m["role"] == "assistant"), None)

    @property
    def raw(self) -> dict[str, Content]:
        named: dict[str, Any] = dict(zip(self.fields, self.completions))
        if len(self.completions) > 2:
            named = {"chosen": self.completions[0], "rejected": list(self.completions[1:])}
        if not self.messages:  # else the prompt's parts hold them
            named |= {f"{kind}s": given.sources for kind, given in self.pictures.items()}
        return {"prompt": self.prompt, **named}


def pair_example(row: Any) -> Example:
    """The prompt, chosen and rejected completions of a preference row. Raises `RowError`."""
    row = canonical(row)
    chosen, rejected = content(row, "chosen"), _rejected(row)
    fields = ("chosen", *rejected)
    for name, other in rejected.items():
        if _kind(chosen) != _kind(other):
            field, value, against = ("chosen", chosen, other) if isinstance(chosen, str) else (name, other, chosen)
            what = f"is {_kind(value)} while the other completion is {_kind(against)}"
            expected = "both strings or both lists of messages"
            raise RowError("mixed types", what, field=field, value=value, expected=expected)
        if chosen == other and not (isinstance(chosen, str) and not chosen.strip()):  # that is an empty completion
            what, expected = "is equal to 'chosen'", "two different completions"
            raise RowError("chosen equals rejected", what, field=name, value=other, expected=expected)
    completions = [chosen, *rejected.values()]
    if "prompt" in row:
        prompt, *completions = _explicit(content(row, "prompt"), *completions)
        check_prompt(prompt)
    else:
        check_misspelt(row, "prompt", 0.82)
        what = "the column is missing, and completions of this kind do not show what they have in common"
        alone = len(completions) == 2 and not isinstance(chosen, TokenIds)
        check(alone, "missing column", what, field="prompt", expected="text, messages or token ids")
        hint = f", or data.columns: {asked}" if (asked := _asked(row)) else ""
        prompt, *completions = _split_pair(completions[0], completions[1], hint)
    for name, completion in zip(fields, completions, strict=True):
        check_completion(completion, name)
    prompt, pictures = pictured(row, prompt)
    prefix = ("chosen_", *("rejected_",) * len(rejected))
    columns = (token_columns(row, "chosen_"), *_rejected_columns(row, len(rejected) if len(rejected) > 1 else None))
    return Example(prompt, tuple(completions), fields, columns, prefix, **for_template(row), pictures=pictures)


def _kind(value: Content) -> str:
    return "text" if isinstance(value, str) else "token ids" if isinstance(value, TokenIds) else "messages"


def _rejected(row: Mapping[str, Any]) -> dict[str, Content]:
    """The rejected completions of a row by their names in messages; of one the column's."""
    if not has_several_rejected(row):
        return {"rejected": content(row, "rejected")}
    named = {f"rejected[{i}]": item for i, item in enumerate(row["rejected"])}
    return {name: content(named, name) for name in named}


def has_several_rejected(row: Any) -> bool:
    """Whether `rejected` is a list of completions, and not one that is a list."""
    value = row.get("rejected") if isinstance(row, Mapping) else None
    return _is_list(value) and bool(value) and all(isinstance(item, str) or _is_list(item) for item in value)


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes, bytearray))


def _rejected_columns(row: Mapping[str, Any], count: int | None) -> list[dict[str, Any]]:
    """Per-token columns of each rejected completion; `count`: of several, None: of one."""
    columns = token_columns(row, "rejected_")
    if count is None:
        return [columns]
    for name, value in columns.items():
        fits, expected = _is_list(value) and len(value) == count, f"{count} lists, one per rejected completion"
        where = {"field": f"rejected_{name}", "value": value}
        check(fits, "wrong type", "does not hold a list for each", **where, expected=expected)
    return [{name: value[i] for name, value in columns.items()} for i in range(count)]


def single_example(row: Any) -> Example:
    """The prompt and the only completion of a row (of a pair: chosen). Raises `RowError`."""
    row = canonical(row)
    present = {name for name in KNOWN_COLUMNS if row.get(name) is not None}
    if {"chosen", "rejected"} <= present:
        pair, names = pair_example(row), ("completions", "fields", "token_columns", "prefix")
        return replace(pair, **{name: getattr(pair, name)[:1] for name in names})
    prompt: Content = ""
    if "prompt" in present:
        name = "chosen" if "chosen" in present else "completion"
        prompt, completion = _explicit(content(row, "prompt"), content(row, name), field=name)
        check_prompt(prompt)
    elif "messages" in present:
        name = "messages"
        prompt, completion = _split_messages(content(row, name))
        check_prompt(prompt, name)
    elif "text" in present:
        name = "text"
        completion = content(row, name)
        text = isinstance(completion, str)
        check(text, "wrong type", "is not text", field=name, value=completion, expected="a string")
    else:
        for wanted in ("prompt", "completion", "messages", "text"):
            check_misspelt(row, wanted, 0.75)
        what = "the row has none of the columns that hold a completion"
        expected = "prompt + completion, messages, text, or prompt + chosen + rejected"
        raise RowError("missing column", what, value=list(row), expected=expected)
    check_completion(completion, name)
    prompt, pictures = pictured(row, prompt)
    prefix = "chosen_" if name == "chosen" else ""
    columns, more = (token_columns(row, prefix),), {**for_template(row), "pictures": pictures}
    return Example(prompt, (completion,), (name,), columns, (prefix,), **more)


class CanonicalRow(dict[str, Any]):
    """A row that `canonical` made."""


def canonical(row: Any, chat: bool = False) -> CanonicalRow:
    """The row in TRL's columns; its other columns stay as they are.

    Read are ShareGPT's `conversations` (`from`, `value`), Alpaca's `instruction`, `input`, `output`, the pairs of
    `history`, which become the turns before a prompt, and a `system` or `system_prompt` column, which becomes the first
    message. A null prompt is an implicit one. JSON text of messages, all that a CSV file can hold of them, is read as
    messages. With `chat` text becomes messages: the prompt the user's, a completion the assistant's.
    """
    if isinstance(row, CanonicalRow):
        return row
    check_mapping(row)
    for name in row:
        near = difflib.get_close_matches(str(name), _OPTIONAL, n=1, cutoff=0.9) if name not in KNOWN_COLUMNS else []
        if near and near[0] not in row:
            raise RowError("misspelt column", "unknown column", field=str(name), expected=f"{near[0]!r}")
    made = CanonicalRow((k, v) for k, v in row.items() if k != "prompt" or v is not None)
    made |= {name: _written(made[name], name) for name in MESSAGES if isinstance(made.get(name), str)}
    absent = all(made.get(name) is None for name in ("prompt", "messages", "text"))
    if absent and made.get("conversations") is not None:
        made["prompt" if made.get("chosen") is not None else "messages"] = content(made, "conversations")
    elif absent and isinstance(made.get("instruction"), str):
        _from_alpaca(made)
        made.pop("history", None)  # said now
    if chat:
        _as_messages(made)
    if "prompt" in made and (turns := made.get("history")) and _are_pairs(turns):
        _with_history(made, _said(turns))
    for name in SYSTEM:
        if isinstance(text := made.get(name), str) and text.strip():
            _with_system(made, text, name)
        elif text:
            other = not (isinstance(text, Mapping) or _is_list(text))  # a number, say, is an id of something
            check(other, "wrong type", "is not text", field=name, value=text, expected="the system message's text")
    return made


def _written(text: str, name: str) -> Any:
    """The messages that a text is when it is JSON of nothing else; any other text as it is."""
    found = AS_TEXT.match(text)
    python = found is not None and found[1] == "'" and {"'role'", "'content'"} <= set(re.findall(r"'\w+'", text))
    what, expected = "holds messages as Python prints them", "messages, or their JSON text"
    check(not python, "wrong type", what, field=name, value=text, expected=expected)
    try:
        value = json.loads(text, object_pairs_hook=once, parse_constant=no_constant) if found else None
    except (ValueError, ArithmeticError, RecursionError):
        return text
    messages = isinstance(value, list) and all(
        isinstance(m, dict) and (("role" in m and len(m) > 1) or {"from", "value"} <= m.keys()) for m in value
    )
    return value if messages else text


AS_TEXT = re.compile(r"\s*\[\s*\{\s*(['\"])(?:role|content|from|value)\1\s*:")


def check_mapping(row: Any) -> None:
    """Raises `RowError` if a row is no mapping, or is such an error itself (see `with_columns`)."""
    if isinstance(row, RowError):
        raise row
    what, expected = "the row is not an object", "an object with named columns"
    check(isinstance(row, Mapping), "wrong type", what, value=row, expected=expected)


def _from_alpaca(row: dict[str, Any]) -> None:
    before = _parsed(row.get("history"), "history", "a list of pairs (instruction, output)") or []
    what, expected = "is no list of pairs", "a list of pairs (instruction, output)"
    check(_are_pairs(before), "wrong type", what, field="history", value=before, expected=expected)
    turns = _said(before)
    given = row.get("input") or ""
    text = isinstance(given, str)
    check(text, "wrong type", "is not text", field="input", value=given, expected="a string")
    query = "\n".join(part for part in (row["instruction"], given) if part)
    row["prompt"] = [*turns, _user(query)]
    if row.get("output") is not None and row.get("completion") is None and row.get("chosen") is None:
        row["completion"] = row["output"]
    _as_messages(row)


def _are_pairs(turns: Any) -> bool:
    return _is_list(turns) and all(_is_list(pair) and len(pair) == 2 for pair in turns)


def _said(pairs: Any) -> list[Message]:
    return [message for ask, answer in pairs for message in (_user(ask), _assistant(answer))]


def _with_history(row: dict[str, Any], turns: list[Message]) -> None:
    """Put earlier turns before the prompt's messages, behind a system message."""
    _asked_in_messages(row)
    prompt = content(row, "prompt")
    if isinstance(prompt, list):
        own = [(m["role"], m.get("content")) for m in prompt if m["role"] != "system"]
        if own[: len(turns)] != [tuple(turn.values()) for turn in turns]:
            first = sum(m["role"] == "system" for m in prompt[:1])
            row["prompt"] = [*prompt[:first], *turns, *prompt[first:]]
    else:
        _check_said(row, "history", [str(turn["content"]) for turn in turns])


def _asked_in_messages(row: dict[str, Any]) -> None:
    """A prompt of text beside completions of messages, or none, is the user's message."""
    if isinstance(row["prompt"], str) and not isinstance(row.get("chosen", row.get("completion")), str):
        row["prompt"] = [_user(row["prompt"])]


def _check_said(row: Mapping[str, Any], column: str, texts: Sequence[str]) -> None:
    """A row of text must hold already what a column puts before the messages of others."""
    held = [str(row.get(name)) for name in ("prompt", "chosen", "text")]
    said = all(any(text.strip() in t for t in held) for text in texts)
    what = "the column's text has no place in a row of text"
    expected = "`chat: true`, which makes messages of the row, or `columns:` that put it into the prompt"
    check(said, column, what, field=column, value=row[column], expected=expected)


def _as_messages(row: dict[str, Any]) -> None:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if "prompt" not in row and isinstance(chosen, str) and isinstance(rejected, str):
        row["prompt"], row["chosen"], row["rejected"] = _split_pair(chosen, rejected)
    if isinstance(prompt := row.get("prompt"), str) and prompt.strip():
        row["prompt"] = _turns(prompt)
        if _is_dialogue(prompt) and not _has_spans(row):  # the space behind "Assistant:" is not said
            row |= {name: row[name].strip() for name in COMPLETIONS if isinstance(row.get(name), str)}
    for name in COMPLETIONS:
        if isinstance(row.get(name), str):
            row[name] = [_assistant(row[name])]
    if _is_list(rejected) and any(isinstance(r, str) for r in rejected):
        row["rejected"] = [[_assistant(r)] if isinstance(r, str) else r for r in rejected]
    if isinstance(several := row.get("completions"), Sequence) and not isinstance(several, str):
        row["completions"] = [[_assistant(c)] if isinstance(c, str) else c for c in several]


def _has_spans(row: Mapping[str, Any]) -> bool:
    """Whether a column counts characters of a completion; numbers count its tokens."""
    return any("start" in str(row.get(f"{name}_{column}")) for name, column in product(COMPLETIONS, COUNTING))


def _turns(prompt: str) -> list[Message]:
    """A text prompt as messages: the user's, or, of an HH dialogue, each speaker's."""
    if not _is_dialogue(prompt):
        return [_user(prompt)]
    parts = re.split(r"(?:^|\n\n)(Human|Assistant):", prompt.lstrip())[1:]
    made = {"Human": _user, "Assistant": _assistant}
    turns = [made[who](text.strip()) for who, text in zip(parts[::2], parts[1::2])]
    return turns[:-1] if turns[-1] == _assistant("") else turns


def _with_system(row: dict[str, Any], text: str, column: str) -> None:
    """Put the text of a system column before the messages; a text row must have it in its prompt already."""
    first = next((n for n in ("prompt", "messages", "chosen", "completion") if row.get(n) is not None), None)
    if first == "prompt":
        _asked_in_messages(row)
    value = row.get(first or "")
    if not isinstance(value, Sequence) or isinstance(value, str):
        _check_said(row, column, [text])
        return
    for name in (first, "rejected") if first == "chosen" else (first,):
        messages = content(row, str(name))
        own = messages[0].get("content") if isinstance(messages, list) and messages[0]["role"] == "system" else None
        what, expected = "the row has two system messages", "one system message, or the same; the messages have"
        check(own in (None, text), "system", what, field=column, value=text, expected=f"{expected} {own!r}")
        if own is None:
            row[str(name)] = [{"role": "system", "content": text}, *messages]


def _user(text: Any) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: Any) -> Message:
    return {"role": "assistant", "content": text}


def without_nulls(value: Any) -> Any:
    """The value without keys that hold null, at any depth: Arrow gives every object the keys of all."""
    if isinstance(value, Mapping):
        return {k: without_nulls(v) for k, v in value.items() if v is not None}
    if isinstance(value, (list, tuple)):
        return [without_nulls(v) for v in value]
    return value


def for_template(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row gives the chat template beside messages: `tools` and `template_kwargs` of `Example`."""
    tools, kwargs = (_parsed(row.get(name), name) for name in ("tools", "chat_template_kwargs"))
    tools = [tools] if isinstance(tools, Mapping) else tools or None
    listed = tools is None or _is_list(tools)
    check(listed, "wrong type", "is no list", field="tools", value=tools, expected="a list of tools, or JSON text")
    if tools is not None:
        tools = without_nulls([_parsed(tool, "tools") for tool in tools])
    fits, what = kwargs is None or isinstance(kwargs, Mapping), f"is of type {type(kwargs).__name__}"
    details = {"field": "chat_template_kwargs", "value": kwargs, "expected": "an object: variable -> value"}
    check(fits, "wrong type", what, **details)
    return {"tools": tools, "template_kwargs": without_nulls(kwargs or {})}


def _parsed(value: Any, name: str, expected: str = "an object, or JSON text") -> Any:
    """A value, or what the JSON text holds that stands for it."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value, object_pairs_hook=once, parse_constant=no_constant) if value.strip() else None
    except (ValueError, ArithmeticError, RecursionError) as error:
        what = f"is no JSON: {problem(error)}"
        raise RowError("wrong type", what, field=name, value=value, expected=expected) from error


def _asked(row: Mapping[str, Any]) -> str | None:
    """`{prompt: question}`, if a column by another name holds what is asked."""
    found = next((name for name in ("question", "query", "problem", "input") if row.get(name)), None)
    return found and f"{{prompt: {found}}}"


def content(row: Mapping[str, Any], name: str) -> Content:
    """The text, messages or token ids in a column. Raises `RowError`."""
    if name not in row:
        check_misspelt(row, name, 0.6)
        expected = f"{name!r} among {list(row)}, or made from these by `data.columns`"
        expected += f": {asked}" if name == "prompt" and (asked := _asked(row)) else ""
        raise RowError("missing column", "column is missing", field=name, expected=expected)
    value = row[name]
    if isinstance(value, str):
        check_encodable(value, name)
        return value
    if isinstance(value, Mapping):  # one message
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, (bytes, bytearray)):
        expected = "a string, or a list of messages with role and content"
        raise RowError("wrong type", f"is of type {type(value).__name__}", field=name, value=value, expected=expected)
    if value and all(isinstance(i, int) and not isinstance(i, bool) for i in value):
        expected = "token ids of at least 0"
        check(min(value) >= 0, "wrong type", "has a negative token id", field=name, value=min(value), expected=expected)
        return TokenIds(value)
    kind = "prompt" if name == "prompt" else "completion"
    check(value, f"empty {kind}", "has no messages", field=name, value=value, expected="at least one message")
    return [_message(m, name, i) for i, m in enumerate(value)]


def _message(value: Any, name: str, index: int) -> Message:
    def bad(what: str, expected: str, value: Any = value) -> RowError:
        return RowError("wrong type", what, field=name, value=value, expected=expected)

    where = f"message {index}"
    if not isinstance(value, Mapping):
        raise bad(f"{where} is not an object", "an object with role and content")
    message = without_nulls(value)
    if "role" not in message and "from" in message:  # ShareGPT
        role = message.pop("from")
        role = ROLES.get(role, role) if isinstance(role, str) else role
        message = {"role": role, "content": message.pop("value", None), **message}
        if role == "function_call":
            calls = _parsed(message.pop("content"), name, "a function call: name and arguments")
            calls = calls if isinstance(calls, list) else [calls]
            message |= {"role": "assistant", "tool_calls": [{"type": "function", "function": c} for c in calls]}
    if not isinstance(message.get("role"), str) or not message["role"]:
        raise bad(f"{where} has no role", "a role, a string")
    if message.get("tool_calls"):
        if not isinstance(message["tool_calls"], list):
            raise bad(f"the tool_calls of {where} are no list", "a list of calls", message["tool_calls"])
        message["tool_calls"] = [_tool_call(call, name) for call in message["tool_calls"]]
    for key in ("weight", "train"):  # OpenAI's and axolotl's: 0 or false is text to read, not to learn
        known, what, expected = message.get(key) in (None, 0, 1), f"the {key} of {where} is unknown", "0 or 1, or none"
        check(known, "wrong type", what, field=name, value=message.get(key), expected=expected)
    text = message.get("content")
    if text is None and message.get("tool_calls"):
        message.pop("content", None)
        return message
    if isinstance(text, list):
        parts = [_part(part, name) for part in text]
        if None in parts or not parts:
            other = next((given for given, part in zip(text, parts) if part is None), text)
            what = f"the content of {where} has a part that is neither text nor a picture"
            raise bad(what, '{"type": "text", "text": ...} or {"type": "image", "image": ...}', other)
        seen = any(part["type"] in KINDS for part in parts if part is not None)
        message["content"] = parts if seen else "".join(part["text"] for part in parts if part is not None)
    elif not isinstance(text, str):
        raise bad(f"the content of {where} is of type {type(text).__name__}", "a string, or a list of parts", text)
    check_encodable(text_of(message), name)
    return message


# ---- Pictures ----


def _part(part: Any, column: str) -> dict[str, Any] | None:
    """A part of a message's content: text, or a picture under its kind where the part has it. None: neither."""
    if isinstance(part, str):
        return {"type": "text", "text": part}
    if not isinstance(part, Mapping):
        return None
    kind = str(part.get("type")).removesuffix("_url")
    if kind not in KINDS:
        return {"type": "text", "text": part["text"]} if isinstance(part.get("text"), str) else None
    source = next((part[key] for key in (kind, f"{kind}_url", "url", "path") if key in part), None)
    if isinstance(source, Mapping) and "url" in source:  # OpenAI's form
        source = source["url"]
    if source is None and "bytes" in part:
        source = {"bytes": part["bytes"]}
    return {"type": kind, **({} if source is None else {kind: _held(source, column)})}


def _held(source: Any, column: str) -> Any:
    try:
        return held(source)
    except RowError as error:
        raise RowError(error.reason, error.what, field=column, value=error.value, expected=error.expected) from None


def pictured(row: Mapping[str, Any], prompt: Content) -> tuple[Content, dict[str, Given]]:
    """The prompt with a picture in every place that its messages have for one, and all its pictures by kind.

    Raises `RowError` where their numbers differ, or a tool shows one. A text's places are known when its tokens are.
    """
    found = {kind: given for kind in KINDS if (given := _column_of(row, kind)) is not None}
    if not isinstance(prompt, list):
        return prompt, found
    for message in prompt:
        seen = message["role"] in TOOLS and _has_parts(message)
        what, expected = f"a message of the role {message['role']!r} has a picture", "pictures in the user's messages"
        check(not seen, "pictures", what, field="prompt", value=message, expected=f"{expected}, and text of tools")
    made = [{**m, "content": [dict(p) for p in m["content"]]} if _has_parts(m) else m for m in prompt]
    for kind in KINDS:
        own: Given = found.get(kind, Given("prompt", []))
        column, sources = own.column, own.sources
        if sources and not _places(made, kind):
            made = _with_places(made, kind, len(sources))
        places = _places(made, kind)
        empty = [place for place in places if kind not in place]
        what, expected = f"the messages have {len(empty)} places for {kind}s", f"as many as {kind}s in the columns"
        check(len(empty) == len(sources), "pictures", what, field=column, value=len(sources), expected=expected)
        for place, source in zip(empty, sources):
            place[kind] = source
        if places:
            found[kind] = Given(column, [place[kind] for place in places])
    return made, found


MESSAGES = ("prompt", "messages", "conversations", *COMPLETIONS)


def may_have_pictures(row: Mapping[str, Any]) -> bool:
    """Whether a row has a column of pictures, or messages whose content is in parts."""
    if any(row.get(column) is not None for kind in KINDS for column in (kind, f"{kind}s")):
        return True
    return any(_has_parts(m) for name in MESSAGES if _is_list(value := row.get(name)) for m in value or ())


def stored_row(row: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The row as a file keeps it that lies elsewhere: pictures as `{"bytes", "path"}`, paths, which are relative to
    `folder`, absolute. A row without pictures stays as it is.
    """
    if not may_have_pictures(row):
        return dict(row)
    made = dict(row)
    for kind in KINDS:
        if made.get(kind) is not None:
            made[kind] = stored(made[kind], folder)
        if made.get(f"{kind}s") is not None:
            made[f"{kind}s"] = [stored(source, folder) for source in made[f"{kind}s"]]
    for name in MESSAGES:
        made |= {name: _stored_messages(made[name], folder)} if _is_list(made.get(name)) else {}
    return made


def _stored_messages(messages: Sequence[Any], folder: Path) -> Any:
    parts = [[_part(p, "prompt") for p in m["content"]] if _has_parts(m) else None for m in messages]
    if not any(part is not None and part["type"] in KINDS for content in parts for part in content or ()):
        return messages
    made = []
    for message, content in zip(messages, parts):  # all as lists: a column has one type
        content = content or [{"type": "text", "text": message.get("content") or ""}]
        kept = [p and {k: stored(v, folder) if k in KINDS else v for k, v in p.items()} for p in content]
        made.append({**message, "content": kept})
    return made


def _has_parts(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("content"), list)


def _column_of(row: Mapping[str, Any], kind: str) -> Given | None:
    """The pictures in a row's columns of a kind; None if there are none."""
    both = row.get(f"{kind}s") is not None and row.get(kind) is not None
    check(not both, "pictures", f"stands beside {kind}s", field=kind, value=row.get(kind), expected="one of the two")
    for column in (f"{kind}s", kind):
        value = row.get(column)
        if value is None:
            continue
        several = column == f"{kind}s"
        given = _is_list(value) or not several
        check(given, "wrong type", f"is of type {type(value).__name__}", field=column, value=value, expected="a list")
        sources = [_held(source, column) for source in (value if several else [value])]
        there, expected = all(source is not None for source in sources), f"{kind}s, or an empty list"
        check(there, "pictures", "holds null", field=column, value=value, expected=expected)
        return Given(column, sources) if sources else None
    return None


def _places(messages: Sequence[Message], kind: str) -> list[dict[str, Any]]:
    contents = [m["content"] for m in messages if isinstance(m.get("content"), list)]
    return [part for content in contents for part in content if part["type"] == kind]


def _with_places(messages: list[Message], kind: str, count: int) -> list[Message]:
    """The messages with places for pictures before the text of the first user's."""
    at = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    content = messages[at].get("content") or ""
    before = [{"type": kind} for _ in range(count)]
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    return [*messages[:at], {**messages[at], "content": [*before, *parts]}, *messages[at + 1 :]]


def _tool_call(call: Any, name: str) -> Any:
    """A tool call whose arguments are an object, also where they are given as JSON text."""
    function: Any = call.get("function", call) if isinstance(call, Mapping) else None
    what, expected = "a tool call is not an object", 'an object with "name" and "arguments"'
    check(isinstance(function, Mapping), "wrong type", what, field=name, value=call, expected=expected)
    if isinstance(function.get("arguments"), str):
        function = {**function, "arguments": _parsed(function["arguments"], name, "arguments as an object") or {}}
    return {**call, "function": function} if "function" in call else function


def check_encodable(text: str, name: str) -> None:
    """Raises `RowError` for half of a surrogate pair, which JSON may have and no file of text."""
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        what = f"half of a surrogate pair at character {error.start}, which UTF-8 cannot hold"
        around = text[max(0, error.start - 20) : error.end + 20]
        raise RowError("broken text", what, field=name, value=around, expected="valid Unicode text") from error


def check_misspelt(row: Mapping[str, Any], name: str, cutoff: float) -> None:
    """Raises `RowError` if a column's name is nearly `name`."""
    near = difflib.get_close_matches(name, [str(k) for k in row if k not in KNOWN_COLUMNS], n=1, cutoff=cutoff)
    if near:
        what = f"column is missing; {near[0]!r} has a similar name"
        raise RowError("missing column", what, field=name, expected=repr(name))


def check_prompt(prompt: Content, name: str = "prompt") -> None:
    if isinstance(prompt, str):
        check(prompt.strip(), "empty prompt", "is empty", field=name, value=prompt, expected="some text")
        return
    if isinstance(prompt, TokenIds):
        return
    check(prompt, "empty prompt", "has no messages", field=name, value=prompt, expected="at least one message")
    begun = prompt[-1]["role"] != "assistant" or (text_of(prompt[-1]).strip() and not prompt[-1].get("tool_calls"))
    what, expected = "ends with the assistant's message", "a message to answer, or the text that an answer begins with"
    check(begun, "wrong roles", what, field=name, value=prompt[-1], expected=expected)


def check_completion(completion: Content, name: str) -> None:
    empty: Any = {"reason": "empty completion", "field": name}
    if isinstance(completion, str):
        check(completion.strip(), what="completion is empty", value=completion, expected="some text", **empty)
        return
    if isinstance(completion, TokenIds):
        return
    what, expected = "no message is left beside the prompt", "a message of the role 'assistant' at the end"
    check(completion, what=what, value=completion, expected=expected, **empty)
    for message in (completion[0], completion[-1]):
        what = f"a completion begins or ends with the role {message['role']!r}"
        expected = "the assistant's message at the start and at the end"
        check(message["role"] == "assistant", "wrong roles", what, field=name, value=message, expected=expected)
    for message in completion:
        what, expected = "a completion has a picture", "pictures in the prompt only"
        check(not _has_parts(message), "pictures", what, value=message, field=name, expected=expected)
        there = message.get("content", "").strip() or message.get("tool_calls") or message["role"] != "assistant"
        check(there, what="completion is empty", value=message, expected="some text", **empty)


def token_columns(row: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {name: row[prefix + name] for name in TOKEN_COLUMNS if row.get(prefix + name) is not None}


def common_length(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Length of the longest beginning that two sequences (strings, lists) share."""
    length = min(len(first), len(second))
    alike = first[:length] == second[:length]
    return length if alike else next(i for i, (a, b) in enumerate(zip(first, second)) if a != b)


def text_of(message: Message) -> str:
    """A message's text; "" where it has none, as a call of tools may."""
    content = message.get("content") or ""
    return "".join(part.get("text", "") for part in content) if isinstance(content, list) else str(content)


def _explicit(prompt: Content, *completions: Content, field: str = "chosen") -> tuple[Any, ...]:
    """Prompt and completions of one kind; completions that repeat the prompt's messages lose them.

    Token ids go with a prompt of any kind, and a prompt of token ids with text.
    """
    if isinstance(completions[0], TokenIds) or (isinstance(prompt, TokenIds) and isinstance(completions[0], str)):
        return prompt, *completions
    if isinstance(prompt, str) and isinstance(completions[0], str):
        return prompt, *completions
    if isinstance(prompt, list) and isinstance(completions[0], list):
        repeated = all(c[: len(prompt)] == prompt for c in completions)
        begun = text_of(prompt[-1]) if prompt and prompt[-1]["role"] == "assistant" else ""
        heads = [c[0] for c in completions if c and isinstance(c[0], dict)]
        again = begun.strip() and all(text_of(m).startswith(begun) for m in heads)
        what, expected = "begins with the assistant's message that ends the prompt", "what continues it"
        check(not again or repeated, "wrong roles", what, field=field, value=completions[0][:1], expected=expected)
        return prompt, *(c[len(prompt) :] if repeated else c for c in completions)
    if isinstance(prompt, str):
        # Text beside messages: whole conversations that begin with it, or the answer to it.
        first = completions[0]
        shared = first[: min(common_length(first, c) for c in completions[1:])] if completions[1:] else first[:-1]
        if any(m["role"] == "user" and m.get("content") == prompt for m in shared if isinstance(m, dict)):
            return shared, *(c[len(shared) :] for c in completions)
        if all(c[0]["role"] == "assistant" for c in completions if isinstance(c, list)):
            return [_user(prompt)], *completions
    kinds = ("messages", "text") if isinstance(prompt, str) else ("text", "messages")
    what, expected = f"is {kinds[0]} while the prompt is {kinds[1]}", "prompt and completions all strings or all lists"
    raise RowError("mixed types", what, field=field, value=completions[0], expected=f"{expected} of messages")


def _split_pair(chosen: Any, rejected: Any, hint: str = "") -> tuple[Any, Any, Any]:
    """The implicit prompt, and what is left of either side; `hint`: what else an error may expect."""
    if isinstance(chosen, str) and _is_dialogue(chosen) and _is_dialogue(rejected):
        return _split_dialogues(chosen, rejected)
    at = _common_words(chosen, rejected) if isinstance(chosen, str) else common_length(chosen, rejected)
    prompt, chosen, rejected = chosen[:at], chosen[at:], rejected[at:]
    if not prompt:
        what = "there is no prompt: no such column, and the completions do not begin alike"
        both, expected = {"chosen": chosen, "rejected": rejected}, "a column 'prompt', or chosen and rejected that both"
        raise RowError("empty prompt", what, field="prompt", value=both, expected=f"{expected} begin with it{hint}")
    check_prompt(prompt)
    return prompt, chosen, rejected


def _is_dialogue(text: str) -> bool:
    return text.lstrip().startswith(HUMAN) and ASSISTANT in text


def _split_dialogues(chosen: str, rejected: str) -> tuple[str, str, str]:
    parts = []
    for name, text in (("chosen", chosen), ("rejected", rejected)):
        prompt, mark, completion = text.rpartition(ASSISTANT)
        what, expected = "the dialogue ends with a turn of the human", "the assistant's turn at the end"
        ends = f"\n\n{HUMAN}" not in completion
        check(ends, "no completion", what, field=name, value=completion[-60:], expected=expected)
        parts.append((prompt + mark, completion))
    (first, chosen), (second, rejected) = parts
    if first != second:
        at = common_length(first, second)
        what = f"the dialogues differ before their last {ASSISTANT.strip()!r}, from character {at} on"
        expected = f"the prompt of 'chosen', {first[at : at + 60]!r}"
        raise RowError("different prompts", what, field="rejected", value=second[at : at + 60], expected=expected)
    return first, chosen, rejected


def _common_words(first: str, second: str) -> int:
    """Length of the common beginning, without a word that continues differently and the spaces before it."""
    shared = first[: common_length(first, second)]
    if any(side[len(shared) : len(shared) + 1].isalnum() for side in (first, second)):
        while shared and shared[-1].isalnum():
            shared = shared[:-1]
    return len(shared.rstrip(" "))


def _split_messages(messages: Content) -> tuple[Content, Content]:
    expected = "a list of messages with role and content"
    if not isinstance(messages, list):
        raise RowError("wrong type", f"is {_kind(messages)}", field="messages", value=messages, expected=expected)
    answers = [i for i, m in enumerate(messages) if m["role"] == "assistant"] or [len(messages)]
    return messages[: answers[0]], messages[answers[0] : answers[-1] + 1]
