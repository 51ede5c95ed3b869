"""Per-token columns of a row (`*_token_rewards`, `*_ref_logps`) -> one number per counted token.

Given per token: one number for every token of the completion that counts, in order, EOS (or the end-of-turn
token) included, as the completion is before it is cut; or, where this configuration cuts it, as it is
afterwards.

Given per span of characters: `{"start": .., "end": .., "reward": ..}`, characters `[start, end)` of the
completion's text. Every token that shares a character with a span has its reward, a token at the seam too;
one that shares characters with several spans has the first one's. All others, EOS among them, have 0. In a
completion of several messages a span also names its `"message"` (from 0), and its characters are those of
that message.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import pairwise
from numbers import Real
from typing import Any

from tokengrain.data.config import RowError
from tokengrain.data.render import Rendered
from tokengrain.data.tokenize import Tokens

# log-probabilities are at most 0, give or take rounding
LOGP_ROUNDING = 1e-3
REASONS = {"token_rewards": "token rewards", "ref_logps": "reference log-probabilities", "spans": "spans"}
EXPECTED = {
    "token_rewards": "a list of numbers, or of spans",
    "ref_logps": "a list of numbers",
    "spans": 'a list of {"start": character, "end": character}',
}


def token_column(
    name: str,
    value: Any,
    field: str,
    *,
    rendered: Rendered,
    tokens: Tokens,
    counted: Sequence[int],
    kept: int,
) -> list[float]:
    """One number per token that counts, from a row's column.

    Args:
        name: "token_rewards" or "ref_logps".
        value: what stands in the row: numbers, spans (rewards only), or either as JSON text (CSV files).
        field: the column, for messages.
        rendered, tokens: the text and its tokens.
        counted: index into `tokens.ids` of every counted token of the uncut completion; those behind
            the text (EOS) have indices from `len(tokens.ids)` on.
        kept: how many of them are left when the completion is cut.

    Returns:
        `kept` numbers.

    Raises:
        RowError: wrong type or length, not finite, spans that are out of range or overlap.
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
    if len(values) not in (len(counted), kept):
        raise RowError(
            REASONS[name],
            "does not fit the completion's tokens",
            field=field,
            value=f"{len(values)} numbers",
            expected=f"{len(counted)}: one per token of the completion that counts, EOS included"
            + (f" (or {kept}, as it is cut)" if kept < len(counted) else "")
            + (
                ""
                if values or name != "token_rewards"
                else "; where spans are meant and there is none: one of reward 0"
            ),
        )
    limit = LOGP_ROUNDING if name == "ref_logps" else math.inf
    return [_number(v, f"value {i}", field, name, limit) for i, v in enumerate(values)][:kept]


def parsed_list(name: str, value: Any, field: str) -> list[Any]:
    """The list that stands in a column, also as JSON text. Raises `RowError`."""
    if isinstance(value, str):
        with suppress(json.JSONDecodeError):  # text that is not JSON is refused below
            value = json.loads(value)
    if hasattr(value, "tolist"):
        value = value.tolist()
    if not isinstance(value, Sequence) or isinstance(value, (str, bytes)):
        raise RowError(
            REASONS[name],
            f"is of type {type(value).__name__}",
            field=field,
            value=value,
            expected=EXPECTED[name],
        )
    return list(value)


def _number(value: Any, what: str, field: str, name: str, limit: float = math.inf) -> float:
    if not isinstance(value, Real) or isinstance(value, bool):
        raise RowError(REASONS[name], f"{what} is not a number", field=field, value=value, expected="a number")
    number = float(value)
    if not math.isfinite(number):
        raise RowError(REASONS[name], f"{what} is not finite", field=field, value=value, expected="a finite number")
    if number > limit:
        raise RowError(
            REASONS[name], f"{what} is not a log-probability", field=field, value=value, expected="at most 0"
        )
    return number


def char_spans(
    values: Sequence[Any], field: str, name: str, rendered: Rendered, also: Sequence[str] = ()
) -> list[tuple[int, int, int]]:
    """Character spans of a row, checked: `(start, end, index in values)`, characters of the whole text, in order.

    Args:
        values: `{"start": .., "end": ..}` each, characters of the completion's text, or of that of its `"message"`.
        field, name: the column and what is in it, for messages.
        also: further keys that every span must have.

    Raises:
        RowError: not a span, out of range, or two that overlap.
    """
    found = sorted((*_span(span, f"span {i}", field, name, rendered, also), i) for i, span in enumerate(values))
    for (_, end, _), (start, _, _) in pairwise(found):
        if start < end:
            raise RowError(
                REASONS[name],
                "two spans overlap",
                field=field,
                value=list(values),
                expected="spans that share no character",
            )
    return found


def tokens_of(start: int, end: int, tokens: Tokens, counted: Sequence[int]) -> range:
    """Which of the counted tokens share a character with `[start, end)`, as places in `counted`."""
    first, last = tokens.within(start), tokens.touching(end)
    return range(bisect_left(counted, first), bisect_left(counted, last))


def _span(span: Any, what: str, field: str, name: str, rendered: Rendered, also: Sequence[str]) -> tuple[int, int]:
    def bad(why: str, expected: str) -> RowError:
        return RowError(REASONS[name], f"{what} {why}", field=field, value=span, expected=expected)

    if not isinstance(span, Mapping) or not {"start", "end", *also} <= span.keys():
        more = "".join(f', "{key}": number' for key in also)
        raise bad("is not a span", f'{{"start": character, "end": character{more}}}')
    texts = [i for i, content in enumerate(rendered.contents) if content is not None]
    message = span.get("message")
    if message is None:
        if len(rendered.contents) > 1:
            raise bad("does not say which message it is about", f'"message": one of {texts}')
        message = 0
    content = rendered.contents[message] if message in texts else None
    if content is None:
        raise bad("is about a message without text in the rendered completion", f'"message": one of {texts}')
    start, end = span["start"], span["end"]
    length = content[1] - content[0]
    if any(isinstance(p, bool) or not isinstance(p, int) for p in (start, end)) or not 0 <= start < end <= length:
        raise bad("is out of range", f"whole numbers 0 <= start < end <= {length}, the length of the text")
    return content[0] + start, content[0] + end
