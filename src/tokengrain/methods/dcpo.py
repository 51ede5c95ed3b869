"""DCPO: Dynamic Clipping Policy Optimization (arXiv 2509.02333): clip bounds from each token's probability.

Its smoothed advantages are in `tokengrain.credit.dcpo`. The paper's loss (equation 8) is reduction "mean" with
the normaliser "prompt_mean".
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError
from tokengrain.loss import LossOutput
from tokengrain.method import Card, RolloutStep, objective, rollout_credit
from tokengrain.methods._clipped import (
    MAX_LOG_RATIO,
    KLEstimator,
    KLTerm,
    Reduction,
    Sampled,
    clipped_tokens,
    policy_output,
)
from tokengrain.methods._rollout import mean, scored, shares
from tokengrain.methods.grpo import GroupStatistics
from tokengrain.settings import NonNegative, Positive

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

# exp(80) is finite in float32; a token this improbable has the limits of both bounds.
MAX_NEGATIVE_LOGP = 80.0


def dcpo_bounds(
    old_logps: Tensor, epsilon_low: float = 0.16, epsilon_high: float = 0.2, ratio_max: float = 10.0
) -> tuple[Tensor, Tensor]:
    """Bounds of the ratio r such that |(r - 1) r q| <= epsilon, for a token of old probability q.

    low(q) = 1/2 + 1/2 sqrt(max(1 - 4 epsilon_low / q, 0)) and high(q) = 1/2 + 1/2 sqrt(1 + 4 epsilon_high / q),
    at most `ratio_max`: improbable tokens get a wide interval. No gradient.

    Args:
        old_logps: log-probabilities under the sampling policy `[N]`, nats, of the same engine and temperature
            as the new ones.

    Returns:
        (low, high), `[N]` each, in float32 or wider.
    """
    old_logps = old_logps.detach()
    if old_logps.dtype in (torch.float16, torch.bfloat16):
        old_logps = old_logps.float()
    inverse = torch.exp((-old_logps).clamp(max=MAX_NEGATIVE_LOGP))  # 1 / q
    low = 0.5 + 0.5 * (1 - 4 * epsilon_low * inverse).clamp(min=0).sqrt()
    high = 0.5 + 0.5 * (1 + 4 * epsilon_high * inverse).sqrt()
    return low, high.clamp(max=ratio_max)


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
        logps, segments, old_logps, advantages, ref_logps, entropy, weights, beta, kl, kl_importance, clamp,
            reduction, max_length: as for `grpo_loss`; the paper has no KL term.
        epsilon_low, epsilon_high: see `dcpo_bounds`; the paper's values (its released script has others).
        ratio_max: bound of the ratio for both signs of the advantage.

    Returns:
        `losses` [C].
    """
    if not ratio_max > 1:
        raise ValueError(f"ratio_max must be above 1, got {ratio_max}")
    old_logps = old_logps.detach()
    low, high = dcpo_bounds(old_logps, epsilon_low, epsilon_high, ratio_max)
    log_ratio = logps - old_logps
    if clamp:
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return policy_output(
        clipped_tokens(log_ratio, advantages, low, high, ratio_max),
        segments,
        Sampled(logps, old_logps, advantages, ref_logps, entropy, weights),
        KLTerm(beta, kl, kl_importance, clamp),
        reduction=reduction,
        max_length=max_length,
    )


# ----------------------------------------------------------------------------------------------------
# DCPO's smooth advantage standardisation (arXiv 2509.02333): statistics over all visits of a prompt.
#
# A group whose rewards are all equal has no advantage of its own; against what the same prompt earned before it has
# one. `PromptHistory` is the state: a count, a mean and a deviation per prompt. To be right it must be updated once per
# visit, on every rank with the visits of all ranks, and be saved with the model.


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


# ----------------------------------------------------------------------------------------------------
# The credit step of DCPO (arXiv 2509.02333): advantages against everything that a prompt has earned so far.


@rollout_credit("dcpo", phase="advantages")
class DCPOAdvantages:
    """Smooth advantage standardisation, one advantage per completion.

    Statistics are by row id: they survive shuffles, epochs, resumes and another number of ranks. A prompt that stands
    twice in a rollout, on whichever ranks, is one visit.

    Args:
        ddof: of a visit's deviation: 1 as in the released code, 0 as in the paper.
        window: weigh the past as at most so many visits; None: all of it.
        normalize_by_std: False: differences to the means only.
        solved: what a prompt's advantages are once its mean reward of all visits is the highest reward it can earn
            (max_reward): "keep", or "zero", so that solved prompts are not pushed on.
        max_reward: the highest reward, for solved "zero".

    Raises:
        RecipeError: solved "zero" without max_reward; a window below 1.
    """

    def __init__(
        self,
        *,
        ddof: Literal[0, 1] = 1,
        window: int | None = None,
        normalize_by_std: bool = True,
        solved: Literal["keep", "zero"] = "keep",
        max_reward: float | None = None,
    ) -> None:
        if solved == "zero" and max_reward is None:
            raise RecipeError("credit 'dcpo': solved is 'zero', which needs max_reward")
        if window is not None and window < 1:
            raise RecipeError(f"credit 'dcpo': window is {window}; expected at least 1 visit, or none")
        self.history = PromptHistory(ddof=ddof, window=window, normalize_by_std=normalize_by_std)
        self.limit = max_reward if solved == "zero" else None

    def __call__(self, step: RolloutStep) -> None:
        total = step.total
        known = scored(step)
        rewards = [r if k else None for r, k in zip(total.double().tolist(), known.tolist(), strict=True)]
        parts, own = shares(step, (list(step.prompt_ids), rewards, step.group.tolist()))
        prompts = [p for ids, _, _ in parts for p in ids]
        firsts = [sum(len(ids) for ids, _, _ in parts[:rank]) for rank in range(len(parts))]
        group = torch.tensor([first + g for first, (_, _, groups) in zip(firsts, parts, strict=True) for g in groups])
        everything = [math.nan if r is None else r for _, rs, _ in parts for r in rs]
        found = self.history.smooth(torch.tensor(everything, dtype=torch.float64), group, prompts)
        self.history.record(found.visits)
        start = sum(len(rs) for _, rs, _ in parts[:own])
        advantages = found.advantages[start : start + len(rewards)].to(total)
        if self.limit is not None:
            # Rewards are float32, which holds 0.7 a little below 0.7; a mean over visits rounds as well.
            limit = self.limit - 1e-6 * max(1.0, abs(self.limit))
            solved = torch.tensor([self.history[p].mean >= limit for p in step.prompt_ids], device=total.device)
            advantages = torch.where(solved[step.group], 0.0, advantages)
        step.advantages = step.broadcast(advantages)
        used = (advantages != 0) & known
        visits = [self.history[p].count for p in step.prompt_ids]
        step.metrics |= {
            "dcpo/utilisation": mean(used.float()),
            "dcpo/visits": sum(visits) / max(len(visits), 1),
            "dcpo/prompts": float(len(self.history.visits)),
        }

    def state_dict(self) -> dict[str, Any]:
        return self.history.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.history.load_state_dict(state)
