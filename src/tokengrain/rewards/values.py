"""One completion's reward as the function gave it -> a number, or a number per counted token."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from tokengrain.data.config import RowError
from tokengrain.data.render import Rendered
from tokengrain.data.rewards import token_column
from tokengrain.data.tokenize import Tokens
from tokengrain.errors import shown
from tokengrain.rewards.base import RewardError


@dataclass(frozen=True)
class Value:
    """A reward that is in order: a number for the completion, or one per counted token."""

    number: float | None = None
    tokens: list[float] | None = None

    @property
    def sum(self) -> float:
        return self.number if self.number is not None else math.fsum(self.tokens or ())


def read_value(
    given: Any, ids: Sequence[int], counted: Sequence[int], text: str, tokens: Callable[[], Tokens]
) -> Value:
    """What a reward function gave for one completion.

    Args:
        given: a number, numbers per counted token, or spans of characters of `text`.
        ids: the completion's token ids; counted: index into `ids` of those that count.
        tokens: gives the completion's tokens with their characters in `text`; called for spans only.

    Raises:
        RewardError: anything else; not finite; a wrong length; spans out of range or overlapping.
    """
    if hasattr(given, "tolist"):
        given = given.tolist()
    if isinstance(given, Real):
        try:
            number = float(given)
        except OverflowError:  # a whole number beyond what floats reach
            number = math.inf
        if not math.isfinite(number):
            raise RewardError(f"gave {number}; expected a finite number")
        return Value(number=number)
    if not isinstance(given, Sequence) or isinstance(given, (str, bytes)):
        raise RewardError(f"gave {shown(given)}; expected a number, a number per token, or spans of characters")
    if not given:  # no spans
        return Value(tokens=[0.0] * len(counted))
    rendered = Rendered(text, 0, None, ((0, len(text)),))
    # Positions are needed for spans only; numbers are checked for type, finiteness and length.
    found = tokens() if isinstance(given[0], Mapping) else Tokens(text, list(ids))
    try:
        values = token_column(
            "token_rewards", given, "reward", rendered=rendered, tokens=found, counted=counted, kept=len(counted)
        )
    except RowError as error:
        raise RewardError(f"gave rewards that do not fit: {error}") from None
    return Value(tokens=values)


def located_tokens(tokenizer: Any, ids: Sequence[int], text: str) -> Tokens:
    """The tokens of a sampled completion and the characters of its decoded text that each stands for.

    Sampled ids need not be what the tokenizer makes of the text, so positions come from decoding. A token within a
    character of several tokens stands for the whole character; one that does not show (EOS) for none.

    Raises:
        RewardError: the tokens' texts do not add up to the text.
    """
    specials = set(tokenizer.all_special_ids)

    def shown_text(part: Sequence[int]) -> str:
        return str(tokenizer.decode([i for i in part if i not in specials], clean_up_tokenization_spaces=False))

    starts, ends, position = [], [], 0
    # A few tokens before the new one give it its context; the new ones are kept until they are whole characters.
    context, first = 0, 0
    for index in range(len(ids)):
        before, now = shown_text(ids[context:first]), shown_text(ids[context : index + 1])
        # The first bytes of a character decode to a mark, or (ByT5) to nothing.
        partial = now.endswith("�") or (now == before and ids[index] not in specials)
        if partial and index + 1 < len(ids):
            continue
        width = len(now) - len(before)
        starts += [position] * (index + 1 - first)
        position += width
        ends += [position] * (index + 1 - first)
        context, first = first, index + 1
    if position != len(text):
        return _located_by_prefixes(shown_text, ids, text)
    return Tokens(text, list(ids), starts, ends)


def _located_by_prefixes(shown_text: Callable[[Sequence[int]], str], ids: Sequence[int], text: str) -> Tokens:
    """The same by decoding every beginning: slow, and right for any tokenizer whose beginnings decode alike."""
    ends: list[int] = []
    for index in range(len(ids)):
        now = shown_text(ids[: index + 1])
        common = next((i for i, (a, b) in enumerate(zip(now, text)) if a != b), min(len(now), len(text)))
        ends.append(max(common, ends[-1] if ends else 0))
    if ends and ends[-1] != len(text):
        raise RewardError("the completion's tokens do not add up to its text, so spans cannot be placed")
    return Tokens(text, list(ids), [0, *ends[:-1]], ends)
