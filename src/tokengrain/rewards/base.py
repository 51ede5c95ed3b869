"""One reward function with its weight and what to do when it fails; what scoring gives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor

from tokengrain.callables import Number, Positive, validate_settings
from tokengrain.errors import TokengrainError

OnError = Literal["error", "skip", "value"]
OnNone = Literal["error", "skip", "value", "ignore"]


class RewardError(TokengrainError):
    """A reward that raised, hung, or gave something that is no reward; names the function and the row."""


@dataclass(frozen=True)
class RewardFailure:
    """One failure that was not raised. A reward function may also put one in place of a completion's reward.

    Attributes:
        what: what went wrong.
        name: the reward function; row: the data row; completion: index `[C]`. Filled in by the suite.
    """

    what: str
    name: str = ""
    row: int | str | None = None
    completion: int | None = None

    def __str__(self) -> str:
        return f"reward {self.name!r}: row {self.row} (completion {self.completion}): {self.what}"


class RewardFunction:
    """A reward function with its settings.

    Args:
        function: `function(prompts=[...], completions=[...], **columns)`, one entry per completion in each list;
            prompts as they stand in the rows, completions as text, the rows' other columns, and where it asks
            for them by name `prompt_ids`, `completion_ids` (lists of token ids) and `truncated` (bools). It takes
            what its signature names. It returns a list with an entry per completion: a number; or one number per
            token; or spans of characters {"start", "end", "reward"} (every token that shares a character with one
            has its reward). It may be async.
        name: in logs and messages; no two of a suite may be equal.
        weight: factor in the total.
        timeout: seconds one call may take; None: no limit, and the function runs in the calling thread. A
            function that is not async and hangs is left behind in its thread, as Python cannot end threads.
        on_error: what happens when the function raises, hangs or gives something that is no reward: "error"
            raises; "skip" marks the completion invalid, so that it is left out of training; "value" takes
            `error_value`. Failures that are not raised are counted and logged.
        error_value: the reward of a completion whose reward failed, before the weight.
        on_none: the same for a None; "ignore" leaves the function out of this completion's total, for
            rewards that apply to some rows only. None: as `on_error`.

    Raises:
        RecipeError: a wrong type, a value out of range.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        name: str | None = None,
        weight: Number = 1.0,
        timeout: Positive | None = 300.0,
        on_error: OnError = "error",
        error_value: Number = 0.0,
        on_none: OnNone | None = None,
    ) -> None:
        self.function = function
        self.name: str = (
            name or getattr(function, "name", None) or getattr(function, "__name__", None) or type(function).__name__
        )
        given = {
            "name": name,
            "weight": weight,
            "timeout": timeout,
            "on_error": on_error,
            "error_value": error_value,
            "on_none": on_none,
        }
        checked = validate_settings(f"reward {self.name!r}", RewardFunction, given)
        self.weight, self.timeout, self.error_value = (checked[k] for k in ("weight", "timeout", "error_value"))
        self.on_error, self.on_none = checked["on_error"], checked["on_none"] or checked["on_error"]
        self.parameters = inspect.signature(function).parameters
        called = function if inspect.isroutine(function) else type(function).__call__
        # The function itself as well: it may be a partial of an async one.
        self.is_async = inspect.iscoroutinefunction(called) or inspect.iscoroutinefunction(function)

    def arguments(self, available: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Of the available columns those that the function takes.

        Raises:
            RewardError: it needs one that there is not.
        """
        named = [p for p in self.parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        missing = [p.name for p in named if p.default is p.empty and p.name not in available]
        if missing:
            raise RewardError(
                f"reward {self.name!r} needs {', '.join(missing)}; the rows have {', '.join(sorted(available))}"
            )
        if any(p.kind is p.VAR_KEYWORD for p in self.parameters.values()):
            return dict(available)
        return {p.name: available[p.name] for p in named if p.name in available}


@dataclass(frozen=True)
class RewardResult:
    """Rewards of C completions with N counted tokens.

    Attributes:
        total: float `[C]`, `outcome` plus the sum of a completion's `token_rewards`; NaN where not valid.
        outcome: float `[C]`, weighted sum of the rewards given per completion; NaN where not valid.
        token_rewards: float `[N]`, weighted sum of the rewards given per token or span; 0 for completions that
            are not valid; None if no function gave any.
        by_name: per function, its own value `[C]` without the weight (of token rewards: their sum); NaN where it
            failed and was skipped, or does not apply.
        valid: bool `[C]`: False where a reward failed and `on_error` is "skip". Leave these out of group
            statistics, with advantage 0.
        failures: what failed and was not raised.
        counts: further numbers that functions report, such as time-outs of the math checker.
    """

    total: Tensor
    outcome: Tensor
    token_rewards: Tensor | None
    by_name: dict[str, Tensor]
    valid: Tensor
    failures: tuple[RewardFailure, ...] = ()
    counts: Mapping[str, float] = field(default_factory=dict)

    def metrics(self) -> dict[str, float]:
        """Means and standard deviations over the completions that have the reward; failures."""
        found = {"reward": self.total[self.valid]}
        found |= {f"reward/{name}": values[values.isfinite()] for name, values in self.by_name.items()}
        metrics: dict[str, float] = {}
        for name, values in found.items():
            if values.numel():
                metrics |= {f"{name}/mean": float(values.mean()), f"{name}/std": float(values.std(correction=0))}
        metrics["reward/failures"] = float(len(self.failures))
        metrics["reward/invalid"] = float((~self.valid).float().mean())
        return metrics | {f"reward/{name}": value for name, value in self.counts.items()}
