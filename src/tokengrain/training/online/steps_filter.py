"""Filters: which prompts of a rollout are trained on."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokengrain.callables import Share
from tokengrain.credit.group import GroupStatistics, informative_groups
from tokengrain.errors import RunError
from tokengrain.training.online.step import Phase, RolloutStep, Stateless


class FilterGroups(Stateless):
    """Leaves out prompts whose completions teach nothing: DAPO's dynamic sampling (arXiv 2503.14476).

    Args:
        metric: "correct": the reward that says what is correct (a shaped reward varies in every group); "reward":
            the sum of all rewards; otherwise the name of a reward.
        refill: sample other prompts in place of those left out, until there are enough (see `max_refills`).
        low, high: also leave out prompts whose mean of the metric is not in between, low and high included;
            None: no such bound.
    """

    name = "filter_groups"
    phase: Phase = "filter"

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
