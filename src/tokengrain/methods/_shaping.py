"""Statistics that rewards are compared with and scaled by: of groups, of everything seen, of all ranks. No gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.method import Rollout


@dataclass(frozen=True)
class GroupStatistics:
    """Count, mean and standard deviation of the rewards of each group; G groups, numbered from 0."""

    rewards: Tensor  # [C], float; NaN where there is none
    group: Tensor  # long [C], the prompt of each; rows of a group need not be neighbours
    ddof: int = 1  # 1: divide squares by n - 1; 0: by n

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
        return self._highest > self._reduce(math.inf, "amin")

    @cached_property
    def mean(self) -> Tensor:
        """`[G]`; exactly the common value where the rewards are equal; 0 for a group without rewards."""
        mean = self._sum(torch.nan_to_num(self.rewards, nan=0.0)) / self.count.clamp(min=1)
        return torch.where(~self.varied & (self.count > 0), self._highest, mean)

    @cached_property
    def deviations(self) -> Tensor:
        """Reward minus the group's mean, `[C]`; exactly 0 where the group's rewards are equal, or there is none."""
        return torch.where(self.scored, self.rewards - self.mean[self.group], 0.0)

    @cached_property
    def std(self) -> Tensor:
        """`[G]`; 0 for equal rewards and for fewer than two of them."""
        return (self._sum(self.deviations.square()) / (self.count - self.ddof).clamp(min=1)).sqrt()

    @cached_property
    def _highest(self) -> Tensor:
        return self._reduce(-math.inf, "amax")

    def _sum(self, values: Tensor) -> Tensor:
        return values.new_zeros(group_count(self.group)).index_add(0, self.group, values)

    def _reduce(self, start: float, how: str) -> Tensor:
        return reduce_groups(torch.where(self.scored, self.rewards, start), self.group, start, how)


def group_count(group: Tensor) -> int:
    return int(group.max()) + 1 if group.numel() else 0


def reduce_groups(values: Tensor, group: Tensor, start: float, how: str) -> Tensor:
    """The least ("amin") or greatest ("amax") value of each group, `[C] -> [G]`; `start` of an empty one."""
    return values.new_full((group_count(group),), start).scatter_reduce(0, group, values, how)


@dataclass(frozen=True)
class Moments:
    """Mean and spread of numbers seen so far; those of two sets add up, whatever their sizes."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0  # sum of squared distances from the mean

    @classmethod
    def of(cls, values: Tensor) -> Moments:
        """Of all numbers in a tensor, in float64."""
        if not values.numel():
            return cls()
        values = values.detach().double()
        mean = values.mean()
        return cls(values.numel(), float(mean), float(((values - mean) ** 2).sum()))

    def __add__(self, other: Moments) -> Moments:
        count = self.count + other.count
        if not count:
            return self
        # Chan, Golub and LeVeque's rule for joining the moments of two sets.
        apart = other.mean - self.mean
        mean = self.mean + apart * other.count / count
        return Moments(count, mean, self.squares + other.squares + apart**2 * self.count * other.count / count)

    @property
    def std(self) -> float:
        """Population standard deviation; 0 of nothing."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0


Scaling = Literal["std", "zscore", "centre", "none"]


def scale_scores(values: Tensor, scaling: Scaling = "std", moments: Any = None) -> Tensor:
    """Scores on a scale that rewards can live on: `[N] -> [N]`, detached (Q-RM, arXiv 2505.23363).

        std     z / s              (the authors' code: they found it to work better)
        zscore  (z - mean) / s     (the paper)
        centre  z - mean
        none    z

    Mean and s are those of `moments` (anything with a `mean` and a population `std`); None: of `values`. Scores that do
    not vary (s = 0, up to rounding) have no scale: "std" leaves them, "zscore" gives 0.
    """
    values = values.detach()
    if scaling == "none":
        return values
    moments = Moments.of(values) if moments is None else moments
    # Equal numbers may get a spread of a few rounding errors.
    flat = moments.std <= 1e-12 * abs(moments.mean)
    if scaling == "std":
        return values if flat else values / moments.std
    centred = values - moments.mean
    if scaling == "centre":
        return centred
    return centred * 0.0 if flat else centred / moments.std  # a NaN stays one


# ----------------------------------------------------------------------------------------------------
# What rollout credits share: one rank's share among all ranks, and the reward of a token.


def scored(rollout: Rollout) -> Tensor:
    """Completions that have a reward and belong to a prompt that is trained on, bool `[C]`."""
    known = ~torch.isnan(rollout.rewards)
    return known if rollout.keep is None else known & rollout.keep[rollout.group]


def token_level(rollout: Rollout) -> Tensor:
    """The reward of every token `[N]`: what was given per token, and the outcome on the last one.

    0 on all tokens of a completion that could not be scored.
    """
    outcome = torch.where(scored(rollout), rollout.rewards, 0.0)
    rewards = torch.where(rollout.segments.is_last, rollout.broadcast(outcome), 0.0)
    if rollout.token_rewards is not None:
        rewards = rewards + rollout.token_rewards
    return torch.where(rollout.broadcast(scored(rollout)), rewards, 0.0)


def shares(rollout: Rollout, mine: Any) -> tuple[list[Any], int]:
    """What every rank gave, in the order of ranks, and which is this rank's: compared by equality, so without NaN."""
    parts = rollout.gather(mine)
    return parts, parts.index(mine)


def mean(values: Tensor) -> float:
    """Mean of the numbers in `values`, NaN left out; 0 of nothing."""
    known = values[~torch.isnan(values)] if values.is_floating_point() else values
    return float(known.double().mean()) if known.numel() else 0.0


def pooled_moments(rollout: Rollout, values: Tensor) -> Moments:
    return sum(rollout.gather(Moments.of(values)), Moments())
