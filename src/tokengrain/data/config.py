"""How rows become token ids: `SpanConfig` and `TokenizeConfig`, and the error for one bad row."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from typing import Any, ClassVar, Literal, TypeVar, get_args

from tokengrain.batch import PromptRole
from tokengrain.errors import DataError, RecipeError, require, shown
from tokengrain.settings import Count, Positive, load_callable, nearest, source_of, validate_settings

T = TypeVar("T")

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


SOURCES = ("diff", "tags", "column")
Level = Literal["word", "token"]
OnNone = Literal["keep", "skip", "error"]
TruncationSide = Literal["left", "right"]
OnInvalid = Literal["error", "skip"]
OnDropped = Literal["error", "keep"]
LENGTHS = (("max_length", 2, ", or none"), ("max_prompt_length", 1, ", or none"), ("min_completion_length", 1, ""))


@dataclass(frozen=True)
class SpanConfig:
    """Where the spans of a pair come from (`data.spans` in a recipe; a string is short for its `source`)."""

    # "diff": what differs between chosen and rejected; "tags": tags in the texts, or in the columns `chosen_masked` and
    # `rejected_masked`; "column": the columns `chosen_spans` and `rejected_spans`; or a function
    # `(row) -> (chosen spans, rejected spans)`, also as "module:function" or "path.py:function".
    source: str | Callable[[Mapping[str, Any]], Any] = "diff"
    # For "diff".
    level: Level = "word"  # compare words (with punctuation, without white space) or tokens
    min_match_size: int = 1  # what both sides have in common counts as equal from so many words (tokens) on
    keep_one_sided: bool = False  # insertions and deletions are spans too, on the side that has them
    # Difflib's own rule for long texts, as in the authors' code: in a rejected text of 200 or more words (tokens) those
    # that are over 1 % of it are not used to find what is equal, so that one edit can mark all that follows.
    autojunk: bool = False
    tags: Sequence[str] = ("<MASK>", "</MASK>")  # opening and closing; for "tags"
    on_none: OnNone = "keep"  # what becomes of a pair without a span: all its tokens are shared; or "skip", "error"

    def __post_init__(self) -> None:
        source = self.source
        named = isinstance(source, str) and (source in SOURCES or ":" in source)
        near = get_close_matches(str(source), SOURCES, n=1)
        expected = f"one of {', '.join(SOURCES)}, or 'module:function' or 'path.py:function'"
        expected += f"; did you mean {near[0]!r}?" if near else ""
        require(named or callable(source), RecipeError, f"spans.source is {shown(source)}; expected {expected}")
        for name, value, choices in (
            ("level", self.level, get_args(Level)),
            ("on_none", self.on_none, get_args(OnNone)),
        ):
            what = f"spans.{name} is {shown(value)}; expected one of {', '.join(choices)}"
            require(value in choices, RecipeError, what)
        size, tags = self.min_match_size, self.tags
        whole = isinstance(size, int) and not isinstance(size, bool) and size >= 1
        require(whole, RecipeError, f"spans.min_match_size is {shown(size)}; expected a whole number of at least 1")
        texts = isinstance(tags, Sequence) and not isinstance(tags, str) and all(isinstance(t, str) and t for t in tags)
        what = f"spans.tags is {shown(tags)}; expected two texts that differ, opening and closing"
        require(texts and len(set(tags)) == len(tags) == 2, RecipeError, what)
        object.__setattr__(self, "tags", tuple(tags))

    @classmethod
    def of(cls, value: Any) -> SpanConfig:
        """From settings, a mapping of them (as in a recipe), or the source alone. Raises `RecipeError`."""
        if isinstance(value, SpanConfig):
            return value
        if isinstance(value, str) or callable(value):
            return cls(source=value)
        return _of_mapping(cls, "spans", value, "a source, or a mapping")

    def load(self) -> Callable[[Mapping[str, Any]], Any] | None:
        """The user's function, if the source is one. Raises `RecipeError` where there is none of that name."""
        if isinstance(self.source, str):
            return load_callable(self.source) if ":" in self.source else None
        return self.source

    def describe(self) -> dict[str, Any]:
        """The settings as JSON-like values, a function with its source text: for fingerprints."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__} | {"tags": list(self.tags)}
        function = self.load()
        if function is not None:
            name = getattr(function, "__qualname__", type(function).__qualname__)
            values["source"] = [name, source_of(function)]
        return values


def _of_mapping(kind: type[T], name: str, value: Any, expected: str = "a mapping") -> T:
    """Settings of a kind, a dataclass, from a mapping of its fields. Raises `RecipeError`, which calls them `name`."""
    names = list(inspect.signature(kind).parameters)
    if not isinstance(value, Mapping):
        raise RecipeError(f"{name} is {shown(value)}; expected {expected} of {', '.join(names)}")
    for key in value:
        require(key in names, RecipeError, f"{name}.{key}: unknown key{nearest(key, names)}")
    return kind(**value)


class _Pictures:
    """Settings of pictures, checked where they are made."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        given = {key: value for key, value in vars(self).items() if value is not None}
        require(given, RecipeError, f"{self.kind} is empty; expected settings of {self.kind}s, or none")
        validate_settings(self.kind, type(self), given, also=tuple(vars(self)))

    @classmethod
    def of(cls, value: Any) -> Any:
        """From settings or a mapping of them. Raises `RecipeError`."""
        return value if value is None or isinstance(value, cls) else _of_mapping(cls, cls.kind, value)


@dataclass(frozen=True)
class ImageConfig(_Pictures):
    """How images are read (`data.image` in a recipe). Sizes are in pixels, width times height."""

    kind = "image"
    min_pixels: Count | None = None  # smaller images are made larger
    max_pixels: Count | None = None  # larger images are made smaller; None: as the model's processor does
    folder: str | None = None  # what paths in rows are relative to; None: the folder of the file of rows

    def __post_init__(self) -> None:
        super().__post_init__()
        least, most = self.min_pixels or 0, self.max_pixels or self.min_pixels or 0
        require(least <= most, RecipeError, f"image.min_pixels is {least}; expected at most max_pixels, {most}")


@dataclass(frozen=True)
class VideoConfig(_Pictures):
    """How videos are read (`data.video` in a recipe)."""

    kind = "video"
    frames: Count | None = None  # of a longer video so many frames, evenly spaced; None: 32
    max_pixels: Count | None = None  # larger frames are made smaller
    fps: Positive | None = None  # of videos that are lists of frames, per second; None: as the model's processor does


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
        image, video: how pictures are read: an `ImageConfig`, a `VideoConfig`, or mappings of their fields.
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
    image: ImageConfig | None = None
    video: VideoConfig | None = None

    def __post_init__(self) -> None:
        if self.spans is not None:
            object.__setattr__(self, "spans", SpanConfig.of(self.spans))
        object.__setattr__(self, "image", ImageConfig.of(self.image))
        object.__setattr__(self, "video", VideoConfig.of(self.video))
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
