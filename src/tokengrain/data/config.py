"""How rows become token ids: `TokenizeConfig`, and the error for one bad row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from tokengrain.batch import PromptRole
from tokengrain.data.spans import SpanConfig
from tokengrain.errors import DataError, RecipeError, require, shown

BATCH_ROWS = 256  # rows that are tokenised together
NO_SPAN = "no span"  # the reason of pairs without a span, which `spans.on_none` decides about


class RowError(DataError):
    """One row that cannot be used; reports count rows by `reason`, two or three words."""

    def __init__(self, reason: str, what: str, **details: Any) -> None:
        super().__init__(what, **details)
        self.reason = reason

    def located(self, file: object, row: object, note: str = "") -> DataError:
        """The same error as one that names the file and the row; `note` is put behind the message."""
        error = DataError(self.what, file=file, row=row, field=self.field, value=self.value, expected=self.expected)
        error.args = (f"{error}{note}",)
        return error


def check(condition: object, reason: str, what: str, **details: Any) -> None:
    """Raise `RowError(reason, what, field=, value=, expected=)` unless the condition holds."""
    if not condition:
        raise RowError(reason, what, **details)


TruncationSide = Literal["left", "right"]
OnInvalid = Literal["error", "skip"]
OnDropped = Literal["error", "keep"]
LENGTHS = (("max_length", 2, ", or none"), ("max_prompt_length", 1, ", or none"), ("min_completion_length", 1, ""))


@dataclass(frozen=True)
class TokenizeConfig:
    """Settings of tokenisation. All lengths are in tokens.

    Args:
        max_length: most tokens of a prompt with one of its completions; None: no limit. A longer completion is cut at
            its end and then has no EOS.
        max_prompt_length: most tokens of a prompt; None: no limit. A longer prompt is cut on `truncation_side`. Without
            it a prompt that leaves too little room within `max_length` makes its row invalid.
        truncation_side: the side a long prompt loses: "left" keeps its end (and BOS), "right" its start.
        min_completion_length: a completion that must be cut keeps at least so many tokens, or else its row is invalid.
        on_invalid: "error" raises on the first invalid row, after all rows were looked at; "skip" leaves invalid rows
            out and counts them in the report. A damaged file is an error either way.
        add_eos: end completions with the tokenizer's EOS where they do not end with it (or, in a chat template, with
            the template's end-of-turn token) already.
        chat_template: a Jinja template, or the path of a file that holds one; None: the tokenizer's own.
        chat_template_kwargs: further variables for the chat template, such as `{"enable_thinking": False}`.
        spans: mark the spans in which chosen and rejected differ, as the per-token column "spans"; a `SpanConfig`, a
            mapping of its fields, or its source alone; None: no such column. Rows with one completion have no spans,
            but tags are taken out of them too.
        chat: make messages of text rows: the prompt becomes the user's, a completion the assistant's.
        prompt_role: what a prompt is to the model: "prefix", the beginning of its text, or "encoder", the input of an
            encoder, which is tokenised apart from its completions. Trainers and runs set it by their model.
        on_dropped: "error" makes a row invalid if the chat template drops text of it (reasoning, tool calls, tools,
            content); "keep" trains on the rest, and the report counts such rows.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    truncation_side: TruncationSide = "left"
    min_completion_length: int = 1
    on_invalid: OnInvalid = "error"
    add_eos: bool = True
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    spans: SpanConfig | str | None = None
    chat: bool = False
    on_dropped: OnDropped = "error"
    prompt_role: PromptRole = "prefix"

    def __post_init__(self) -> None:
        if self.spans is not None:
            object.__setattr__(self, "spans", SpanConfig.of(self.spans))
        for name, least, optional in LENGTHS:
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= least
            what = f"{name} is {shown(value)}; expected a whole number of at least {least}{optional}"
            require(whole or (value is None and optional), RecipeError, what)
        kinds: dict[str, Any] = {"truncation_side": TruncationSide, "on_invalid": OnInvalid, "on_dropped": OnDropped}
        kinds["prompt_role"] = PromptRole
        for name, kind in kinds.items():
            value, choices = getattr(self, name), get_args(kind)
            require(value in choices, RecipeError, f"{name} is {shown(value)}; expected one of {', '.join(choices)}")
        if self.max_length is not None:
            left = self.max_length - (self.max_prompt_length or 1)
            what = f"{left} tokens for a completion beside max_prompt_length {self.max_prompt_length}"
            expected = f"at least min_completion_length = {self.min_completion_length}"
            fits = left >= self.min_completion_length
            require(fits, RecipeError, f"max_length {self.max_length} leaves {what}; expected {expected}")

    @property
    def span_config(self) -> SpanConfig | None:
        return self.spans if isinstance(self.spans, SpanConfig) else None

    def skips(self, error: RowError) -> bool:
        """Whether a row with this error is left out; else it is an error."""
        if self.span_config is not None and error.reason == NO_SPAN:
            return self.span_config.on_none == "skip"
        return self.on_invalid == "skip"
