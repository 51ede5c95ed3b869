"""Rewards of form: a pattern, the length."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, Literal

from tokengrain.callables import Count, NonNegative, Number, Positive, Share
from tokengrain.errors import RecipeError, shown
from tokengrain.rewards.base import RewardError, RewardFailure
from tokengrain.rewards.process import Worker


class FormatPattern:
    """Whether a completion matches a regular expression. `.` stands for new lines too.

    Patterns are matched in a process of its own, which is ended when one takes too long.

    Args:
        pattern: by default `<think>…</think>` and `<answer>…</answer>`, once each.
        whole: whether it must match the whole completion (spaces at both ends aside), or be found in it.
        seconds: time for one completion; one that takes longer does not match (counted as `timeouts`).
        right, wrong: the rewards.

    Raises:
        RecipeError: no regular expression.
    """

    name = "format"

    def __init__(
        self,
        *,
        pattern: str = r"<think>(?:(?!</?think>).)*</think>\s*<answer>(?:(?!</?answer>).)*</answer>",
        whole: bool = True,
        seconds: Positive = 5.0,
        right: Number = 1.0,
        wrong: Number = 0.0,
    ) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RecipeError(f"reward {self.name!r}: {shown(pattern)} is no regular expression: {error}") from None
        self.pattern, self.whole, self.seconds, self.right, self.wrong = pattern, whole, seconds, right, wrong
        self.counts = {"timeouts": 0}
        self._worker = Worker()

    def __call__(self, completions: Sequence[str]) -> list[float]:
        self.counts = {"timeouts": 0}
        return [self.right if self._matches(c) else self.wrong for c in completions]

    def _matches(self, completion: str) -> bool:
        arguments = (self.pattern, int(re.DOTALL), self.whole, completion.strip())
        try:
            return bool(self._worker.call("matches", *arguments, timeout=self.seconds))
        except TimeoutError:
            self.counts["timeouts"] += 1
            return False


class SoftOverlong:
    """DAPO's penalty near the length limit (Yu et al. 2025, arXiv 2503.14476, eq. 13), n tokens:

        0                                    n <= max_length - buffer
        factor * (max_length - buffer - n) / buffer    up to max_length
        -factor                              beyond

    Args:
        max_length: the longest completion, tokens (`max_new_tokens`).
        buffer: tokens before it in which the penalty grows.
        factor: the largest penalty.
    """

    name = "overlong"

    def __init__(self, *, max_length: Count, buffer: Count, factor: NonNegative = 1.0) -> None:
        if buffer > max_length:
            raise RecipeError(f"reward {self.name!r}: buffer is {buffer}; expected at most max_length = {max_length}")
        self.max_length, self.buffer, self.factor = max_length, buffer, factor

    def __call__(self, completion_ids: Sequence[Sequence[int]]) -> list[float]:
        start = self.max_length - self.buffer
        return [-self.factor * min(max(len(ids) - start, 0) / self.buffer, 1.0) for ids in completion_ids]


class CosineLength:
    """A reward for being right that depends on the length (Yeo et al. 2025, arXiv 2502.03373, eq. 1):

        low + (high - low) / 2 * (1 + cos(pi * n / max_length))

    for n tokens, from `high` at n = 0 to `low` at `max_length` and beyond. Right answers go from `right_short` to
    `right_long`, wrong ones from `wrong_short` to `wrong_long`: the defaults favour short right answers, and long
    wrong ones (think again).

    Args:
        base: name of the reward that tells what is right, above `threshold`; `settings` are its settings.
        max_length: tokens.
        overlong: the reward of a truncated completion; None: as any other.
    """

    name = "cosine"

    def __init__(
        self,
        *,
        base: Literal["exact", "numeric", "math", "classification"] = "numeric",
        settings: dict[str, Any] | None = None,
        max_length: Count,
        right_short: Number = 1.0,
        right_long: Number = 0.5,
        wrong_short: Number = -1.0,
        wrong_long: Number = -0.5,
        overlong: Number | None = None,
        threshold: Share = 0.5,
    ) -> None:
        from tokengrain.rewards.registry import check_reward, make_reward

        check_reward(base, settings or {})
        self.base: Any = make_reward(base, **(settings or {})).function
        self.max_length, self.overlong, self.threshold = max_length, overlong, threshold
        self.right, self.wrong = (right_short, right_long), (wrong_short, wrong_long)

    def __call__(
        self,
        completions: Sequence[str],
        completion_ids: Sequence[Sequence[int]],
        truncated: Sequence[bool],
        **columns: Any,
    ) -> list[float | RewardFailure]:
        values = self.base(completions=completions, **columns)
        return [
            value if isinstance(value, RewardFailure) else self._scaled(value, len(ids), cut)
            for value, ids, cut in zip(values, completion_ids, truncated, strict=True)
        ]

    def _scaled(self, value: float | None, length: int, truncated: bool) -> float:
        if value is None:
            raise RewardError(f"the reward it builds on ({self.base.name!r}) gave None")
        if truncated and self.overlong is not None:
            return self.overlong
        short, long = self.right if value > self.threshold else self.wrong
        progress = min(length / self.max_length, 1.0)
        return long + 0.5 * (short - long) * (1 + math.cos(math.pi * progress))
