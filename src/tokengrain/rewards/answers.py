"""Rewards that compare an answer with a column: exact text, numbers, mathematics, a class."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, Literal

from tokengrain.callables import NonNegative, Number, Positive
from tokengrain.errors import RecipeError, shown
from tokengrain.rewards.base import RewardError, RewardFailure
from tokengrain.rewards.process import Worker

NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|(?<=\d)(?:/\d+)?)")
GSM8K = re.compile(r"####[ \t]*\$?[ \t]*([^\n]*)")


def column_of(columns: dict[str, Any], name: str, reward: str) -> Sequence[Any]:
    """A column that a reward needs. Raises `RewardError` naming those there are."""
    if name not in columns:
        known = sorted(set(columns) - {"prompts", "completions", "completion_ids", "truncated"})
        raise RewardError(f"needs the column {name!r}; the rows have {known} (setting `column` of {reward!r})")
    return columns[name]


def numbers_in(text: str) -> list[Fraction]:
    """The numbers in a text, thousands' commas and fractions a/b understood."""
    found = []
    for match in NUMBER.finditer(text.replace("\u2212", "-")):  # the minus sign of typeset text
        if match.group() in ("", "-"):
            continue
        whole, _, below = match.group().replace(",", "").partition("/")
        try:
            found.append(Fraction(Decimal(whole)) / Fraction(int(below) if below else 1))
        except (InvalidOperation, ZeroDivisionError, ValueError):  # ValueError: more digits than `int` reads
            continue
    return found


def extractor(pattern: str | None, what: str) -> re.Pattern[str] | None:
    """A pattern with exactly one group, or none. Raises `RecipeError`."""
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise RecipeError(f"{what}: {shown(pattern)} is no regular expression: {error}") from None
    if compiled.groups != 1:
        raise RecipeError(f"{what}: {shown(pattern)} has {compiled.groups} groups; expected one, around the answer")
    return compiled


def last_match(pattern: re.Pattern[str] | None, text: str) -> str | None:
    """What the pattern's group holds at its last match; the whole text without a pattern."""
    if pattern is None:
        return text
    found = pattern.findall(text)
    return found[-1] if found else None


class ExactMatch:
    """Whether the answer is the same text as the column's, spaces at both ends aside.

    Args:
        column: the right answer.
        pattern: regular expression with one group around the answer in the completion; the last match counts;
            without a match the answer is wrong. None: the whole completion.
        ignore_case: whether upper and lower case are alike.
        right, wrong: the rewards.
    """

    name = "exact"

    def __init__(
        self,
        *,
        column: str = "answer",
        pattern: str | None = None,
        ignore_case: bool = False,
        right: Number = 1.0,
        wrong: Number = 0.0,
    ) -> None:
        self.column, self.ignore_case, self.right, self.wrong = column, ignore_case, right, wrong
        self.pattern = extractor(pattern, f"reward {self.name!r}: pattern")

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        golds = column_of(columns, self.column, self.name)
        return [self.right if self._same(c, g) else self.wrong for c, g in zip(completions, golds, strict=True)]

    def _same(self, completion: str, gold: Any) -> bool:
        if gold is None:
            raise RewardError(f"the column {self.column!r} is empty")
        answer, wanted = last_match(self.pattern, completion), str(gold).strip()
        if answer is None:
            return False
        return answer.strip().casefold() == wanted.casefold() if self.ignore_case else answer.strip() == wanted


class NumericMatch:
    """Whether the answer is the column's number. "72", "72.0", "$72", "1,000" and "1/2" are numbers.

    The column's number stands behind its last `####` (GSM8K's `answer`), or is its last number.

    Args:
        column: the right answer: a number, or text as above.
        style: where the completion's answer stands: "gsm8k" behind the last `####`; "boxed" in the last
            `\\boxed{}`; "last": the last number, wherever it is; "flexible": behind `####` if there is one, else
            the last number.
        tolerance: largest absolute difference that counts as equal.
        right, wrong: the rewards.
    """

    name = "numeric"

    def __init__(
        self,
        *,
        column: str = "answer",
        style: Literal["gsm8k", "boxed", "last", "flexible"] = "gsm8k",
        tolerance: NonNegative = 1e-6,
        right: Number = 1.0,
        wrong: Number = 0.0,
    ) -> None:
        self.column, self.style, self.tolerance, self.right, self.wrong = column, style, tolerance, right, wrong

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        golds = column_of(columns, self.column, self.name)
        return [self._reward(c, g) for c, g in zip(completions, golds, strict=True)]

    def _reward(self, completion: str, gold: Any) -> float:
        wanted = gold_number(gold)
        if wanted is None:
            raise RewardError(f"the column {self.column!r} has no number; got {shown(gold)}")
        answer = self._answer(completion)
        return self.right if answer is not None and abs(answer - wanted) <= Fraction(self.tolerance) else self.wrong

    def _answer(self, completion: str) -> Fraction | None:
        marked = GSM8K.findall(completion)
        if self.style == "gsm8k" or (self.style == "flexible" and marked):
            found = numbers_in(marked[-1]) if marked else []
            return found[0] if found else None
        if self.style == "boxed":
            _, mark, rest = completion.rpartition("\\boxed{")
            found = numbers_in(rest.partition("}")[0]) if mark else []
        else:
            found = numbers_in(completion)
        return found[-1] if found else None


def gold_number(gold: Any) -> Fraction | None:
    """The number that a column's value holds; None if there is none."""
    text = str(gold)
    marked = GSM8K.findall(text)
    found = numbers_in(marked[-1]) if marked else numbers_in(text)
    if not found:
        return None
    return found[0] if marked else found[-1]


class MathMatch:
    """Whether the answer is mathematically equal to the column's, by math-verify (extra "math").

    It understands LaTeX, fractions, sets, intervals, equations; see its documentation. It runs in a process of
    its own, which is ended when an expression takes too long to understand.

    Args:
        column: the right answer, as text with or without `\\boxed{}` or `$`.
        seconds: time for one completion.
        on_timeout: "wrong": an answer that takes too long is wrong (counted as `timeouts`); "fail": it is a
            failure of the reward.
        right, wrong: the rewards.

    Raises:
        RecipeError: math-verify is not installed.
    """

    name = "math"

    def __init__(
        self,
        *,
        column: str = "answer",
        seconds: Positive = 5.0,
        on_timeout: Literal["wrong", "fail"] = "wrong",
        right: Number = 1.0,
        wrong: Number = 0.0,
    ) -> None:
        if importlib.util.find_spec("math_verify") is None:
            raise RecipeError("reward 'math' needs math-verify: pip install 'tokengrain[math]'")
        self.column, self.seconds, self.on_timeout = column, seconds, on_timeout
        self.right, self.wrong = right, wrong
        self.counts = {"timeouts": 0}
        self._worker = Worker()

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float | RewardFailure]:
        golds = column_of(columns, self.column, self.name)
        self.counts = {"timeouts": 0}
        return [self._reward(c, g) for c, g in zip(completions, golds, strict=True)]

    def _reward(self, completion: str, gold: Any) -> float | RewardFailure:
        if gold is None:
            return RewardFailure(f"the column {self.column!r} is empty")
        wanted = str(gold)
        # A bare answer such as \frac{1}{2} is LaTeX only between dollars.
        if "\\" in wanted and "$" not in wanted and "\\boxed" not in wanted:
            wanted = f"${wanted}$"
        try:
            found = self._worker.call("math_equal", wanted, completion, timeout=self.seconds)
        except TimeoutError as error:
            self.counts["timeouts"] += 1
            return self.wrong if self.on_timeout == "wrong" else RewardFailure(f"math-verify: {error}")
        except RewardError as error:
            return RewardFailure(f"math-verify: {error}")
        if not found["gold"]:
            return RewardFailure(f"math-verify understands no answer in the column {self.column!r}: {shown(gold)}")
        return self.right if found["equal"] else self.wrong


class Classification:
    """Whether the class named in the completion is the column's.

    Args:
        column: the right class.
        labels: all classes. Given, the answer is the last of them that is mentioned as a word of its own (in what
            `pattern` finds). Not given, what `pattern` finds must be the class itself.
        pattern: regular expression with one group around the answer; the last match counts. None: the whole
            completion.
        ignore_case: whether upper and lower case are alike.
        right, wrong: the rewards; missing: the reward where no class is named.
    """

    name = "classification"

    def __init__(
        self,
        *,
        column: str = "label",
        labels: list[str] | None = None,
        pattern: str | None = r"<answer>(.*?)</answer>",
        ignore_case: bool = True,
        right: Number = 1.0,
        wrong: Number = 0.0,
        missing: Number = 0.0,
    ) -> None:
        self.column, self.ignore_case = column, ignore_case
        self.right, self.wrong, self.missing = right, wrong, missing
        self.pattern = extractor(pattern, f"reward {self.name!r}: pattern")
        self.labels = None if labels is None else [self._plain(label) for label in labels]
        self._mentions = None
        if self.labels is not None:
            if len(set(self.labels)) < len(self.labels) or not all(self.labels):
                raise RecipeError(f"reward {self.name!r}: labels are {labels}; expected different ones, none empty")
            # The longest first: "very good" is not a mention of "good".
            names = "|".join(re.escape(label) for label in sorted(self.labels, key=len, reverse=True))
            self._mentions = re.compile(rf"(?<!\w)(?:{names})(?!\w)")

    def __call__(self, completions: Sequence[str], **columns: Any) -> list[float]:
        golds = column_of(columns, self.column, self.name)
        return [self._reward(c, g) for c, g in zip(completions, golds, strict=True)]

    def _reward(self, completion: str, gold: Any) -> float:
        wanted = self._plain(str(gold))
        if gold is None or (self.labels is not None and wanted not in self.labels):
            raise RewardError(f"the column {self.column!r} is {shown(gold)}; expected one of {self.labels or 'text'}")
        answer = last_match(self.pattern, completion)
        if answer is not None and self._mentions is not None:
            mentioned = self._mentions.findall(self._plain(answer))
            answer = mentioned[-1] if mentioned else None
        if answer is None or not answer.strip():
            return self.missing
        return self.right if self._plain(answer) == wanted else self.wrong

    def _plain(self, text: str) -> str:
        text = " ".join(text.split())
        return text.casefold() if self.ignore_case else text
