"""DCPO: Dynamic Clipping Policy Optimization (arXiv 2509.02333).

The ratio r of a token of old probability q is clipped where |(r - 1) r q| > epsilon, so that improbable tokens get a
wide interval (equation 8 is reduction "mean" with the normaliser "prompt_mean"):

    low(q)  = 1/2 + 1/2 sqrt(max(1 - 4 epsilon_low / q, 0))
    high(q) = min(1/2 + 1/2 sqrt(1 + 4 epsilon_high / q), ratio_max)

Advantages are smoothed over the visits of a prompt. On visit i, with N the rewards standardised by this visit's mean
and deviation, and T by those of all visits, this one included,

    A = of (i - 1)/i N + 1/i T and 1/i N + (i - 1)/i T the one with the smaller absolute value

so that a group whose rewards are all equal learns from what the same prompt earned before.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, require
from tokengrain.loss import LossOutput
from tokengrain.method import Card, Rollout, objective, rollout_credit
from tokengrain.methods._clipped import KLEstimator, Reduction, clipped_tokens, policy_loss
from tokengrain.methods._shaping import GroupStatistics, mean, scored, shares
from tokengrain.settings import Count, NonNegative, Number, Positive

CARD = Card(
    "dcpo",
    "DCPO",
    "clips by probability, remembers rewards",
    "DCPO: Dynamic Clipping Policy Optimization",
    "2509.02333",
    "2025",
    trains="policy, online",
    credit="all rewards that the prompt has had so far",
)


@objective("dcpo", unit="completions")
def dcpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    old_logps: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    epsilon_low: NonNegative = 0.16,
    epsilon_high: NonNegative = 0.2,
    ratio_max: Positive = 10.0,
    beta: NonNegative = 0.0,
    kl: KLEstimator = "k3",
    kl_importance: bool = False,
    clamp: bool = False,
    reduction: Reduction = "mean",
    max_length: Positive | None = None,
) -> LossOutput:
    """The clipped policy loss with dynamic bounds.

    Args:
        epsilon_low, epsilon_high: the paper's values (its released script has others).
        ratio_max: bound of the ratio for both signs of the advantage; above 1.
        others: see `policy_loss`; the paper has no KL term.
    """
    require(ratio_max > 1, ValueError, f"ratio_max must be above 1, got {ratio_max}")
    old_logps = old_logps.detach()
    low, high = dcpo_bounds(old_logps, epsilon_low, epsilon_high, ratio_max)
    tokens = clipped_tokens(logps - old_logps, advantages, low, high, ratio_max, clamp=clamp)
    given: Any = {"old_logps": old_logps, "advantages": advantages, "ref_logps": ref_logps, "entropy": entropy}
    given |= {"weights": weights, "reduction": reduction, "max_length": max_length}
    return policy_loss(tokens, logps, segments, **given, beta=beta, kl=kl, kl_importance=kl_importance, clamp=clamp)


def dcpo_bounds(old_logps: Tensor, epsilon_low: float, epsilon_high: float, ratio_max: float) -> tuple[Tensor, Tensor]:
    """(low(q), high(q)) of tokens with these log q `[N]`, in float32 or wider; no gradient."""
    old_logps = old_logps.detach().to(torch.promote_types(old_logps.dtype, torch.float32))
    # 1 / q. exp(80) is finite in float32; a token this improbable has the limits of both bounds.
    inverse = torch.exp((-old_logps).clamp(max=80.0))
    low = 0.5 + 0.5 * (1 - 4 * epsilon_low * inverse).clamp(min=0).sqrt()
    high = 0.5 + 0.5 * (1 + 4 * epsilon_high * inverse).sqrt()
    return low, high.clamp(max=ratio_max)


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
    """A of a rollout, N, T and the two that A is chosen of, `[C]` each; the new statistics of every prompt seen."""

    advantages: Tensor
    current: Tensor
    cumulative: Tensor
    smoothed_current: Tensor
    smoothed_cumulative: Tensor
    visits: dict[str, Visits]


@rollout_credit("dcpo", phase="advantages", unscored=True)
@dataclass(kw_only=True)
class DCPO:
    """Smooth advantage standardisation, one advantage per completion.

    Statistics are by row id: they survive shuffles, epochs, resumes and another number of ranks. A prompt that is twice
    in a rollout, on whichever ranks, is one visit.
    """

    # Of a visit's deviation: 1 as in the released code, 0 as in the paper (then the statistics are those of all rewards
    # pooled, if every visit has the same number).
    ddof: Literal[0, 1] = 1
    window: Count | None = None  # weigh the past as at most so many visits, so that it fades when rewards drift
    normalize_by_std: bool = True  # else differences to the means only
    # What a prompt's advantages are once its mean reward of all visits is the highest reward it can earn (max_reward):
    # "keep", or "zero", so that solved prompts are not pushed on.
    solved: Literal["keep", "zero"] = "keep"
    max_reward: Number | None = None
    visits: dict[str, Visits] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        given = self.solved != "zero" or self.max_reward is not None
        require(given, RecipeError, "credit 'dcpo': solved is 'zero', which needs max_reward")

    def __call__(self, rollout: Rollout) -> None:
        total, known = rollout.total, scored(rollout)
        rewards = [r if k else None for r, k in zip(total.double().tolist(), known.tolist(), strict=True)]
        parts, own = shares(rollout, (list(rollout.prompt_ids), rewards, rollout.group.tolist()))
        prompts = [p for ids, _, _ in parts for p in ids]
        firsts = [sum(len(ids) for ids, _, _ in parts[:rank]) for rank in range(len(parts))]
        group = torch.tensor([first + g for first, (_, _, groups) in zip(firsts, parts, strict=True) for g in groups])
        everything = [math.nan if r is None else r for _, rs, _ in parts for r in rs]
        found = self.smooth(torch.tensor(everything, dtype=torch.float64), group, prompts)
        self.visits |= found.visits
        start = sum(len(rs) for _, rs, _ in parts[:own])
        advantages = found.advantages[start : start + len(rewards)].to(total)
        mine = [self.visits.get(str(p), Visits()) for p in rollout.prompt_ids]
        if self.solved == "zero" and self.max_reward is not None:
            # Rewards are float32, which holds 0.7 a little below 0.7; a mean over visits rounds as well.
            limit = self.max_reward - 1e-6 * max(1.0, abs(self.max_reward))
            solved = torch.tensor([v.mean >= limit for v in mine], device=total.device)
            advantages = torch.where(solved[rollout.group], 0.0, advantages)
        rollout.advantages = rollout.broadcast(advantages)
        rollout.metrics |= {
            "dcpo/utilisation": mean(((advantages != 0) & known).float()),
            "dcpo/visits": sum(v.count for v in mine) / max(len(mine), 1),
            "dcpo/prompts": float(len(self.visits)),
        }

    def smooth(self, rewards: Tensor, group: Tensor, prompts: Sequence[Hashable]) -> SmoothAdvantages:
        """Advantages of a rollout, that of all ranks; the state stays as it is.

        A completion whose reward `[C]` is NaN has advantage 0 and no part in the statistics. `prompts` has a stable id
        per group; groups with the same id are one visit.
        """
        keys = list(dict.fromkeys(str(p) for p in prompts))
        index = {key: i for i, key in enumerate(keys)}
        group = torch.tensor([index[str(p)] for p in prompts], dtype=torch.long, device=group.device)[group]
        s = GroupStatistics(rewards.detach().double(), group, self.ddof)
        found = zip(keys, s.count.tolist(), s.mean.tolist(), s.std.tolist())
        old = {k: self.visits.get(k, Visits()) for k in keys}
        new = {k: old[k].after(mean, std, self.window) for k, count, mean, std in found if count}
        now = (old | new).values()
        count, mean, std = (s.rewards.new_tensor([getattr(v, n) for v in now])[group] for n in ("count", "mean", "std"))
        # i is the number of this visit, as the window counts it.
        i = count.clamp(min=1) if self.window is None else count.clamp(1, self.window + 1)
        current = self._divided(s.deviations, s.std[group])
        total = self._divided(torch.where(s.scored, s.rewards - mean, 0.0), std)
        s_current = (i - 1) / i * current + total / i
        s_total = current / i + (i - 1) / i * total
        chosen = torch.where(s_current.abs() < s_total.abs(), s_current, s_total)
        a, n, t, s_n, s_t = (x.to(rewards.dtype) for x in (chosen, current, total, s_current, s_total))
        return SmoothAdvantages(a, n, t, s_n, s_t, new)

    def _divided(self, differences: Tensor, std: Tensor) -> Tensor:
        """Differences over the deviation, 0 where that is 0; no epsilon."""
        if not self.normalize_by_std:
            return differences
        return torch.where(std > 0, differences / torch.where(std > 0, std, 1.0), 0.0)

    def state_dict(self) -> dict[str, Any]:
        columns = {name: [getattr(v, name) for v in self.visits.values()] for name in ("count", "mean", "std")}
        return {"prompts": list(self.visits), **columns}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        columns = zip(state["count"], state["mean"], state["std"], strict=True)
        self.visits = dict(zip(state["prompts"], (Visits(*row) for row in columns), strict=True))
