"""DCPO's smooth advantage standardisation (arXiv 2509.02333): statistics over all visits of a prompt.

A group whose rewards are all equal has no advantage of its own; against what the same prompt earned before it has
one. `PromptHistory` is the state: a count, a mean and a deviation per prompt. To be right it must be updated once per
visit, on every rank with the visits of all ranks, and be saved with the model.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokengrain.credit.group import GroupStatistics


@dataclass(frozen=True)
class Visits:
    """What is known of a prompt: number of visits, mean and standard deviation of its rewards."""

    count: int = 0
    mean: float = 0.0
    std: float = 0.0

    def after(self, mean: float, std: float, window: int | None = None) -> Visits:
        """The statistics with one more visit (equations 29 and 30 for ddof 0 and groups of one size)."""
        old = self.count if window is None else min(self.count, window)
        i = old + 1
        gap = mean - self.mean
        variance = (old * self.std**2 + std**2 + old / i * gap**2) / i
        return Visits(self.count + 1, self.mean + gap / i, variance**0.5)


@dataclass(frozen=True)
class SmoothAdvantages:
    """The advantages of a step and what they come from, `[C]` each.

    Attributes:
        advantages: of the two smoothed ones that with the smaller absolute value.
        current: standardised with this visit's mean and deviation.
        cumulative: standardised with those of all visits, this one included.
        smoothed_current: (i - 1)/i current + 1/i cumulative, i the number of the visit.
        smoothed_cumulative: 1/i current + (i - 1)/i cumulative.
        visits: the new statistics of every prompt seen, to be given to `PromptHistory.record`.
    """

    advantages: Tensor
    current: Tensor
    cumulative: Tensor
    smoothed_current: Tensor
    smoothed_cumulative: Tensor
    visits: dict[str, Visits]


@dataclass
class PromptHistory:
    """Statistics of the rewards of every prompt, by its id.

    Args:
        ddof: of a visit's deviation; 1 as in the released code, 0 as in the paper (then the statistics are those
            of all rewards pooled, if every visit has the same number).
        window: weigh the past as at most so many visits, so that it fades when rewards drift; None: all of it.
        normalize_by_std: False: differences to the means only.
    """

    ddof: int = 1
    window: int | None = None
    normalize_by_std: bool = True
    visits: dict[str, Visits] = field(default_factory=dict)

    def smooth(self, rewards: Tensor, group: Tensor, prompts: Sequence[Hashable]) -> SmoothAdvantages:
        """Advantages of a step. The state does not change: give the result's `visits` to `record`.

        Args:
            rewards: `[C]`; NaN where a completion could not be scored: advantage 0, no part of the statistics.
            group: long `[C]`, index into `prompts`.
            prompts: a stable id per group, `TokenBatch.rows`; groups with the same id are one visit.

        Raises:
            ValueError: fewer ids than groups.
        """
        if group.numel() and int(group.max()) >= len(prompts):
            raise ValueError(f"{int(group.max()) + 1} groups need as many prompt ids, got {len(prompts)}")
        keys = list(dict.fromkeys(str(p) for p in prompts))
        index = {key: i for i, key in enumerate(keys)}
        group = torch.tensor([index[str(p)] for p in prompts], dtype=torch.long, device=group.device)[group]
        s = GroupStatistics(rewards.detach().double(), group, self.ddof)
        found = zip(keys, s.count.tolist(), s.mean.tolist(), s.std.tolist())
        new = {k: self[k].after(mean, std, self.window) for k, count, mean, std in found if count}
        total = [new.get(k, self[k]) for k in keys]
        i = self._weights(total, s)[group]
        mean, std = (s.rewards.new_tensor(values)[group] for values in _columns(total))
        a_current = self._divided(s.deviations, s.std[group])
        a_total = self._divided(torch.where(s.scored, s.rewards - mean, 0.0), std)
        s_current = (i - 1) / i * a_current + a_total / i
        s_total = a_current / i + (i - 1) / i * a_total
        chosen = torch.where(s_current.abs() < s_total.abs(), s_current, s_total)
        dtype = rewards.dtype
        return SmoothAdvantages(
            advantages=chosen.to(dtype),
            current=a_current.to(dtype),
            cumulative=a_total.to(dtype),
            smoothed_current=s_current.to(dtype),
            smoothed_cumulative=s_total.to(dtype),
            visits=new,
        )

    def record(self, visits: Mapping[str, Visits]) -> None:
        """Write back the statistics of a step: those of all ranks, on every rank."""
        self.visits.update(visits)

    def __getitem__(self, prompt: Hashable) -> Visits:
        return self.visits.get(str(prompt), Visits())

    def state_dict(self) -> dict[str, Any]:
        """Plain lists, for JSON or `torch.save`: three numbers per prompt."""
        return {
            "prompts": list(self.visits),
            "count": [v.count for v in self.visits.values()],
            "mean": [v.mean for v in self.visits.values()],
            "std": [v.std for v in self.visits.values()],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace everything known; exact to the bit after `state_dict` and JSON."""
        columns = zip(state["count"], state["mean"], state["std"], strict=True)
        self.visits = dict(zip(state["prompts"], (Visits(*row) for row in columns), strict=True))

    def _weights(self, total: list[Visits], s: GroupStatistics) -> Tensor:
        """i of every prompt `[G]`: the number of this visit, as the window counts it."""
        counts = [max(v.count, 1) if self.window is None else min(max(v.count, 1), self.window + 1) for v in total]
        return s.rewards.new_tensor(counts)

    def _divided(self, differences: Tensor, std: Tensor) -> Tensor:
        """Differences over the deviation, 0 where that is 0; no epsilon."""
        if not self.normalize_by_std:
            return differences
        return torch.where(std > 0, differences / torch.where(std > 0, std, 1.0), 0.0)


def _columns(visits: list[Visits]) -> tuple[list[float], list[float]]:
    return [v.mean for v in visits], [v.std for v in visits]
