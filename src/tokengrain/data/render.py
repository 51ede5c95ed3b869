"""`Example` -> text: where the prompt ends and which characters count, through the chat template if need be.

Messages: the prompt is what the template renders for the prompt's messages with its generation prompt; a
completion is what rendering the whole conversation adds. Of a completion, what the assistant writes counts,
from the end of a generation prompt to the end-of-turn token of the message; other roles and the template's
own headings are context. White space that a template puts behind an end-of-turn token does not count, and is
cut at the end of a completion, because no model gets to generate it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokengrain.data.config import RowError, TokenizeConfig
from tokengrain.data.fields import Message
from tokengrain.data.formats import Example
from tokengrain.data.sequences import common_length
from tokengrain.errors import ModelError

Span = tuple[int, int]
GENERATION_BLOCK = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """The text of a prompt with one completion. All positions are characters of `text`.

    Attributes:
        prompt_end: where the completion begins.
        turns: the stretches that count; None: all of the completion.
        contents: where the text of each message of the completion stands, for rewards given by character:
            one (start, end) per message, None where it could not be found or has no text.
        special: the text is a rendered template, so it has its special tokens already.
        closed: a token that ends a turn stands at the end; no EOS is to be added.
    """

    text: str
    prompt_end: int
    turns: tuple[Span, ...] | None
    contents: tuple[Span | None, ...]
    special: bool = False
    closed: bool = False


class Renderer:
    """Renders examples with a tokenizer's chat template, or the one in `config`.

    Raises:
        ModelError: `config.chat_template` is a path where there is no file.
    """

    def __init__(self, tokenizer: Any, config: TokenizeConfig) -> None:
        self.tokenizer = tokenizer
        self.template = template_text(config.chat_template)
        self.kwargs = dict(config.chat_template_kwargs)
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        marks = {str(t) for t in added if getattr(t, "special", True)} | set(tokenizer.all_special_tokens)
        self._end_marks = tuple(mark for mark in marks if mark.strip())

    def __call__(self, example: Example) -> list[Rendered]:
        """One text per completion. Raises `RowError`, and `ModelError` where a template is lacking."""
        if isinstance(example.prompt, str):
            start = len(example.prompt)
            texts = [example.prompt + c for c in example.completions if isinstance(c, str)]
            return [Rendered(t, start, None, ((start, len(t)),)) for t in texts]
        prompt = self.prompt(example)
        return [
            self._conversation(example, prompt, example.prompt, c, name)
            for c, name in zip(example.completions, example.fields)
            if not isinstance(c, str)
        ]

    def prompt(self, example: Example) -> str:
        """The text of a prompt alone: what a model is given to go on from. Raises as `__call__`."""
        if isinstance(example.prompt, str):
            return example.prompt
        if self.template is None and not self.tokenizer.chat_template:
            raise ModelError(
                f"the rows hold messages, and the tokenizer {type(self.tokenizer).__name__} has no chat "
                "template; expected a tokenizer that has one, `chat_template:` (a Jinja template or the path "
                "of a file that holds one), or rows of plain text (online: with `prompts.chat: false`)"
            )
        return self._render(example, example.prompt, "prompt", True)

    def _render(self, example: Example, messages: Sequence[Message], name: str, generation: bool) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tools=example.tools,
                chat_template=self.template,
                add_generation_prompt=generation,
                tokenize=False,
                **self.kwargs,
            )
        except Exception as error:  # templates raise what they like, for instance on roles that do not alternate
            raise RowError(
                "chat template",
                f"the chat template cannot render the messages ({type(error).__name__}: {error})",
                field=name,
                value=[m["role"] for m in messages],
                expected="roles and fields that the template knows",
            ) from error

    def _conversation(
        self, example: Example, prompt: str, before: list[Message], completion: list[Message], name: str
    ) -> Rendered:
        text = self._render(example, [*before, *completion], name, False)
        start = self._completion_start(example, prompt, before, text, name)
        if len(completion) == 1:
            turns = [(start, len(text))]
        else:
            turns = self._turns(example, prompt, before, completion, text, name)
        turns = [self._without_tail(text, turn) for turn in turns]
        text = text[: turns[-1][1]]
        return Rendered(
            text,
            start,
            tuple(turns),
            _contents(text, start, completion, turns),
            special=True,
            closed=text.endswith(self._end_marks),
        )

    def _completion_start(self, example: Example, prompt: str, before: list[Message], text: str, name: str) -> int:
        if text.startswith(prompt):
            return len(prompt)
        # A generation prompt may go on beyond what the template writes before an answer (an empty thinking
        # block, say); then the completion begins where the two part. The messages must be rendered alike.
        shared = common_length(prompt, text)
        if shared < len(self._render(example, before, "prompt", False).rstrip()):
            raise RowError(
                "chat template",
                "the chat template renders the prompt differently once a completion follows",
                field=name,
                value=text[max(0, shared - 20) : shared + 40],
                expected=f"the rendered prompt to go on with {prompt[shared : shared + 40]!r}",
            )
        return shared

    def _turns(
        self,
        example: Example,
        prompt: str,
        before: list[Message],
        completion: list[Message],
        text: str,
        name: str,
    ) -> list[Span]:
        """The assistant's turns in a completion of several messages."""
        turns = []
        for index, message in enumerate(completion):
            if message["role"] != "assistant":
                continue
            opening, messages = prompt, [*before, *completion[: index + 1]]
            if index:
                opening = self._render(example, messages[:-1], name, True)
            closing = self._render(example, messages, name, False)
            if not (text.startswith(opening) and text.startswith(closing)):
                return self._marked_turns(example, before, completion, text, name)
            turns.append((len(opening), len(closing)))
        return turns

    def _marked_turns(
        self, example: Example, before: list[Message], completion: list[Message], text: str, name: str
    ) -> list[Span]:
        """The turns by `{% generation %}` blocks, for templates that rewrite earlier turns."""
        template = self.template or self.tokenizer.get_chat_template(None, example.tools)
        if not GENERATION_BLOCK.search(template):
            raise RowError(
                "chat template",
                "the chat template rewrites earlier turns, so what the assistant wrote cannot be told apart",
                field=name,
                value=[m["role"] for m in completion],
                expected="one assistant message per completion, or a template with {% generation %} blocks",
            )
        from transformers.utils.chat_template_utils import render_jinja_template

        render: Any = render_jinja_template  # declared to return a str
        _, marked = render(
            conversations=[[*before, *completion]],
            tools=example.tools,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.kwargs},
        )
        count = sum(m["role"] == "assistant" for m in completion)
        turns = []
        for start, end in marked[0][-count:]:
            # Where the block leaves out the end-of-turn token, it still belongs to the turn.
            mark = next((m for m in self._end_marks if text.startswith(m, end)), "")
            turns.append((start, end + len(mark)))
        return turns

    def _without_tail(self, text: str, turn: Span) -> Span:
        start, end = turn
        stripped = text[start:end].rstrip()
        return (start, start + len(stripped)) if stripped.endswith(self._end_marks) else turn


def template_text(template: str | None) -> str | None:
    """A chat template given as itself, or as the path of a file that holds it.

    Raises:
        ModelError: it is neither.
    """
    if template is None or "{%" in template or "{{" in template:
        return template
    path = Path(template).expanduser()
    if not path.is_file():
        raise ModelError(
            f"chat_template is {template!r}; expected a Jinja template or the path of a file that holds one"
        )
    return path.read_text(encoding="utf-8")


def _contents(
    text: str, start: int, completion: Sequence[Mapping[str, Any]], turns: Sequence[Span]
) -> tuple[Span | None, ...]:
    """Where each message's content stands, as if the template had not stripped it; the assistant's in its `turns`."""
    found: list[Span | None] = []
    left = list(turns)
    for message in completion:
        if message["role"] == "assistant" and left:  # a heading before the turn may hold the same letters
            start = left.pop(0)[0]
        content = message.get("content") or ""
        core = content.strip()
        at = text.find(core, start) if core else -1
        if at < 0:
            found.append(None)
            continue
        first = at - (len(content) - len(content.lstrip()))
        found.append((first, first + len(content)))
        start = at + len(core)
    return tuple(found)
