"""Credit steps that shape rewards: DAPO's length penalty, and token rewards from any credit source."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tokengrain.errors import RecipeError
from tokengrain.method import RolloutStep, checked_credit, make_credit, rollout_credit
from tokengrain.methods.baselines import FunctionCredit
from tokengrain.methods.grpo import overlong_penalty
from tokengrain.settings import NonNegative, Number, Positive


@rollout_credit("overlong", phase="rewards")
class Overlong:
    """DAPO's soft overlong punishment, added to the outcome of a completion (arXiv 2503.14476).

    Args:
        buffer: tokens before the limit within which the penalty grows from 0 to `factor`.
        factor: largest penalty.
        max_length: tokens; None: the longest completion that is sampled.

    Raises:
        RecipeError: a buffer that is longer than max_length.
    """

    def __init__(self, *, buffer: Positive, factor: NonNegative = 1.0, max_length: Positive | None = None) -> None:
        self.buffer, self.factor, self.max_length = buffer, factor, max_length
        if max_length is not None:
            self.check_limit(max_length)

    def check_limit(self, max_new_tokens: float) -> None:
        """Raises `RecipeError` if the buffer does not fit into completions of so many tokens."""
        limit = max_new_tokens if self.max_length is None else self.max_length
        if self.buffer > limit:
            raise RecipeError(f"credit 'overlong': buffer is {self.buffer:g}; expected at most {limit:g}, the limit")

    def __call__(self, step: RolloutStep) -> None:
        lengths = step.segments.lengths.to(step.rewards.dtype)
        limit = self.max_length if self.max_length is not None else step.max_new_tokens
        penalty = overlong_penalty(lengths, max_length=limit, buffer=self.buffer, factor=self.factor)
        step.metrics["reward/overlong"] = float(penalty.mean())
        step.rewards = step.rewards + penalty


@rollout_credit("token_rewards", phase="rewards", provides={"rewards"})
class TokenRewards:
    """Rewards per token from a credit source (see `tokengrain.credit`).

    Args:
        source: a credit source, a function of a `TokenBatch`, an import string of one, or a mapping: the source's
            `name` with its settings and objects.
        scale: factor; clip: bound of the absolute value after scaling.
        combine: "add" to the token rewards there are, or "replace" them.
        outcome: False: the rewards per completion are set to 0, so that the token rewards are all there is.
    """

    def __init__(
        self,
        *,
        source: Any,
        scale: Number = 1.0,
        clip: Positive | None = None,
        combine: Literal["add", "replace"] = "add",
        outcome: bool = True,
    ) -> None:
        self.source = _source(source)
        self.scale, self.clip, self.combine, self.outcome = scale, clip, combine, outcome

    def __call__(self, step: RolloutStep) -> None:
        values = self.scale * checked_credit(self.source(step.batch), step.batch, self.source.name)
        if self.clip is not None:
            values = values.clamp(-self.clip, self.clip)
        values = values.to(step.rewards.dtype)
        # A completion without a valid outcome stays out, whatever its tokens earn.
        values = values.masked_fill(step.broadcast(step.rewards.isnan()), 0.0)
        step.metrics["reward/tokens"] = float(step.segments.sum(values).mean())
        if self.combine == "add" and step.token_rewards is not None:
            values = values + step.token_rewards
        step.token_rewards = values
        if not self.outcome:
            step.rewards = step.rewards * 0.0  # NaN stays NaN


def _source(given: Any) -> Any:
    if isinstance(given, Mapping):
        if not isinstance(given.get("name"), str):
            raise RecipeError(f"credit 'token_rewards': the source needs a name, got {dict(given)}")
        return make_credit(given["name"], **{k: v for k, v in given.items() if k != "name"})
    if isinstance(given, str):
        return FunctionCredit(function=given)
    if not callable(given):
        raise RecipeError(f"credit 'token_rewards': source is {type(given).__name__}; expected a credit source")
    return given if hasattr(given, "name") else FunctionCredit(function=given)
