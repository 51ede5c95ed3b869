"""Spans: the tokens in which chosen and rejected differ in substance (RRPO, arXiv 2504.12083).

`SpanConfig` says where they come from. Here are the pure parts: the diff of two sequences, and text with tags.
`tokengrain.data.marking` carries them over to a row's tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher, get_close_matches
from itertools import pairwise
from typing import Any, Literal, get_args

from tokengrain.errors import RecipeError, require, shown
from tokengrain.settings import load_callable, nearest, source_of

SOURCES = ("diff", "tags", "column")
Level = Literal["word", "token"]
OnNone = Literal["keep", "skip", "error"]

# Words with their apostrophes and hyphens; characters of scripts without spaces, and signs, one by one.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+(?:['’-][^\W{_NO_SPACES}]+)*|[^\w\s]")

CLOSING_SIGNS = ".,;:!?)]}%’'\""


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
        names = list(cls.__dataclass_fields__)
        if not isinstance(value, Mapping):
            raise RecipeError(f"spans is {shown(value)}; expected a source, or a mapping of {', '.join(names)}")
        for name in value:
            require(name in names, RecipeError, f"spans.{name}: unknown key{nearest(name, names)}")
        return cls(**value)

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


def diff_spans(
    chosen: Sequence[Hashable],
    rejected: Sequence[Hashable],
    *,
    min_match_size: int = 1,
    keep_one_sided: bool = False,
    autojunk: bool = False,
) -> tuple[list[int], list[int]]:
    """Where two sequences differ: 0 for a shared item, k for one in the k-th span, one number per item.

    Ratcliff–Obershelp matching blocks (`difflib.SequenceMatcher`); blocks shorter than `min_match_size` do not count.
    What lies between two blocks is a span if neither side is empty there, so that the k-th spans of both sides belong
    together. An insertion or deletion (and so text that was moved, which is one of each) is 0 unless `keep_one_sided`.

    Source: RRPO's diff (`get_diff_signs` of the authors' VideoChat2 code), with difflib's junk rule off.
    """
    matcher = SequenceMatcher(None, chosen, rejected, autojunk=autojunk)
    *blocks, end = matcher.get_matching_blocks()  # `end` is difflib's mark: empty, behind both sequences
    equal = [(0, 0, 0), *(b for b in blocks if b.size >= min_match_size), end]
    marks, count = ([0] * len(chosen), [0] * len(rejected)), 0
    for (a, b, size), (next_a, next_b, _) in pairwise(equal):
        gaps = (a + size, next_a), (b + size, next_b)
        empty = sum(start == stop for start, stop in gaps)
        if empty == 2 or (empty == 1 and not keep_one_sided):
            continue
        count += 1
        for side, (start, stop) in zip(marks, gaps):
            side[start:stop] = [count] * (stop - start)
    return marks


class TagError(ValueError):
    """Tags that do not pair up; the message says which and where."""


def split_tags(text: str, opening: str, closing: str) -> list[tuple[str, bool]]:
    """Pieces of a text in order, with whether each stood between tags. Raises `TagError` if they do not pair up."""
    pieces: list[tuple[str, bool]] = []
    inside, at, opened = False, 0, 0
    for found in re.finditer(f"{re.escape(opening)}|{re.escape(closing)}", text):
        if (found.group() == opening) == inside:
            why = f"stands within the stretch that begins at {opened}" if inside else "closes nothing"
            raise TagError(f"{found.group()} at character {found.start()} {why}")
        pieces.append((text[at : found.start()], inside))
        inside, at, opened = not inside, found.end(), found.start()
    if inside:
        raise TagError(f"{opening} at character {opened} is not closed")
    return [*pieces, (text[at:], False)]


def strip_tags(text: str, opening: str, closing: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without tags, and the tagged stretches `[start, end)`, but for empty ones, as characters of it.

    The space that `<MASK> … </MASK>` puts on either side goes as well where it would double another one, or stand at
    the end of the text or before punctuation.
    """
    pieces = split_tags(text, opening, closing)
    out, stretches = "", []
    for index, (piece, tagged) in enumerate(pieces):
        if tagged and len(piece) > 2 and piece[0] == piece[-1] == " " and piece.strip() == piece[1:-1]:
            behind = "".join(p for p, _ in pieces[index + 1 :])[:1]
            piece = piece if out and not out[-1].isspace() else piece[1:]
            piece = piece[:-1] if not behind or behind.isspace() or behind in CLOSING_SIGNS else piece
        if tagged and piece:
            stretches.append((len(out), len(out) + len(piece)))
        out += piece
    return out, stretches


def tagged_stretches(marked: str, text: str, opening: str, closing: str) -> list[tuple[int, int]]:
    """The tagged stretches of `marked` as characters of `text`, the same text without tags; white space aside."""
    at = [i for i, c in enumerate(text) if not c.isspace()]
    position, stretches = 0, []
    for piece, tagged in split_tags(marked, opening, closing):
        first = position
        for c in "".join(piece.split()):
            if position == len(at) or text[at[position]] != c:
                where = at[position] if position < len(at) else len(text)
                raise TagError(f"without its tags it goes on otherwise from character {where} of the untagged text on")
            position += 1
        if tagged and position > first:
            stretches.append((at[first], at[position - 1] + 1))
    if position < len(at):
        raise TagError(f"without its tags it ends at character {at[position]} of the untagged text")
    return stretches


def parse_span_tags(ids: Sequence[int], *, space_id: int, open_id: int, close_id: int) -> tuple[list[int], list[int]]:
    """Token ids with tag tokens, as the authors' code reads them: `(ids without tags, span of each)`.

    A tag takes a stand-alone space token before it along, or else one behind it. The k-th opening tag begins
    span k. Unlike the authors' parser (`process_masked_tokens`) a tag at the very end is a tag too.
    """
    kept, spans = list[int](), list[int]()
    span, inside, k = 0, False, 0
    while k < len(ids):
        first, second = ids[k], ids[k + 1] if k + 1 < len(ids) else None
        spaced = first == space_id and second in (open_id, close_id)
        tag = second if spaced else first
        if tag not in (open_id, close_id):
            kept.append(first)
            spans.append(span if inside else 0)
            k += 1
            continue
        inside = tag == open_id
        span += inside
        k += 2 if spaced or second == space_id else 1
    return kept, spans
