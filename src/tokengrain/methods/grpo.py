"""GRPO: Group Relative Policy Optimization (arXiv 2402.03300), and DAPO and Dr. GRPO, which are settings of it.

    GRPO      reduction "mean",     normaliser "mean"
    DAPO      reduction "sum",      normaliser "token_mean", epsilon_high 0.28          (arXiv 2503.14476)
    Dr. GRPO  reduction "constant", normaliser "mean", advantages without scaling       (arXiv 2503.20783)

Advantages come from `tokengrain.credit.group`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RunError
from tokengrain.loss import LossOutput
from tokengrain.method import Card, RolloutStep, objective, rollout_credit
from tokengrain.methods._clipped import (
    MAX_LOG_RATIO,
    KLEstimator,
    KLTerm,
    Reduction,
    Sampled,
    clipped_tokens,
    importance_weights,
    policy_output,
    sequence_log_ratio,
)
from tokengrain.methods._rollout import scored
from tokengrain.settings import NonNegative, Positive, Share, check_choice

GRPO = Card(
    "grpo",
    "GRPO",
    "answers compared within their group",
    "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    "2402.03300",
    "2024",
    trains="policy, online",
    credit="the group's mean (every token of a completion alike)",
)
DRGRPO = Card(
    "drgrpo",
    "Dr. GRPO",
    "GRPO without its length bias",
    "Understanding R1-Zero-Like Training: A Critical Perspective",
    "2503.20783",
    "COLM 2025",
    trains="policy, online",
    credit="the group's mean (every token of a completion alike)",
    objective="grpo",
    page="grpo",
)
DAPO = Card(
    "dapo",
    "DAPO",
    "clips higher, skips unanimous groups",
    "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    "2503.14476",
    "2025",
    trains="policy, online",
    credit="the group's mean, of groups that differ; length penalty",
    objective="grpo",
)

Importance = Literal["token", "sequence"]


@objective("grpo", unit="completions")
def grpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    old_logps: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    epsilon: NonNegative = 0.2,
    epsilon_high: NonNegative | None = None,
    ratio_cap: Positive | None = None,
    importance: Importance = "token",
    beta: NonNegative = 0.0,
    kl: KLEstimator = "k3",
    kl_importance: bool = False,
    clamp: bool = False,
    reduction: Reduction = "mean",
    max_length: Positive | None = None,
) -> LossOutput:
    """The clipped policy loss on groups of sampled completions.

    Args:
        logps: log-probabilities under the policy `[N]`, nats.
        segments: cuts `[N]` into C completions.
        old_logps: the same under the policy that sampled them `[N]`; `logps.detach()` for the first update.
        advantages: `[N]`; a completion's advantage repeated for its tokens, or any token credit.
        ref_logps: the same under the frozen reference `[N]`, needed if beta > 0.
        entropy: `[N]`, nats; logged if given.
        weights: `[N]`, multiply the policy's loss outside the clip; see `Sampled`.
        kl_weights: `[N]`, multiply the KL term of each token (ARES's dynamic KL); None: 1.
        epsilon: the ratio is clipped below at 1 - epsilon, and above at 1 + epsilon.
        epsilon_high: if given, it is clipped above at 1 + epsilon_high (DAPO's clip-higher: 0.28).
        ratio_cap: bound of the ratio where the advantage is negative (dual clip; verl: 3 or 10).
        importance: "token": ratio of each token; "sequence": one ratio per completion, see `gspo_loss`.
        beta: weight of the KL term; kl: its estimator; kl_importance: weigh it by the token's ratio.
        clamp: clamp log-ratios and KL estimates as verl does, with gradient 0 outside; see `kl_estimate`.
        reduction: how tokens become the loss of a completion, see `Reduction`.
        max_length: tokens, the divisor of reduction "constant".

    Returns:
        `losses` [C].

    Raises:
        ValueError: a contradiction between the settings.
    """
    check_choice("importance", importance, Importance)
    old_logps = old_logps.detach()
    log_ratio = sequence_log_ratio(logps, old_logps, segments) if importance == "sequence" else logps - old_logps
    if clamp:
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    return policy_output(
        clipped_tokens(log_ratio, advantages, 1 - epsilon, high, ratio_cap),
        segments,
        Sampled(logps, old_logps, advantages, ref_logps, entropy, weights, kl_weights),
        KLTerm(beta, kl, kl_importance, clamp),
        reduction=reduction,
        max_length=max_length,
    )


# ----------------------------------------------------------------------------------------------------
# Advantages relative to the group: what GRPO, RLOO, Dr. GRPO and DAPO make of one reward per completion.
#
# Everywhere: C completions, `group` long `[C]` (the prompt of each, `TokenBatch.group`; rows of a group need not
# be neighbours), G groups numbered from 0. A reward that is NaN belongs to a completion that could not be scored:
# it is left out of mean and deviation, and its advantage is 0. Nothing here carries gradient.

Scale = Literal["group", "none", "batch"]
Baseline = Literal["mean", "leave_one_out"]


@dataclass(frozen=True)
class GroupStatistics:
    """Count, mean and standard deviation of the rewards of each group.

    Args:
        rewards: `[C]`, float; NaN where there is none.
        group: long `[C]`.
        ddof: 1: divide squares by n - 1; 0: by n.
    """

    rewards: Tensor
    group: Tensor
    ddof: int = 1

    @cached_property
    def scored(self) -> Tensor:
        """Whether a completion has a reward, bool `[C]`."""
        return ~torch.isnan(self.rewards)

    @cached_property
    def count(self) -> Tensor:
        """Scored completions per group, `[G]`, in the rewards' type."""
        return self._sum(self.scored.to(self.rewards.dtype))

    @cached_property
    def varied(self) -> Tensor:
        """Whether a group has two rewards that differ, bool `[G]`: exact, where a deviation would round."""
        low = self._reduce(float("inf"), "amin")
        high = self._reduce(float("-inf"), "amax")
        return high > low

    @cached_property
    def mean(self) -> Tensor:
        """`[G]`; exactly the common value where the rewards are equal; 0 for a group without rewards."""
        total = self._sum(torch.nan_to_num(self.rewards, nan=0.0))
        mean = total / self.count.clamp(min=1)
        equal = ~self.varied & (self.count > 0)
        return torch.where(equal, self._reduce(float("-inf"), "amax"), mean)

    @cached_property
    def deviations(self) -> Tensor:
        """Reward minus the group's mean, `[C]`; exactly 0 where the group's rewards are equal, or there is none."""
        return torch.where(self.scored, self.rewards - self.mean[self.group], 0.0)

    @cached_property
    def std(self) -> Tensor:
        """`[G]`; 0 for equal rewards and for fewer than two of them."""
        return (self._sum(self.deviations.square()) / (self.count - self.ddof).clamp(min=1)).sqrt()

    @property
    def _groups(self) -> int:
        return int(self.group.max()) + 1 if self.group.numel() else 0

    def _sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(self._groups).index_add(0, self.group, values)

    def _reduce(self, start: float, how: str) -> Tensor:
        values = torch.where(self.scored, self.rewards, start)
        return values.new_full((self._groups,), start).scatter_reduce(0, self.group, values, how)


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    eps: float = 1e-6,
    ddof: int = 1,
) -> Tensor:
    """One advantage per completion: reward minus its group's baseline, divided by a deviation.

    Args:
        rewards: `[C]`; NaN where a completion could not be scored.
        group: long `[C]`.
        scale: "group": divided by the group's standard deviation + eps (GRPO, arXiv 2402.03300); "none": not
            divided (Dr. GRPO, arXiv 2503.20783); "batch": by the deviation of all rewards given + eps, which
            must then be those of the whole step.
        baseline: "mean" of the group, or "leave_one_out": the mean of its other completions (RLOO,
            arXiv 2402.14740), which is G / (G - 1) times the same difference.
        eps: added to the deviation; 1e-6 in verl, 1e-4 in TRL.
        ddof: 1 as in TRL and verl.

    Returns:
        `[C]`; exactly 0 where all rewards of a group are equal. `segments.broadcast` repeats it for tokens.

    Warns:
        UserWarning: a group has one completion: its advantage is 0.
    """
    s = GroupStatistics(rewards.detach(), group, ddof)
    if bool((torch.bincount(group) == 1).any()):
        warnings.warn("a group of one completion has advantage 0: nothing to compare it with", stacklevel=2)
    advantages = s.deviations
    if baseline == "leave_one_out":
        advantages = advantages * (s.count / (s.count - 1).clamp(min=1))[group]
    if scale == "group":
        return advantages / (s.std[group] + eps)
    if scale == "batch":
        return advantages / (GroupStatistics(s.rewards, torch.zeros_like(group), ddof).std + eps)
    return advantages


def informative_groups(metric: Tensor, group: Tensor) -> Tensor:
    """DAPO's dynamic sampling (arXiv 2503.14476): the groups whose metric is not constant, bool `[G]`.

    Args:
        metric: `[C]`, accuracy and not the shaped reward: a length penalty makes every group look varied.
        group: long `[C]`.

    A group of one completion is kept, as in verl. `informative_groups(...)[group]` are the completions to keep.
    """
    return GroupStatistics(metric.to(torch.float64), group).varied | (torch.bincount(group) == 1)


def overlong_penalty(lengths: Tensor, *, max_length: float, buffer: float, factor: float = 1.0) -> Tensor:
    """DAPO's soft overlong punishment (arXiv 2503.14476), `[C]`, to be added to the reward.

    0 up to max_length - buffer, then falling linearly to -factor at max_length, and -factor beyond.

    Args:
        lengths: tokens of each completion (not of its prompt) `[C]`.
        max_length, buffer: tokens.

    Raises:
        ValueError: a buffer that is not positive, or larger than max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"overlong buffer must lie in (0, max_length = {max_length}], got {buffer}")
    lengths = lengths if lengths.is_floating_point() else lengths.to(torch.get_default_dtype())
    return factor * ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


# ----------------------------------------------------------------------------------------------------
# Credit steps of phase "advantages" that compare completions of a prompt, and simple ones that come after.


def _counted(step: RolloutStep) -> Tensor:
    """The sum of a completion's rewards `[C]`; NaN also for prompts that are not trained on."""
    return torch.where(scored(step), step.total, torch.nan)


@rollout_credit("group", phase="advantages", group=True)
class GroupAdvantages:
    """The same advantage for all tokens of a completion: its reward against those of its group.

    GRPO, DAPO: scale "group"; Dr. GRPO: "none"; RLOO: baseline "leave_one_out" with scale "none". Token rewards
    count with their sum.

    Args:
        scale, baseline, eps, ddof: see `group_advantages`; scale "batch" divides by the deviation of all rewards of
            the rollout, on all ranks.
    """

    def __init__(
        self,
        *,
        scale: Scale = "group",
        baseline: Baseline = "mean",
        eps: NonNegative = 1e-6,
        ddof: Literal[0, 1] = 1,
    ) -> None:
        self.scale, self.baseline, self.eps, self.ddof = scale, baseline, eps, ddof

    def __call__(self, step: RolloutStep) -> None:
        scale: Scale = "none" if self.scale == "batch" else self.scale
        total = _counted(step)
        advantages = group_advantages(
            total, step.group, scale=scale, baseline=self.baseline, eps=self.eps, ddof=self.ddof
        )
        if self.scale == "batch":
            rewards = step.gather(total)
            one = torch.zeros(len(rewards), dtype=torch.long, device=rewards.device)
            advantages = advantages / (GroupStatistics(rewards, one, self.ddof).std + self.eps)
        step.advantages = step.broadcast(advantages)


@rollout_credit("broadcast", phase="advantages")
class Broadcast:
    """The reward itself as the advantage of all tokens of a completion; 0 where it could not be scored.

    Args:
        baseline: "batch": minus the mean reward of the rollout, on all ranks; "none": as it is.
    """

    def __init__(self, *, baseline: Literal["none", "batch"] = "none") -> None:
        self.baseline = baseline

    def __call__(self, step: RolloutStep) -> None:
        rewards = _counted(step)
        if self.baseline == "batch":
            rewards = rewards - step.gather(rewards).nanmean()
        step.advantages = step.broadcast(torch.nan_to_num(rewards, nan=0.0))


@rollout_credit("importance", phase="after", provides={"weights"})
class StepsGroupImportance:
    """Weighs tokens by how much more probable they are to the trainer than to the sampler, truncated.

    Args:
        kind: "token" or "sequence", see `importance_weights`.
        cap: largest weight.
        against: "raw": the sampler's probabilities at temperature 1: corrects for what the engine computes
            differently; "sampling": those that tokens were drawn from: also for temperature, top-k, top-p, min-p.
    """

    def __init__(
        self,
        *,
        kind: Literal["token", "sequence"] = "token",
        cap: Positive = 2.0,
        against: Literal["raw", "sampling"] = "raw",
    ) -> None:
        self.kind, self.cap, self.against = kind, cap, against

    def __call__(self, step: RolloutStep) -> None:
        column = f"{self.against}_logps"
        if column not in step.quantities:
            raise RunError(f"credit 'importance': the sampler does not know {column}; expected against: another one")
        old = step.quantity("old_logps")
        weights = importance_weights(step.quantity(column), old, step.segments, kind=self.kind, cap=self.cap)
        step.metrics["importance/mean"] = float(weights.mean())
        step.metrics["importance/capped"] = float((weights >= self.cap * (1 - 1e-6)).to(weights.dtype).mean())
        step.weights = weights if step.weights is None else step.weights * weights


@rollout_credit("mask_truncated", phase="after")
class MaskTruncated:
    """DAPO's overlong filtering: truncated completions get advantage 0, as they were cut off and not finished."""

    def __call__(self, step: RolloutStep) -> None:
        if step.advantages is None:
            raise RunError("credit 'mask_truncated' needs advantages; expected a step that sets them")
        step.advantages = torch.where(step.broadcast(step.truncated), 0.0, step.advantages)


# ----------------------------------------------------------------------------------------------------
# Filters: which prompts of a rollout are trained on.


@rollout_credit("filter_groups", phase="filter")
class FilterGroups:
    """Leaves out prompts whose completions teach nothing: DAPO's dynamic sampling (arXiv 2503.14476).

    Args:
        metric: "correct": the reward that says what is correct (a shaped reward varies in every group); "reward":
            the sum of all rewards; otherwise the name of a reward.
        refill: sample other prompts in place of those left out, until there are enough (see `max_refills`).
        low, high: also leave out prompts whose mean of the metric is not in between, low and high included;
            None: no such bound.
    """

    def __init__(
        self,
        *,
        metric: Literal["correct", "reward"] | str = "correct",
        refill: bool = True,
        low: Share | None = None,
        high: Share | None = None,
    ) -> None:
        self.metric, self.refill, self.low, self.high = metric, refill, low, high

    def __call__(self, step: RolloutStep) -> None:
        metric = self._metric(step)
        keep = informative_groups(metric, step.group)
        mean = GroupStatistics(metric.double(), step.group).mean
        if self.low is not None:
            keep = keep & (mean >= self.low)
        if self.high is not None:
            keep = keep & (mean <= self.high)
        step.drop(keep)

    def _metric(self, step: RolloutStep) -> Tensor:
        if self.metric == "reward":
            return step.total
        if self.metric == "correct":
            if step.correct is None:
                raise RunError("credit 'filter_groups' by correctness needs a reward")
            # A completion that could not be scored says nothing about its group.
            return torch.where(step.rewards.isnan(), torch.nan, step.correct.to(step.rewards.dtype))
        if self.metric not in step.by_name:
            raise RunError(f"credit 'filter_groups': no reward {self.metric!r}; there are {', '.join(step.by_name)}")
        return step.by_name[self.metric]
