"""Per-token columns of a row: `*_token_rewards`, `*_ref_logps`, and its spans as the column "spans".

Per token: one number for every token of the completion that counts, in order, EOS (or the end-of-turn token) included,
as the completion is before it is cut; or, where this configuration cuts it, as it is afterwards.

Per span of characters: `{"start": .., "end": ..}`, characters `[start, end)` of the completion's text, with `"reward"`
for token rewards. A token belongs to a span if any of its characters does, and to the first one if it has characters of
several. All others have 0: EOS, what a chat template writes, and what it strips. In a completion of several messages a
span also names its `"message"` (from 0), and its characters are those of that message.
"""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import suppress
from difflib import SequenceMatcher
from functools import partial
from itertools import groupby, pairwise
from numbers import Real
from typing import Any, NamedTuple

from tokengrain.data.config import Level, RowError, SpanConfig, check
from tokengrain.data.formats import CanonicalRow, Content, check_misspelt, content
from tokengrain.data.tokens import Rendered, Tokens
from tokengrain.errors import once
from tokengrain.settings import LARGEST

LOGP_ROUNDING = 1e-3  # log-probabilities are at most 0, give or take this
REASONS = {"token_rewards": "token rewards", "ref_logps": "reference log-probabilities", "spans": "spans"}
EXPECTED = {"token_rewards": "a list of numbers, or of spans", "ref_logps": "a list of numbers"}
EXPECTED["spans"] = 'a list of {"start": character, "end": character}'


def token_column(
    name: str, value: Any, field: str, *, rendered: Rendered, tokens: Tokens, counted: Sequence[int], kept: int
) -> list[float]:
    """`kept` numbers, one per token that counts once the completion is cut, from a row's column. Raises `RowError`.

    `value` is numbers, spans (rewards only), or either as JSON text (CSV files). `counted` has the index into
    `tokens.ids` of every counted token of the uncut completion; those behind the text count from `len(tokens.ids)`.
    """
    values = parsed_list(name, value, field)
    if name == "token_rewards" and values and isinstance(values[0], Mapping):
        rewards = [0.0] * len(counted)
        found = char_spans(values, field, name, rendered, also=("reward",))
        for start, end, index in reversed(found):  # so that the first of several wins
            reward = _number(values[index]["reward"], f"the reward of span {index}", field, name)
            for token in tokens_of(start, end, tokens, counted):
                rewards[token] = reward
        return rewards[:kept]
    expected = f"{len(counted)}: one per token of the completion that counts, EOS included"
    if kept < len(counted):
        expected += f" (or {kept}, as it is cut)"
    fits, what = len(values) in (len(counted), kept), "does not fit the completion's tokens"
    check(fits, REASONS[name], what, field=field, value=f"{len(values)} numbers", expected=expected)
    limit = LOGP_ROUNDING if name == "ref_logps" else math.inf
    return [_number(v, f"value {i}", field, name, limit) for i, v in enumerate(values)][:kept]


def no_spans(values: Sequence[Any], others: Sequence[Any]) -> bool:
    """Whether an empty list of token rewards means "no spans on this side": the other side's are no numbers."""
    return not len(values) and all(isinstance(other, Mapping) for other in others)


def parsed_list(name: str, value: Any, field: str) -> list[Any]:
    """The list that stands in a column, also as JSON text. Raises `RowError`."""
    if isinstance(value, str):
        with suppress(ValueError, RecursionError):  # text that is not JSON raises below
            value = json.loads(value, object_pairs_hook=once)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        what = f"is of type {type(value).__name__}"
        raise RowError(REASONS[name], what, field=field, value=value, expected=EXPECTED[name])
    return list(value)


def _number(value: Any, what: str, field: str, name: str, limit: float = math.inf) -> float:
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    for holds, problem, expected in (
        (lambda: is_number, "not a number", "a number"),
        (lambda: value == value and abs(value) != math.inf, "not finite", "a finite number"),
        (lambda: abs(value) <= LARGEST, "too large", f"a number of at most {LARGEST:g}"),
        (lambda: value <= limit, "not a log-probability", "at most 0"),
    ):
        if not holds():
            raise RowError(REASONS[name], f"{what} is {problem}", field=field, value=value, expected=expected)
    return float(value)


def char_spans(
    values: Sequence[Any], field: str, name: str, rendered: Rendered, also: Sequence[str] = ()
) -> list[tuple[int, int, int]]:
    """Character spans of a row, checked: `(start, end, index in values)`, characters of the whole text, in order.

    A span loses characters that the template stripped, and may be left without any. Each must have the keys `also`.
    """
    found = sorted((*_span(span, f"span {i}", field, name, rendered, also), i) for i, span in enumerate(values))
    for (_, end, *_), (start, *_) in pairwise(found):
        expected = "spans that share no character"
        check(start >= end, REASONS[name], "two spans overlap", field=field, value=list(values), expected=expected)
    return [(max(start, low), min(end, high), i) for start, end, low, high, i in found]


def tokens_of(start: int, end: int, tokens: Tokens, counted: Sequence[int]) -> range:
    """Which of the counted tokens share a character with `[start, end)`, as places in `counted`."""
    if start >= end:
        return range(0)
    first, last = tokens.within(start), tokens.touching(end)
    return range(bisect_left(counted, first), bisect_left(counted, last))


def _span(
    span: Any, what: str, field: str, name: str, rendered: Rendered, also: Sequence[str]
) -> tuple[int, int, int, int]:
    """`(start, end)` of a span and of what the text has of its message."""

    def need(condition: object, why: str, expected: str) -> None:
        check(condition, REASONS[name], f"{what} {why}", field=field, value=span, expected=expected)

    keys = "".join(f', "{key}": number' for key in also)
    whole = isinstance(span, Mapping) and {"start", "end", *also} <= span.keys()
    need(whole, "is not a span", f'{{"start": character, "end": character{keys}}}')
    known = ("start", "end", "message", *(also or ("id",)))
    other = [key for key, value in span.items() if value is not None and key not in known]  # null: of parquet's structs
    need(not other, f"has an unknown key {other[0] if other else None!r}", f"{', '.join(known)}")
    texts = [i for i, place in enumerate(rendered.contents) if place is not None]
    message = span.get("message")
    one_of = f'"message": one of {texts}'
    need(message is not None or len(rendered.contents) <= 1, "does not say which message it is about", one_of)
    message = message or 0
    need(message in texts, "is about a message without text in the rendered completion", one_of)
    first, last = rendered.contents[message] or (0, 0)
    start, end, length = span["start"], span["end"], last - first
    numbers = not any(isinstance(p, bool) or not isinstance(p, int) for p in (start, end))
    expected = f"whole numbers 0 <= start < end <= {length}, the length of the text"
    need(numbers and 0 <= start < end <= length, "is out of range", expected)
    return (first + start, first + end, *rendered.visible(message))


# ----------------------------------------------------------------------------------------------------
# Spans of pairs: 0 for a shared token, k for one of the k-th span. They are characters of the texts without tags.

COLUMN = "spans"
TAGGED = ("chosen", "rejected", "completion", "messages", "text")  # columns that may hold tagged texts
SIDES = ("chosen", "rejected")
Found = dict[str, list[dict[str, Any]]]  # spans by column: characters of its text, or of its message number `message`


class Marked(NamedTuple):
    """A completion: its content, its text and tokens, and which of these (by index) count, uncut."""

    content: Content
    rendered: Rendered
    tokens: Tokens
    counted: Sequence[int]


class SpanMarker:
    """Finds the spans of pairs."""

    def __init__(self, config: SpanConfig) -> None:
        self.config = config
        self.function: Any = config.load()

    def read(self, row: Any) -> tuple[Any, Found]:
        """The row without tags, and the stretches that stood between them. Raises `RowError`."""
        if self.config.source != "tags" or not isinstance(row, Mapping):
            return row, {}
        plain, found = CanonicalRow(row), {}
        for name in TAGGED:
            if row.get(name) is not None:
                plain[name], found[name] = self._untagged(name, content(row, name))
        for _, text in _texts(content(row, "prompt") if row.get("prompt") is not None else []):
            plain_text, expected = not any(tag in text for tag in self.config.tags), "tags in completions only"
            check(plain_text, "span tags", "has a tag", field="prompt", value=text, expected=expected)
        return plain, found

    def __call__(self, row: Mapping[str, Any], found: Found, sides: Sequence[Marked]) -> list[list[float]]:
        """The span of each counted token of chosen and rejected, before they are cut; `read` gave `row` and `found`."""
        if self.config.source == "diff":
            return self._diff(sides)
        if self.function is not None:
            spans = list(zip(self._asked(row), SIDES))
        elif self.config.source == "column":
            spans = [(_column(row, f"{name}_spans"), f"{name}_spans") for name in SIDES]
        else:
            spans = [self._tagged(row, name, found, side) for name, side in zip(SIDES, sides)]
        return [_ids_of(values, field, side) for (values, field), side in zip(spans, sides)]

    def _untagged(self, name: str, value: Content) -> tuple[Content, list[dict[str, Any]]]:
        """A column's text or messages without tags, and the tagged stretches by message."""
        plain, spans = {}, []
        for number, text in _texts(value):
            plain[number], stretches = self._read_tags(name, number, partial(strip_tags, text))
            spans += _of_message(number, stretches)
        if not isinstance(value, list):
            return (plain[None] if isinstance(value, str) else value), spans
        return [{**m, "content": plain[i]} if i in plain else m for i, m in enumerate(value)], spans

    def _tagged(self, row: Mapping[str, Any], name: str, found: Found, side: Marked) -> tuple[list[Any], str]:
        """The tagged stretches of a completion as spans, and the column they come from."""
        field, whole, spans, masked = name, content(row, name), found[name], f"{name}_masked"
        if row.get(masked) is not None:
            field, spans = masked, self._masked(masked, content(row, masked), whole)
        else:
            what, expected = "is missing while the other completion has its own", "tagged texts of both or of none"
            none = row.get(f"{SIDES[name == 'chosen']}_masked") is None
            check(none, "missing column", what, field=masked, expected=expected)
        # The column may begin with the prompt.
        before, key = len(whole) - len(side.content), "start" if isinstance(whole, str) else "message"
        behind, what = all(span[key] >= before for span in spans), "has tags in the prompt"
        check(behind, "span tags", what, field=field, value=whole, expected="tags behind the prompt")
        if isinstance(whole, str):
            return [{"start": span["start"] - before, "end": span["end"] - before} for span in spans], field
        return [span | {"message": span["message"] - before} for span in spans], field

    def _masked(self, field: str, marked: Content, plain: Content) -> list[dict[str, Any]]:
        """Spans of a text that is given twice, once with tags."""
        texts, tagged = dict(_texts(plain)), dict(_texts(marked))
        what = f"has other messages than {field.removesuffix('_masked')!r}"
        check(list(texts) == list(tagged), "span tags", what, field=field, value=marked)
        spans = []
        for number, text in tagged.items():
            spans += _of_message(number, self._read_tags(field, number, partial(tagged_stretches, text, texts[number])))
        return spans

    def _read_tags(self, field: str, message: int | None, read: Callable[..., Any]) -> Any:
        try:
            return read(*self.config.tags)
        except TagError as error:
            where = "" if message is None else f"message {message}: "
            text = f"the text of {field.removesuffix('_masked')!r} with " if field.endswith("_masked") else ""
            expected = f"{text}{' … '.join(self.config.tags)} around each span, not within another"
            raise RowError("span tags", f"{where}{error}", field=field, expected=expected) from error

    def _asked(self, row: Mapping[str, Any]) -> list[list[Any]]:
        """The user's spans of chosen and rejected, pairs (start, end) as spans."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        try:
            answer = self.function(row)
        except Exception as error:  # the user's code may raise what it likes; the row belongs in the message
            raise RowError("span function", f"{name} raised {type(error).__name__}: {error}") from error
        two, expected = _is_two(answer), "(chosen spans, rejected spans)"
        check(two, "span function", f"{name} gave no two lists", value=answer, expected=expected)
        sides = [parsed_list(COLUMN, spans, side) for side, spans in zip(SIDES, answer)]
        return [[{"start": s[0], "end": s[1]} if _is_two(s) else s for s in spans] for spans in sides]

    def _diff(self, sides: Sequence[Marked]) -> list[list[float]]:
        units = [list(_units(side, self.config.level)) for side in sides]
        options = {name: getattr(self.config, name) for name in ("min_match_size", "keep_one_sided", "autojunk")}
        marks = diff_spans(*([unit for unit, _ in found] for found in units), **options)
        columns = []
        for side, found, ids in zip(sides, units, marks):
            column = [0.0] * len(side.counted)
            # What stands between two words of a span belongs to it, unless a message ends there.
            for (span, _), run in groupby(zip(ids, found), key=lambda item: (item[0], item[1][1].message)):
                places = [place for _, (_, place) in run]
                start, end = places[0].start, places[-1].end
                if span and self.config.level == "token":
                    column[start:end] = [float(span)] * (end - start)
                elif span:
                    _mark(column, span, side, start, end)
            columns.append(column)
        return columns


def _is_two(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and len(value) == 2


def _of_message(number: int | None, stretches: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    return [{"message": number, "start": start, "end": end} for start, end in stretches]


class _Place(NamedTuple):
    """Characters `[start, end)` of the whole text (or counted tokens), in one of the completion's messages."""

    message: int
    start: int
    end: int


def _texts(value: Content) -> Iterator[tuple[int | None, str]]:
    """(number of the message, its text); (None, text) for a text."""
    if isinstance(value, str):
        yield None, value
        return
    for number, message in enumerate(value):
        if isinstance(message, dict) and isinstance(message.get("content"), str):
            yield number, message["content"]


def _bodies(side: Marked) -> Iterator[_Place]:
    """Where the texts that the assistant wrote stand, without what the template stripped."""
    for number, where in enumerate(side.rendered.contents):
        if where is None:
            continue
        start, end = where
        if isinstance(side.content, list):
            if side.content[number]["role"] != "assistant":
                continue
            text = side.content[number]["content"]
            start += len(text) - len(text.lstrip())
            end -= len(text) - len(text.rstrip())
        yield _Place(number, start, end)


def _units(side: Marked, level: Level) -> Iterator[tuple[Hashable, _Place]]:
    """What is compared: words by their characters, or the ids of tokens by their place in `side.counted`."""
    for message, start, end in _bodies(side):
        if level == "word":
            words = WORD.finditer(side.rendered.text, start, end)
            yield from ((word.group(), _Place(message, *word.span())) for word in words)
        else:
            for index in tokens_of(start, end, side.tokens, side.counted):
                yield side.tokens.ids[side.counted[index]], _Place(message, index, index + 1)


def _column(row: Mapping[str, Any], field: str) -> list[Any]:
    if row.get(field) is None:
        check_misspelt(row, field, 0.75)
        raise RowError("missing column", "column is missing", field=field, expected=f"{EXPECTED[COLUMN]}, or []")
    return parsed_list(COLUMN, row[field], field)


def _ids_of(values: Sequence[Any], field: str, side: Marked) -> list[float]:
    """A row's character spans, numbered in their order or by their own ids, over the counted tokens."""
    column = [0.0] * len(side.counted)
    found = char_spans(values, field, COLUMN, side.rendered)
    given = [value.get("id") for value in values]
    if any(i is not None for i in given):
        bad = next((i for i in given if isinstance(i, bool) or not isinstance(i, int) or not 1 <= i <= 2**24), None)
        usable, expected = bad is None and None not in given, "whole numbers from 1 to 2**24 for all spans, or no ids"
        check(usable, REASONS[COLUMN], "a span's id is not usable", field=field, value=bad, expected=expected)
    bodies = {body.message: body for body in _bodies(side)}
    for number, (start, end, index) in enumerate(found, start=1):
        body = bodies.get(values[index].get("message") or 0)
        if body is not None:  # a user's message counts for nothing
            _mark(column, given[index] or number, side, max(start, body.start), min(end, body.end))
    return column


def _mark(column: list[float], span: int, side: Marked, start: int, end: int) -> None:
    for index in tokens_of(start, end, side.tokens, side.counted):
        column[index] = column[index] or float(span)


# ----------------------------------------------------------------------------------------------------
# The pure parts: the diff of two sequences, and text with tags.

# Words with their apostrophes and hyphens; characters of scripts without spaces, and signs, one by one.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
WORD = re.compile(rf"[{_NO_SPACES}]|[^\W{_NO_SPACES}]+(?:['’-][^\W{_NO_SPACES}]+)*|[^\w\s]")

CLOSING_SIGNS = ".,;:!?)]}%’'\""


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
                raise TagError(f"without its tags it differs from character {where} of the untagged text on")
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
