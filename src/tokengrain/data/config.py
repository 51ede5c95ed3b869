"""How rows become token ids: `TokenizeConfig`, and the error for one bad row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tokengrain.data.spans import SpanConfig
from tokengrain.errors import DataError, RecipeError, shown

# Where rows are tokenised together; also how often progress is reported.
BATCH_ROWS = 256
# The reason of pairs without a span, which `spans.on_none` decides about.
NO_SPAN = "no span"


class RowError(DataError):
    """One row that cannot be used.

    Args:
        reason: the kind of defect in two or three words; reports count rows by it.

    The other arguments are those of `DataError`. `located` adds the file and the row afterwards, so that the
    code that looks at a single row need not carry them along.
    """

    def __init__(
        self,
        reason: str,
        what: str,
        *,
        field: str | None = None,
        value: Any = ...,
        expected: str | None = None,
    ) -> None:
        super().__init__(what, field=field, value=value, expected=expected)
        self.reason = reason

    def located(self, file: object, row: object, note: str = "") -> DataError:
        """The same error as one that names the file and the row; `note` is put behind the message."""
        error = DataError(self.what, file=file, row=row, field=self.field, value=self.value, expected=self.expected)
        error.args = (f"{error}{note}",)
        return error


@dataclass(frozen=True)
class TokenizeConfig:
    """Settings of tokenisation. All lengths are in tokens.

    Args:
        max_length: most tokens of a prompt with one of its completions; None: no limit. A longer completion
            is cut at its end and then has no EOS.
        max_prompt_length: most tokens of a prompt; None: no limit. A longer prompt is cut on
            `truncation_side`. Without it prompts are never cut: a prompt that leaves too little room within
            `max_length` makes its row invalid.
        truncation_side: the side a long prompt loses: "left" keeps its end (and BOS), "right" its start.
        min_completion_length: a completion that must be cut keeps at least so many tokens, or else its row
            is invalid.
        on_invalid: "error" raises on the first invalid row, after all rows were looked at; "skip" leaves
            invalid rows out and counts them in the report. A damaged file is an error either way.
        add_eos: end completions with the tokenizer's EOS where they do not end with it (or, in a chat
            template, with the template's end-of-turn token) already.
        chat_template: a Jinja template, or the path of a file that holds one; None: the tokenizer's own.
        chat_template_kwargs: further variables for the chat template, such as `{"enable_thinking": False}`.
        spans: mark the spans in which chosen and rejected differ, as the per-token column "spans"; a
            `SpanConfig`, a mapping of its fields, or its source alone; None: no such column. Rows with one
            completion have no spans, but tags are taken out of them too.
    """

    max_length: int | None = None
    max_prompt_length: int | None = None
    truncation_side: Literal["left", "right"] = "left"
    min_completion_length: int = 1
    on_invalid: Literal["error", "skip"] = "error"
    add_eos: bool = True
    chat_template: str | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    spans: SpanConfig | str | None = None

    def __post_init__(self) -> None:
        if self.spans is not None:
            object.__setattr__(self, "spans", SpanConfig.of(self.spans))
        for name, least in (("max_length", 2), ("max_prompt_length", 1), ("min_completion_length", 1)):
            value = getattr(self, name)
            optional = name != "min_completion_length"
            if value is None and optional:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise RecipeError(
                    f"{name} is {shown(value)}; expected a whole number of at least {least}"
                    + (", or none" if optional else "")
                )
        for name, choices in (("truncation_side", ("left", "right")), ("on_invalid", ("error", "skip"))):
            if getattr(self, name) not in choices:
                raise RecipeError(f"{name} is {shown(getattr(self, name))}; expected one of {', '.join(choices)}")
        if self.max_length is not None:
            left = self.max_length - (self.max_prompt_length or 1)
            if left < self.min_completion_length:
                raise RecipeError(
                    f"max_length {self.max_length} leaves {left} tokens for a completion beside "
                    f"max_prompt_length {self.max_prompt_length}; expected at least min_completion_length = "
                    f"{self.min_completion_length}"
                )

    @property
    def span_config(self) -> SpanConfig | None:
        """Where spans come from; None: there are none."""
        return self.spans if isinstance(self.spans, SpanConfig) else None

    def skips(self, error: RowError) -> bool:
        """Whether a row with this error is left out; else it is an error."""
        spans = self.span_config
        if spans is not None and error.reason == NO_SPAN:
            return spans.on_none == "skip"
        return self.on_invalid == "skip"
