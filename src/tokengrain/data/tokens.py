"""`Example` -> text -> token ids: what the template writes, where the prompt ends, which characters count.

Messages: the prompt is what the template renders for the prompt's messages with its generation prompt; a completion is
what rendering the whole conversation adds. Of a completion, what the assistant writes counts, from the end of a
generation prompt to the end-of-turn token of the message; other roles and the template's own headings are context.
White space that a template puts behind an end-of-turn token does not count, and is cut at the end of a completion,
because no model gets to generate it.

Prompt and completion are tokenised together, because that is what the model is given, and tokenizers merge across the
prompt boundary. A token that contains a character of the completion belongs to the completion. All completions of a
prompt share its token ids, so the prompt is the longest common beginning of the tokens that hold nothing but prompt;
whatever else there is goes to the completions, and counts. Hence always `prompt_ids + completion_ids` = the tokens of
the whole text (+ EOS).

An encoder's prompt is tokenised apart from its completions, each with the special tokens that the tokenizer puts around
a source and in front of a target. Token ids that a row brings in the place of a text are used as they are.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from functools import cached_property
from itertools import accumulate, groupby
from pathlib import Path
from typing import Any

from tokengrain.data.config import RowError, TokenizeConfig
from tokengrain.data.formats import Example, Message, TokenIds, common_length, text_of
from tokengrain.errors import ModelError, fingerprint, read_text, require

Span = tuple[int, int]
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Keys of a message, beside its content, that hold text which the assistant wrote.
REASONING = ("reasoning_content", "reasoning", "thinking")
WRITTEN = (*REASONING, "tool_plan", "tool_calls", "function_call")
THINK = "<think>"
PROBE = "probe of content"
MARK = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")  # of a template: <think>, [THINK], <|channel|>
DROPPED = "dropped by the template"
DATE_PART = re.compile(r"(?<!\{)%[-_0^#]?[A-Za-z]")
SHORT = re.compile(r"[A-Za-z0-9_.+-]{1,4}")  # what may stand in any other word
# Put before a template that asks for the date: transformers passes templates plain data only, no function.
DATES = (
    "{%- macro strftime_now(format) -%}{%- set made = namespace(text=format) -%}"
    "{%- for part, value in date_parts.items() -%}{%- set made.text = made.text.replace(part, value) -%}{%- endfor -%}"
    "{{- made.text -}}{%- endmacro -%}{{ '' }}"
)


@dataclass(frozen=True)
class Rendered:
    """The text of a prompt with one completion. All positions are characters of `text`.

    `prompt_ids`, `ids`: those of prompt and completion, where the row gives them in the place of text.
    """

    text: str
    prompt_end: int
    turns: tuple[Span, ...] | None  # the stretches that count; None: all of the completion
    # Where the text of each message of the completion stands; None where it could not be found or has no text.
    contents: tuple[Span | None, ...]
    special: bool = False  # the text is a rendered template, so it has its special tokens already
    closed: bool = False  # a token that ends a turn stands at the end; no EOS is to be added
    shown: tuple[Span | None, ...] | None = None  # `contents` as the template stripped them; None: it stripped none
    dropped: tuple[str, ...] = ()  # what the row says and the text lacks, where that is allowed
    prompt_ids: TokenIds | None = None
    ids: TokenIds | None = None
    untrained: tuple[int, ...] = ()  # which of the turns do not count, as the row says

    def visible(self, message: int) -> Span:
        return (self.shown or self.contents)[message] or (0, 0)

    def with_prompt(self, prompt: str) -> Rendered:
        """The same with another text of the prompt."""
        by = len(prompt) - self.prompt_end
        turns, contents, shown = (
            None if spans is None else tuple(span and (span[0] + by, span[1] + by) for span in spans)
            for spans in (self.turns, self.contents, self.shown)
        )
        text = prompt + self.text[self.prompt_end :]
        moved: Any = {"turns": turns, "contents": contents, "shown": shown}
        return replace(self, text=text, prompt_end=len(prompt), **moved)


class Clock:
    """The time that a chat template reads (`strftime_now`): the same for all rows, and kept when a run resumes."""

    def __init__(self, now: datetime | None = None) -> None:
        self.now = now or datetime.now()
        self.shown: tuple[str, ...] = ()  # the parts of a date that the template writes

    def parts(self) -> dict[str, str]:
        return {name: self.now.strftime(name) for name in self.shown}

    def reads(self, now: datetime) -> bool:
        """Whether the template would write the same at another time."""
        return self.parts() == {name: now.strftime(name) for name in self.shown}


class Renderer:
    """Renders examples with the chat template of a tokenizer or processor, or the one in `config`.

    `clock` is the time it writes.
    """

    def __init__(self, processor: Any, config: TokenizeConfig, clock: Clock | None = None) -> None:
        self.tokenizer = tokenizer = text_tokenizer(processor)
        self.config, self.sees = config, processor is not tokenizer
        self.template = template_text(config.chat_template) or (processor.chat_template if self.sees else None)
        self.clock, self.source = clock or Clock(), str(self.template or tokenizer.chat_template)
        self.dated = "strftime_now" in self.source
        if self.dated:
            written = self.source + json.dumps(config.chat_template_kwargs, default=str)
            self.clock.shown = tuple(sorted(set(DATE_PART.findall(written))))
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        marks = {str(t) for t in added if getattr(t, "special", True)} | set(tokenizer.all_special_tokens)
        self.end_marks = tuple(mark for mark in marks if mark.strip())
        self.unread = next((name for name in config.chat_template_kwargs if name not in self.source), None)

    def __call__(self, example: Example) -> list[Rendered]:
        """One text per completion. Raises `RowError`, and `ModelError` where a template is lacking."""
        given = example.prompt if isinstance(example.prompt, TokenIds) else None
        if isinstance(example.completions[0], TokenIds):
            text, dropped = ("", ()) if given else self._prompt(example) if example.messages else (example.prompt, ())
            made = Rendered(str(text), len(text), None, (None,), bool(example.messages), True, None, dropped, given)
            return [replace(made, ids=c) for c in example.completions if isinstance(c, TokenIds)]
        if isinstance(example.prompt, str) or given:
            start, dropped = 0 if given else len(example.prompt), () if given else self._unrendered(example)
            texts = [str(example.prompt)[:start] + c for c in example.completions if isinstance(c, str)]
            return [Rendered(t, start, None, ((start, len(t)),), prompt_ids=given, dropped=dropped) for t in texts]
        prompt, dropped = self._prompt(example)
        named = zip(example.completions, example.fields)
        return [self._conversation(example, prompt, c, name, dropped) for c, name in named if isinstance(c, list)]

    def prompt(self, example: Example) -> str:
        """The text of a prompt alone: what a model is given to continue. Raises as `__call__`."""
        if not isinstance(example.prompt, str):
            return self._prompt(example)[0]
        self._unrendered(example)
        return example.prompt

    def _unrendered(self, example: Example) -> tuple[str, ...]:
        """What a row of text is not read with: tools that it does not name. Raises `RowError` as `_dropped`."""
        text = "\n".join(map(str, (example.prompt, *example.completions)))
        lacks = [name for name in _names(example.tools) if not _has_word(text, name)]
        if lacks and self.config.on_dropped == "error":
            what, expected = "has a tool that the row's text does not name", "`chat: true`, text that names it, or "
            expected += "`on_dropped: keep` to train on the text"
            raise RowError(DROPPED, what, field="tools", value=lacks[0], expected=expected)
        return ("tools",) if lacks else ()

    def _prompt(self, example: Example) -> tuple[str, tuple[str, ...]]:
        """A prompt's text, and what it lacks."""
        asked = "`chat: true` makes messages of text" if self.config.chat else "the rows hold messages"
        what = f"{asked}, and the tokenizer {type(self.tokenizer).__name__} has no chat template; expected "
        what += "a tokenizer that has one, `chat_template:` (a Jinja template or the path of a file that holds one), "
        what += "`chat: false`" if self.config.chat else "or rows of plain text (online: with `prompts.chat: false`)"
        require(self.template is not None or self.tokenizer.chat_template, ModelError, what)
        what = f"chat_template_kwargs has {self.unread!r}, which the chat template does not read; expected a variable "
        require(self.unread is None, ModelError, what + "of the template")
        messages = example.messages
        text = self._opened(example)
        ignored = example.tools and self._opened(replace(example, tools=None)) == text
        lacks = [("tools", "tools", n) for n in _names(example.tools) if ignored or not _has_word(text, n)]
        unread = {name: value for name, value in example.template_kwargs.items() if name not in self.source}
        lacks += [("chat_template_kwargs", n, part) for n, value in unread.items() for part in _texts_of(value)]
        for number, message in enumerate(messages):
            if message["role"] == "assistant":  # templates leave earlier reasoning out on purpose
                said = text_of(message).rpartition("</think>")[2]
                message = {k: v for k, v in message.items() if k == "tool_calls"} | {"content": said}
            lacks += [("prompt", f"message {number}: {key}", part) for key, part in self._lacking(message, text)]
        return text, self._dropped(lacks)

    def _opened(self, example: Example) -> str:
        """A prompt's text up to where generation begins: behind the assistant's message, if one ends the prompt."""
        begun, messages = example.begun, example.messages
        if begun is None or THINK not in text_of(begun).rpartition("</think>")[2]:
            return self._render(example, messages, "prompt", True, begun=begun is not None)
        # Templates take a thought without an end for an answer, and may put an empty thought before it.
        opening, said = self._render(example, messages[:-1], "prompt", True), text_of(begun)
        if said.lstrip().startswith(THINK):
            opening = opening.rstrip().removesuffix(THINK) if opening.rstrip().endswith(THINK) else opening
        return opening + said

    def _dropped(self, lacks: Sequence[tuple[str, str, str]]) -> tuple[str, ...]:
        """Names of what the template dropped: (column, what of it, text). Raises `RowError` unless that is allowed."""
        if lacks and self.config.on_dropped == "error":
            field, what, text = lacks[0]
            what = f"the chat template drops text of the row ({what})"
            expected = "a template that renders it, or `on_dropped: keep` to train on the rest"
            raise RowError(DROPPED, what, field=field, value=text, expected=expected)
        return tuple(f"{field} ({what.rpartition(': ')[2]})" if what != field else field for field, what, _ in lacks)

    def variables(self, example: Example) -> dict[str, Any]:
        """Variables of the template beside messages and tools."""
        frozen = {"date_parts": self.clock.parts()} if self.dated else {}
        return {**frozen, **self.config.chat_template_kwargs, **example.template_kwargs}

    def _template(self, example: Example) -> str:
        template = self.template or self.tokenizer.get_chat_template(None, example.tools)
        return DATES + template if self.dated else template

    def _render(
        self, example: Example, messages: Sequence[Message], name: str, generation: bool, *, begun: bool = False
    ) -> str:
        """The template's text; for generation of another message or, with `begun`, of the rest of the last one."""
        try:
            return self.tokenizer.apply_chat_template(
                [self._message(m) for m in messages],
                tools=example.tools,
                chat_template=self._template(example) if self.dated else self.template,
                add_generation_prompt=generation and not begun,
                continue_final_message=begun,
                tokenize=False,
                **self.variables(example),
            )
        except Exception as error:  # templates raise what they like
            what = f"the chat template cannot render the messages ({type(error).__name__}: {error})"
            roles, expected = [m["role"] for m in messages], "roles and fields that the template knows"
            raise RowError("chat template", what, field=name, value=roles, expected=expected) from error

    def _message(self, message: Message) -> Message:
        """A message as the template reads it: of pictures only their places."""
        content = message.get("content", "")  # a call of tools may have none
        if isinstance(content, list):
            content = [{k: v for k, v in part.items() if k in ("type", "text")} for part in content]
        elif self._lists:
            content = [{"type": "text", "text": content}] if content else []
        return {**message, "content": content}

    @cached_property
    def _lists(self) -> bool:
        """Whether the template writes a message's content only where it is a list of parts."""
        if not self.sees:
            return False
        written = []
        for content in (PROBE, [{"type": "text", "text": PROBE}]):
            with suppress(Exception):  # templates raise what they like
                messages, template = [{"role": "user", "content": content}], self.template
                text = self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False)
                written.append(PROBE in text)
                continue
            written.append(False)
        return written == [False, True]

    def _conversation(
        self, example: Example, prompt: str, completion: list[Message], name: str, dropped: tuple[str, ...]
    ) -> Rendered:
        whole, said = example, completion
        if (begun := example.begun) is not None:  # the completion's first message continues it
            joint = {**begun, **completion[0], "content": text_of(begun) + text_of(completion[0])}
            whole, said = replace(example, prompt=example.messages[:-1]), [joint, *completion[1:]]
        text = self._render(example, [*whole.messages, *said], name, False)
        start = _behind(prompt, text) if begun else self._completion_start(whole, prompt, said, text, name)
        if start is None:
            raise self._other_prompt(prompt, text, name)
        turns = [(start, len(text))]
        if len(completion) > 1:
            turns = [(max(turn[0], start), turn[1]) for turn in self._turns(whole, prompt, said, text, name, start)]
        # A generation prompt may be longer than what the template writes before an answer; the prompt ends as it does.
        text, moved = prompt + text[start:], len(prompt) - start
        turns = [(first + moved, last + moved) for first, last in turns]
        for number, (first, last) in enumerate(turns):  # white space behind an end-of-turn token does not count
            stripped = text[first:last].rstrip()
            turns[number] = (first, first + len(stripped) if stripped.endswith(self.end_marks) else last)
        text = text[: turns[-1][1]]
        contents, shown = _contents(text, len(prompt), completion, turns)
        answers, lacks = iter(turns), list[tuple[str, str, str]]()
        for number, message in enumerate(completion):
            first, last = next(answers) if message["role"] == "assistant" else (len(prompt), len(text))
            lacking = self._lacking(message, text[first:last], text[:first])
            lacks += [(name, f"message {number}: {key}", part) for key, part in lacking]
        closed, dropped = text.endswith(self.end_marks), dropped + self._dropped(lacks)
        said = [message for message in completion if message["role"] == "assistant"]
        untrained = tuple(i for i, m in enumerate(said) if not (m.get("weight", 1) and m.get("train", True)))
        given = (text, len(prompt), tuple(turns), contents, True, closed, shown, dropped)
        return Rendered(*given, untrained=untrained)

    def _completion_start(
        self, example: Example, prompt: str, completion: list[Message], text: str, name: str
    ) -> int | None:
        """Where the completion begins in the template's text; None: nowhere that could follow the prompt."""
        if (start := _behind(prompt, text)) is not None:
            return start
        # A generation prompt may be longer than what the template writes before an answer (an empty thinking
        # block, say); then the completion is the answer. The messages must be rendered alike.
        before = example.messages
        if common_length(prompt, text) < len(self._render(example, before, "prompt", False).rstrip()):
            # Mistral's templates write the system message before the last user's only if no answer follows.
            at = text.rfind(text_of(completion[0]).strip()) if len(completion) == 1 else -1
            alike = common_length(prompt[::-1], text[: max(at, 0)][::-1])
            return at if alike and (text_of(before[-1]) or " ").strip() in prompt[len(prompt) - alike :] else None
        # What the template writes before an answer of other words; a call must stay where its result follows.
        said = REASONING if completion[1:] else WRITTEN
        other = {**{k: v for k, v in completion[0].items() if k not in said}, "content": PROBE}
        heading = self._render(example, [*before, other, *completion[1:]], name, False).partition(PROBE)[0]
        shared = common_length(heading, prompt)
        rest = heading[shared:] if heading[shared:].strip() else ""
        at, start = prompt.find(rest, shared), shared + len(rest)
        # A completion must not open again, and otherwise, what the generation prompt opens.
        mark = MARK.match(prompt[at + len(rest) :].lstrip())
        again = mark is not None and text[start:].lstrip().startswith(mark.group())
        return start if at >= 0 and text.startswith(heading[:start]) and not again else None

    @staticmethod
    def _other_prompt(prompt: str, text: str, name: str) -> RowError:
        shared = common_length(prompt, text)
        what = "the chat template renders the prompt differently once a completion follows"
        expected = f"the rendered prompt to continue with {prompt[shared : shared + 40]!r}, or a template "
        expected += "(`chat_template`, `chat_template_kwargs`) whose generation prompt goes with the answer"
        around = text[max(0, shared - 20) : shared + 40]
        return RowError("chat template", what, field=name, value=around, expected=expected)

    def _turns(
        self, example: Example, prompt: str, completion: list[Message], text: str, name: str, start: int
    ) -> list[Span]:
        """The assistant's turns in a completion of several messages."""
        before, turns = example.messages, list[Span]()
        first: int | None
        for index, message in enumerate(completion):
            if message["role"] != "assistant":
                continue
            first, so_far = start, replace(example, prompt=[*before, *completion[:index]])
            closing = self._render(example, [*so_far.messages, message], name, False)
            if index and text.startswith(closing):
                opening = self._render(example, so_far.messages, name, True)
                first = self._completion_start(so_far, opening, completion[index:], text, name)
            if first is None or not text.startswith(closing):
                break
            turns.append((first, len(closing)))
        else:
            return turns
        # The template rewrites earlier turns: they are found by its `{% generation %}` blocks, or by their headings.
        count = sum(m["role"] == "assistant" for m in completion)
        template = self._template(example)
        if GENERATION_BLOCK.search(template):
            turns = self._marked_turns(example, [*before, *completion], template, text)[-count:]
        else:
            written = len(self._render(example, before, "prompt", False).rstrip())
            turns = self._headed_turns(text, written, start, prompt)
        if len(turns) != count:
            what = "the chat template rewrites earlier turns, so what the assistant wrote cannot be told apart"
            expected = "one assistant message per completion, or a template with {% generation %} blocks"
            raise RowError("chat template", what, field=name, value=[m["role"] for m in completion], expected=expected)
        return turns

    def _marked_turns(self, example: Example, messages: list[Message], template: str, text: str) -> list[Span]:
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # declared to return a str
        _, marked = render(
            conversations=[messages],
            tools=example.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.variables(example)},
        )
        turns = list[Span]()
        for start, end in marked[0]:
            # Where the block leaves out the end-of-turn token, it still belongs to the turn; what follows upon that
            # token and white space does not.
            ended = text[end - 1].isspace() and text[start:end].rstrip().endswith(self.end_marks)
            behind = next((m for m in self.end_marks if not ended and text.startswith(m, end)), "")
            turns.append((start, end + len(behind)))
        return turns

    def _headed_turns(self, text: str, written: int, start: int, prompt: str) -> list[Span]:
        """Turns from the heading before the first one to the end-of-turn token that closes the last one.

        The prompt's messages end at `written`, the first turn begins at `start`.
        """
        heading, whole, turns = text[written:start].lstrip(), prompt[written:].lstrip(), list[Span]()
        mark = next((m for m in self.end_marks if text.rstrip().endswith(m)), "")
        at = text.find(heading, written) if heading.strip() and mark else -1
        while at >= 0:
            first = at + (_behind(whole, text[at:]) or len(heading)) if turns else start
            end = text.find(mark, first)
            if end < 0:
                return []
            turns.append((first, end + len(mark)))
            at = text.find(heading, end)
        return turns

    def _lacking(self, message: Message, text: str, before: str = "") -> Iterator[tuple[str, str]]:
        """(key, text) of what the message says and the rendered text lacks; white space aside.

        What it says may begin at the end of the text `before`, as where a generation prompt opens a thought.
        """
        opened, squeezed = ("".join(part.split()) for part in (before, text))
        for key in ("content", *WRITTEN):
            # transformers gives templates every kind of reasoning under the names of all.
            reads = REASONING if key in REASONING else (key,)
            named = key == "content" or any(name in self.source for name in reads)
            value = message.get(key)
            if key == "content" and isinstance(value, list):
                value = [part["text"] for part in value if "text" in part]
            for part in filter(str.strip, _texts_of(value)):
                forms = (part, json.dumps(part)[1:-1], json.dumps(part, ensure_ascii=False)[1:-1])
                # At least its last character stands in the text.
                wanted = ["".join(form.split()) for form in forms]
                found = named and any(w in opened[max(len(opened) - len(w) + 1, 0) :] + squeezed for w in wanted)
                if not found or (key == "tool_calls" and SHORT.fullmatch(part) and not _has_word(text, part)):
                    yield key, part
            if key == "tool_calls":
                names = _names(message.get(key))
                yield from ((key, name) for name in names if not (named and _has_word(text, name)))


def _behind(prompt: str, text: str) -> int | None:
    """Where a text goes on that begins with the prompt, white space aside; None: it does not begin with it."""
    shared = common_length(prompt, text)
    if shared == len(prompt):
        return shared
    rest = text[shared:]
    for word in prompt[shared:].split():
        rest = rest.lstrip()
        if not rest.startswith(word):
            return None
        rest = rest[len(word) :]
    return len(text) - len(rest.lstrip() if prompt[-1].isspace() else rest)


def _begun_in(before: str, content: str) -> int:
    """How many characters at the start of the content stand at the end of the text before it, white space aside."""
    opened, said = ("".join(part.split()) for part in (before, content))
    starts = (i for i, char in enumerate(opened) if char == said[:1] and said.startswith(opened[i:]))
    shared = len(opened) - next(starts, len(opened))
    places = [i + 1 for i, char in enumerate(content) if not char.isspace()]
    return places[shared - 1] if 0 < shared < len(said) else 0


def template_text(template: str | None) -> str | None:
    """A chat template given as itself, or as the path of a file that holds it."""
    if template is None or "{%" in template or "{{" in template:
        return template
    path = Path(template).expanduser()
    expected = "expected a Jinja template or the path of a file that holds one"
    require(path.is_file(), ModelError, f"chat_template is {template!r}; {expected}")
    return read_text(path, ModelError)


def dated(template: str, now: datetime) -> str:
    """A chat template that writes the date of this time, whenever it is rendered; any other as it is."""
    if "strftime_now" not in template:
        return template
    parts = {name: now.strftime(name) for name in sorted(set(DATE_PART.findall(template)))}
    return f"{{%- set date_parts = {json.dumps(parts)} -%}}{DATES}{template}"


def _contents(
    text: str, start: int, completion: Sequence[Message], turns: Sequence[Span]
) -> tuple[tuple[Span | None, ...], tuple[Span | None, ...]]:
    """Where each message's content stands, the assistant's in its `turns`: as if whole, and as the template left it."""
    places: list[tuple[Span | None, Span | None]] = []
    left = list(turns)
    for message in completion:
        limit = len(text)
        if message["role"] == "assistant" and left:  # a heading before the turn may hold the same letters
            start, limit = left.pop(0)
        content = message.get("content") or ""
        low = text.find(content.strip(), start, limit)
        # A generation prompt may have begun it.
        opened = _begun_in(text[:start], content) if low < 0 else 0
        core = content[opened:].strip()
        low = text.find(core, start, limit) if core else -1
        if low < 0:
            places.append((None, None))
            continue
        high, first = low + len(core), low - content.index(core, opened)
        least, start = start, high
        while low > max(first, least) and text[low - 1] == content[low - 1 - first]:
            low -= 1
        while high < min(first + len(content), limit) and text[high] == content[high - first]:
            high += 1
        places.append(((first, first + len(content)), (low, high)))
    return tuple(whole for whole, _ in places), tuple(shown for _, shown in places)


def _texts_of(value: Any) -> Iterator[str]:
    """Every text and number in a value of JSON: keys (of tool calls, those of their arguments) and leaves."""
    if isinstance(value, Mapping):
        if "function" in value or "arguments" in value:
            yield from _texts_of(value.get("function", value).get("arguments"))
            return
        for key, inner in value.items():
            yield str(key)
            yield from _texts_of(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _texts_of(inner)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        yield json.dumps(value)


def _names(tools: Any) -> list[str]:
    entries = [tool.get("function", tool) for tool in tools or () if isinstance(tool, Mapping)]
    return [entry["name"] for entry in entries if isinstance(entry, Mapping) and isinstance(entry.get("name"), str)]


def _has_word(text: str, word: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text) is not None


@dataclass
class Tokens:
    """The tokens of a text, and the characters `[start, end)` of each if the tokenizer tells."""

    text: str
    ids: list[int]  # without the special tokens that the tokenizer adds by itself
    starts: list[int] | None = None
    ends: list[int] | None = None
    ids_of: Any = field(default=None, repr=False)  # tokenises another text in the same way, where there are no offsets
    prompt: int | None = None  # how many are the prompt's, where it is tokenised apart

    def within(self, position: int) -> int:
        """How many tokens at the start hold only characters before `position`."""
        if self.ends is not None:
            return bisect_right(self.ends, position)
        return common_length(self.ids_of(self.text[:position]), self.ids)

    def touching(self, position: int) -> int:
        """How many tokens at the start hold at least one character before `position` (or none at all)."""
        if self.starts is not None:
            return bisect_right(self.starts, position - 1)
        before = self.ids_of(self.text[:position])
        shared = common_length(before, self.ids)
        return shared + (shared < len(before))


SPACE = "Ġ"  # how byte-level tokenizers write a space


def text_tokenizer(processor: Any) -> Any:
    """The tokenizer in a processor of text and pictures; a tokenizer as it is."""
    return processor.tokenizer if hasattr(processor, "image_processor") else processor


class Encoder:
    """Tokenises texts with a tokenizer, or that of a processor: many at a time, with offsets where it has them.

    `prefix`: ids that it puts before a text by itself (BOS), `suffix`: behind an encoder's prompt, `target_prefix`:
    before a decoder's text. `eos_id`: None if the config does not ask for EOS.
    """

    def __init__(self, processor: Any, config: TokenizeConfig) -> None:
        self.tokenizer = tokenizer = text_tokenizer(processor)
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int | None = tokenizer.eos_token_id if config.add_eos else None
        what = f"the tokenizer {type(tokenizer).__name__} has no EOS token, got eos_token None; "
        what += "expected one, since EOS ends every completion (or `add_eos: false`)"
        require(not config.add_eos or self.eos_id is not None, ModelError, what)
        self.longest, self.side = config.max_prompt_length, config.truncation_side
        self.apart = config.prompt_role == "encoder"
        self.prefix, behind = self._around()
        # A causal model's text continues the prompt; a decoder's target has a beginning of its own.
        self.suffix = behind if self.apart else []
        self.target_prefix = self._around(target=True)[0] if self.apart else []
        self._spaces: dict[int, tuple[int, ...]] = {}
        self._trimmed = tokenizer.is_fast and self._trims_offsets()

    def of(self, rendered: Sequence[Rendered]) -> list[Tokens]:
        """The tokens of prompts with completions: of the whole text, or of the two apart."""
        apart = [self.apart or r.prompt_ids is not None or r.ids is not None for r in rendered]
        whole = iter(self([r.text for r, two in zip(rendered, apart) if not two]))
        parts = [r for r, two in zip(rendered, apart) if two]
        prompts = self([r.text[: r.prompt_end] for r in parts])
        completions = self([r.text[r.prompt_end :] for r in parts], target=self.apart)
        joined = map(self._joined, parts, prompts, completions)
        return [next(joined) if two else next(whole) for two in apart]

    def _joined(self, rendered: Rendered, prompt: Tokens, completion: Tokens) -> Tokens:
        """Prompt and completion that were tokenised apart; tokens without a text stand at the end of the prompt."""
        end = rendered.prompt_end
        around = ([], [], []) if rendered.special else (self.prefix, self.suffix, self.target_prefix)
        first, last, start = (_bare(ids, place) for ids, place in zip(around, (0, end, end)))
        before, behind = [first, prompt, last], [start, _shifted(completion, end)]
        if rendered.prompt_ids is not None:
            before = [_bare(rendered.prompt_ids, 0)]
        if rendered.ids is not None:
            behind = [_bare(rendered.ids, end)]

        def ids_of(text: str) -> list[int]:
            return self.of([replace(rendered, text=text, prompt_end=min(end, len(text)))])[0].ids

        made = Tokens(rendered.text, [i for part in (*before, *behind) for i in part.ids], ids_of=ids_of)
        made.prompt = sum(len(part.ids) for part in before)
        if all(part.starts is not None for part in (*before, *behind)):
            made.starts = [place for part in (*before, *behind) for place in part.starts or ()]
            made.ends = [place for part in (*before, *behind) for place in part.ends or ()]
        return made

    def __call__(self, texts: Sequence[str], target: bool = False) -> list[Tokens]:
        """The tokens of each text, without special tokens that are not in the text; `target`: what a decoder writes."""
        if not texts:
            return []
        if not self.tokenizer.is_fast:
            return [Tokens(text, self._ids(text, target), ids_of=self._ids) for text in texts]
        options = {"return_attention_mask": False, "return_token_type_ids": False}
        found = self._with_offsets(list(texts), target, **options)
        tokens = []
        for text, ids, offsets in zip(texts, found["input_ids"], found["offset_mapping"]):
            if self._trimmed:
                offsets = [self._with_spaces(i, start, end) for i, (start, end) in zip(ids, offsets)]
            starts, ends = zip(*offsets) if offsets else ((), ())
            # Some normalisers report tokens without characters of their own at 0; they go with what precedes.
            tokens.append(Tokens(text, ids, list(accumulate(starts, max)), list(accumulate(ends, max))))
        return tokens

    def _with_offsets(self, texts: Any, target: bool = False, **options: bool) -> Any:
        given: dict[str, Any] = {"text_target" if target else "text": texts, **options}
        return self.tokenizer(**given, add_special_tokens=False, return_offsets_mapping=True, verbose=False)

    def head(self, rendered: Rendered, tokens: Tokens) -> list[int]:
        """Ids to put before the tokens: what the tokenizer adds by itself, BOS never twice."""
        there = self.prefix and tokens.ids[: len(self.prefix)] == self.prefix
        return [] if tokens.prompt is not None or rendered.special or there else self.prefix

    def tail(self, rendered: Rendered, tokens: Tokens) -> list[int]:
        """Ids to put behind the tokens: EOS, unless a token that ends the text is there already."""
        there = rendered.closed or tokens.ids[tokens.prompt or 0 :][-1:] == [self.eos_id]
        return [] if self.eos_id is None or there else [self.eos_id]

    def cut(self, prompt: list[int]) -> list[int]:
        """A prompt of at most `max_prompt_length` tokens; what the tokenizer puts around a text stays."""
        limit = self.longest
        if limit is None or len(prompt) <= limit:
            return prompt
        if self.side == "right":
            behind = self.suffix if prompt[-len(self.suffix) :] == self.suffix else []
            return prompt[: max(limit - len(behind), 0)] + behind
        begins = self.prefix and prompt[: len(self.prefix)] == self.prefix
        first = min(len(self.prefix) if begins else int(prompt[0] == self.bos_id), limit)
        return prompt[:first] + prompt[len(prompt) - limit + first :]

    def _ids(self, text: str, target: bool = False, special: bool = False) -> list[int]:
        given = {"text_target" if target else "text": text}
        return list(self.tokenizer(**given, add_special_tokens=special, verbose=False)["input_ids"])

    def _trims_offsets(self) -> bool:
        """Whether offsets leave out the spaces that byte-level tokens begin with (as Llama 3's do)."""
        probe = " a a"
        found = self._with_offsets(probe)
        placed = zip(self.tokenizer.convert_ids_to_tokens(found["input_ids"]), found["offset_mapping"])
        return any(token.startswith(SPACE) and probe[start : start + 1] != " " for token, (start, _) in placed)

    def _with_spaces(self, token_id: int, start: int, end: int) -> tuple[int, int]:
        if token_id not in self._spaces:
            token = self.tokenizer.convert_ids_to_tokens(token_id)
            counts = (len(token) - len(rest) for rest in (token.lstrip(SPACE), token.rstrip(SPACE)))
            self._spaces[token_id] = (*counts, len(token))
        before, behind, length = self._spaces[token_id]
        if before == length:  # nothing but spaces: reported as empty, at its end (or, in front, at 0)
            end = max(end, length)
            return end - length, end
        return max(start - before, 0), end + behind

    def _around(self, target: bool = False) -> tuple[list[int], list[int]]:
        """What it puts before and behind a text by itself; `target`: one that a decoder writes."""
        plain, full = self._ids("a", target), self._ids("a", target, special=True)
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start : start + len(plain)] == plain:
                return full[:start], full[start + len(plain) :]
        return ([self.bos_id] if self.bos_id is not None and full[:1] == [self.bos_id] else []), []


def _bare(ids: Sequence[int], place: int) -> Tokens:
    """Tokens that stand for no character."""
    return Tokens("", list(ids), [place] * len(ids), [place] * len(ids))


def _shifted(tokens: Tokens, by: int) -> Tokens:
    starts, ends = ([place + by for place in side or ()] for side in (tokens.starts, tokens.ends))
    return tokens if tokens.starts is None else replace(tokens, starts=starts, ends=ends)


def prompt_boundary(tokens: Sequence[Tokens], prompt_end: Sequence[int]) -> int:
    """The prompt boundary: how many tokens at the start are the prompt that all these texts share."""
    if tokens[0].prompt is not None:
        return tokens[0].prompt
    whole = [t.within(end) for t, end in zip(tokens, prompt_end)]
    shared = tokens[0].ids[: whole[0]]
    for other, count in zip(tokens[1:], whole[1:]):
        shared = shared[: common_length(shared, other.ids[:count])]
    return len(shared)


def tokenizer_fingerprint(processor: Any, config: TokenizeConfig | None = None) -> str:
    """16 hex digits that identify what a tokenizer or processor does.

    With it count the settings of `config` that change tokens, spans or pictures.
    """
    tokenizer = text_tokenizer(processor)
    if tokenizer.is_fast:
        # Truncation and padding are what the last call asked for, not what the tokenizer is.
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        rules = {key: value for key, value in rules.items() if key not in ("truncation", "padding")}
    else:
        rules = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    parts: list[Any] = [rules, dict(tokenizer.special_tokens_map), tokenizer.chat_template]
    if processor is not tokenizer:
        parts.append([processor.to_dict(), processor.chat_template])
    if config is not None:
        values = {n: getattr(config, n) for n in ("max_length", "max_prompt_length", "truncation_side", "add_eos")}
        values |= {"chat": True} if config.chat else {}
        if config.prompt_role == "encoder":
            languages = [getattr(tokenizer, f"{n}_lang", None) for n in ("src", "tgt")]
            values |= {"prompt_role": "encoder", "languages": languages}
        parts.append({**values, "chat_template": template_text(config.chat_template)})
        parts.append(dict(config.chat_template_kwargs))
        parts += [config.span_config.describe()] if config.span_config is not None else []
        parts += [asdict(given) for given in (config.image, config.video) if given is not None]
    return fingerprint(parts)


class StopStrings:
    """Finds the token that completes one of some strings, none of them empty."""

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.tokenizer, self.strings = tokenizer, tuple(strings)
        # A token that shows at all shows at least one byte; a few more for those that do not show.
        self.window = max(len(s.encode()) for s in self.strings) + 8

    def hit(self, ids: Sequence[int]) -> bool:
        """Whether a stop string ends within the last token of `ids`."""
        return self._in(ids[-self.window :]) and not self._in(ids[-self.window : -1])

    def length(self, ids: Sequence[int]) -> int | None:
        """How many tokens there are up to the one that completes the first stop string; None: there is none."""
        if not self._in(ids):
            return None
        return next((end for end in range(1, len(ids) + 1) if self.hit(ids[:end])), None)

    def _in(self, ids: Sequence[int]) -> bool:
        text = _decode(self.tokenizer, ids)
        return any(s in text for s in self.strings)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Text of each token, joined the decoded whole: the last token of a character has it, the others "".

    An id that the tokenizer does not have (a docid's) is shown as its number.
    """
    size = len(tokenizer) if hasattr(tokenizer, "__len__") else None
    if size is not None and size <= max(ids, default=0):
        runs = [(known, list(run)) for known, run in groupby(ids, key=lambda i: i < size)]
        return [t for known, run in runs for t in (token_texts(tokenizer, run) if known else [f" <{i}>" for i in run])]
    texts: list[str] = []
    start = read = 0  # decode only from `start`: the last token that was read whole gives the context for spaces
    for end in range(1, len(ids) + 1):
        before, now = _decode(tokenizer, ids[start:read]), _decode(tokenizer, ids[start:end])
        if now.endswith("�") and end < len(ids):
            texts.append("")
            continue
        texts.append(now[len(before) :])
        start, read = read, end
    return texts


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False) if ids else ""
