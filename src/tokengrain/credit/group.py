"""Advantages relative to the group: what GRPO, RLOO, Dr. GRPO and DAPO make of one reward per completion.

Everywhere: C completions, `group` long `[C]` (the prompt of each, `TokenBatch.group`; rows of a group need not
be neighbours), G groups numbered from 0. A reward that is NaN belongs to a completion that could not be scored:
it is left out of mean and deviation, and its advantage is 0. Nothing here carries gradient.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

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
