"""PPO's losses as functions of flat tensors: the clipped policy loss (arXiv 1707.06347) and the value loss.

Where advantages and returns come from is the business of `tokengrain.credit.gae` and `tokengrain.credit.shaping`.
In Q-RM the tokens of a minibatch are pooled: reduction "sum" with the normaliser "token_mean". In RTO completions
weigh alike: reduction "mean" with the normaliser "mean".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, RunError
from tokengrain.loss import LossOutput
from tokengrain.method import Card, RolloutStep, objective, rollout_credit
from tokengrain.methods._clipped import Reduction, Sampled, clipped_tokens, policy_output, reduce_tokens
from tokengrain.methods._rollout import mean, pooled_moments, scored, token_level
from tokengrain.methods._shaping import (
    Moments,
    SampledKL,
    Scaling,
    penalised,
    q_advantages,
    rescore_last,
    sampled_kl,
    scale_scores,
)
from tokengrain.methods.aepo import AdaptiveKL
from tokengrain.settings import NonNegative, Number, Positive, Share

CARD = Card(
    "ppo",
    "PPO",
    "a critic says what to expect",
    "Proximal Policy Optimization Algorithms",
    "1707.06347",
    "2017",
    trains="policy and critic, online",
    credit="advantage estimation with a critic",
    page="rto",
)


@objective("ppo", unit="completions")
def ppo_policy_loss(
    logps: Tensor,
    segments: Segments,
    *,
    old_logps: Tensor,
    advantages: Tensor,
    clip_range: Positive | None = 0.2,
    ratio_cap: Positive | None = None,
    reduction: Reduction = "sum",
    max_length: Positive | None = None,
) -> LossOutput:
    """PPO's policy loss with one advantage per token.

    Args:
        logps: log-probabilities under the policy `[N]`, nats.
        segments: cuts `[N]` into C completions.
        old_logps: the same when the completions were sampled `[N]`.
        advantages: A `[N]`; no gradient flows into them.
        clip_range: the ratio of the two policies is clipped to 1 -/+ this; None: no clipping.
        ratio_cap: bound of the ratio where the advantage is negative (dual clip); None: none.
        reduction, max_length: how tokens become the loss of a completion, see `Reduction`.

    Returns:
        `losses` [C]; metrics as for GRPO, and "ratio/outside", the share of tokens whose ratio lies outside the
        range, whether the clip acts (A has the sign that it needs) or not.
    """
    low, high = (0.0, math.inf) if clip_range is None else (1 - clip_range, 1 + clip_range)
    tokens = clipped_tokens(logps - old_logps.detach(), advantages, low, high, ratio_cap)
    sampled = Sampled(logps, old_logps, advantages)
    output = policy_output(tokens, segments, sampled, reduction=reduction, max_length=max_length)
    outside = (tokens.ratio < low) | (tokens.ratio > high)
    output.metrics["ratio/outside"] = segments.mean(outside.to(logps.dtype))
    return output


def value_loss(
    values: Tensor,
    segments: Segments,
    *,
    returns: Tensor,
    old_values: Tensor | None = None,
    clip_range: Positive | None = None,
    weight: NonNegative = 1.0,
    reduction: Reduction = "sum",
    max_length: Positive | None = None,
) -> LossOutput:
    """Squared error of a critic, the larger of that of V and that of V clipped to a range around its old value.

    Args:
        values: V of the state before each token `[N]`.
        segments: cuts `[N]` into C completions.
        returns: what V should be `[N]`; no gradient flows into them.
        old_values: V when the completions were sampled `[N]`, needed with clip_range.
        clip_range: V is clipped to old_values -/+ this; where that gives the larger error the gradient is 0.
            None: no clipping.
        weight: 1 is Q-RM's, 0.5 OpenRLHF's (RTO).
        reduction, max_length: how tokens become the loss of a completion, see `Reduction`.

    Returns:
        `losses` [C]; in the metrics "values/mean", "values/error" (mean squared error of V itself) and, with
        clip_range, "values/clipped" (share of tokens whose clipped error is the larger one).

    Raises:
        ValueError: clip_range without old_values.
    """
    if clip_range is not None and old_values is None:
        raise ValueError(f"value_loss: clip_range = {clip_range} needs old_values, the critic's at sampling")
    error = (values - returns.detach()) ** 2
    metrics = {"values/mean": segments.mean(values.detach()), "values/error": segments.mean(error.detach())}
    if clip_range is not None and old_values is not None:
        old = old_values.detach()
        outside = (values - old).detach().abs() > clip_range
        clipped = (old + (values - old).clamp(-clip_range, clip_range) - returns.detach()) ** 2
        wins = outside & (clipped > error)  # inside they differ by rounding alone
        metrics["values/clipped"] = segments.mean(wins.to(values.dtype))
        error = torch.where(wins, clipped, error)
    losses = weight * reduce_tokens(error, segments, reduction, max_length)
    return LossOutput(losses, metrics, unit="completions", token_unit="tokens")


# ----------------------------------------------------------------------------------------------------
# REINFORCE with one weight per token.


@objective("reinforce", unit="completions")
def reinforce_loss(
    logps: Tensor,
    segments: Segments,
    *,
    advantages: Tensor,
    reduction: Reduction = "sum",
    max_length: Positive | None = None,
) -> LossOutput:
    """Policy gradient: -advantage * log-probability of every token.

    Args:
        logps: log-probabilities under the policy `[N]`, nats.
        segments: cuts `[N]` into C completions.
        advantages: weight of each token `[N]`; no gradient flows into them.
        reduction, max_length: how tokens become the loss of a completion, see `Reduction`. Q-RM pools the tokens
            of a minibatch: "sum" with the normaliser "token_mean".

    Returns:
        `losses` [C].
    """
    losses = reduce_tokens(-advantages.detach() * logps, segments, reduction, max_length)
    metrics = {"advantages/mean": segments.mean(advantages.detach()), "logps": segments.sum(logps.detach())}
    return LossOutput(losses, metrics, unit="completions", token_unit="tokens")


# ----------------------------------------------------------------------------------------------------
# Generalised advantage estimation (arXiv 1506.02438) on flat tokens, and whitening of what it gives.
#
# One time step is one counted token. Tokens that do not count (tool output, a user's turn) are not in the flat
# vectors, so nothing decays through a gap. After the last token of a completion there is no value to bootstrap from,
# truncated or not, as in the authors' code of RTO (arXiv 2404.18922).


@dataclass(frozen=True)
class Advantages:
    """What the policy and the critic learn from, `[N]` each, without gradient.

    Attributes:
        advantages: A, not whitened.
        returns: A + V, the critic's target.
    """

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor, segments: Segments, *, values: Tensor | None = None, gamma: float = 1.0, lam: float = 0.95
) -> Advantages:
    """A_t = delta_t + gamma lam A_{t+1} with delta_t = r_t + gamma V_{t+1} - V_t, per completion.

    Args:
        rewards: one per token `[N]`.
        segments: cuts `[N]` into C completions.
        values: V of the state before each token `[N]`; None: 0, without a critic (lam = 1 then gives the
            discounted reward that is still to come).
        gamma: discount per token, in [0, 1].
        lam: weight of the next token's advantage, in [0, 1]: 0 gives the one-step error, 1 the return minus V.

    Raises:
        ValueError: gamma or lam outside [0, 1], or values of another shape.
    """
    for name, number in (("gamma", gamma), ("lam", lam)):
        if not 0 <= number <= 1:
            raise ValueError(f"gae: {name} must lie in [0, 1], got {number}")
    r = rewards.detach()
    if values is not None and values.shape != r.shape:
        raise ValueError(f"gae: values have shape {tuple(values.shape)}, expected {tuple(r.shape)}: one per token")
    V = torch.zeros_like(r) if values is None else values.detach()
    dtype = torch.promote_types(torch.promote_types(r.dtype, V.dtype), torch.float32)
    r, V = r.to(dtype), V.to(dtype)
    following = torch.where(segments.is_last, 0.0, V.roll(-1))
    delta = r + gamma * following - V
    A, mask = segments.to_padded(delta)
    advantages = _discounted_sums(A, gamma * lam)[mask]
    return Advantages(advantages, advantages + V)


def whiten(advantages: Tensor, moments: Moments | None = None, *, variance_floor: float = 1e-8) -> Tensor:
    """Mean 0 and population variance 1 over all tokens of the rollout: `[N] -> [N]`, detached.

    Args:
        advantages: `[N]`, of the whole rollout, not of a minibatch or a completion.
        moments: those of all ranks' tokens, which add up; None: those of `advantages`.
        variance_floor: the least variance that is divided by, so that constant advantages give 0.
    """
    moments = Moments.of(advantages) if moments is None else moments
    return (advantages.detach() - moments.mean) / max(moments.std**2, variance_floor) ** 0.5


def _discounted_sums(x: Tensor, factor: float) -> Tensor:
    """sum over i >= 0 of factor^i x[:, t + i] for every t: `[C, T] -> [C, T]`, zeros standing after the row.

    Sums over 1, 2, 4, ... steps: log2(T) operations on whole rows instead of T on columns.
    """
    step = 1
    while step < x.shape[1]:
        tail = torch.zeros_like(x)
        tail[:, :-step] = x[:, step:]
        x, step = x + factor**step * tail, 2 * step
    return x


# ----------------------------------------------------------------------------------------------------
# Credit steps of PPO, RTO and REINFORCE: rewards per token, what is taken off for the KL, and advantages from them.
#
# The reward of a token is `step.token_rewards`; the outcome of a completion, `step.rewards`, stands on its last token.
# A completion that could not be scored (NaN) has advantage 0 and teaches the critic nothing.


@rollout_credit("gae", phase="advantages", provides={"returns"})
class GAE:
    """Generalised advantage estimation (arXiv 1506.02438) of the tokens' rewards; the critic's targets.

    Args:
        gamma: discount per token.
        lam: 0.95 in PPO and RTO; 1 gives the rewards still to come, minus V.
        whiten: mean 0 and variance 1 over all tokens of the rollout, of all ranks. Targets are not whitened.
        use_values: False: without a critic, V = 0.

    Raises:
        RecipeError: lam < 1 without a critic, where it would only hide rewards that lie far ahead.
    """

    def __init__(self, *, gamma: Share = 1.0, lam: Share = 0.95, whiten: bool = True, use_values: bool = True) -> None:
        if lam < 1 and not use_values:
            raise RecipeError(
                f"credit 'gae': lam is {lam}, which needs a critic's values; set lam: 1, or give a critic"
            )
        self.gamma, self.lam, self.whiten, self.use_values = gamma, lam, whiten, use_values
        self.needs = frozenset({"values"}) if use_values else frozenset()

    def __call__(self, step: RolloutStep) -> None:
        values = step.quantity("values") if self.use_values else None
        found = gae(token_level(step), step.segments, values=values, gamma=self.gamma, lam=self.lam)
        known = step.broadcast(scored(step))
        still = torch.zeros_like(found.returns) if values is None else values.to(found.returns)
        returns = torch.where(known, found.returns, still)
        moments = pooled_moments(step, found.advantages[known])
        advantages = whiten(found.advantages, moments) if self.whiten else found.advantages
        step.advantages = torch.where(known, advantages, 0.0)
        step.quantities["returns"] = returns
        step.metrics |= {"gae/advantage": moments.mean, "gae/advantage_std": moments.std, "gae/return": mean(returns)}
        if values is not None:
            step.metrics["gae/explained_variance"] = explained_variance(step, still[known], returns[known])


def explained_variance(step: RolloutStep, values: Tensor, returns: Tensor) -> float:
    """Share of the returns' variance that the values explain, over all ranks: 1 is all, below 0 is worse than none."""
    total, left = pooled_moments(step, returns).std, pooled_moments(step, returns - values).std
    return 1 - (left / total) ** 2 if total > 0 else 0.0


@rollout_credit("reinforce", phase="advantages")
class Reinforce:
    """Rewards as they are for advantages: REINFORCE, and PPO on a Q-function (Q-RM, arXiv 2505.23363).

    Nothing is discounted and no reward moves to earlier tokens. For rewards that arrive late use `gae` with lam 1.

    Args:
        outcome: the completion's reward: "broadcast" on each of its tokens, "last" on the last one, "ignore".
        scaling: of the rewards per token (where there are none, of the outcomes), over the rollout of all ranks:
            "std" in Q-RM's code, "zscore" in its paper. To scale before a KL penalty use `normalize`.
        rescore_last: the last token gets the mean reward of its completion (Q-RM's REINFORCE).
        value_coef, value_scaling: A = reward - value_coef * V, V scaled over the rollout; 0.01 and "std" in Q-RM's
            PPO. Above 0 it needs a critic, whose targets are the rewards.
    """

    def __init__(
        self,
        *,
        outcome: Literal["broadcast", "last", "ignore"] = "broadcast",
        scaling: Scaling = "none",
        rescore_last: bool = False,
        value_coef: NonNegative = 0.0,
        value_scaling: Scaling = "std",
    ) -> None:
        self.outcome, self.scaling, self.rescore_last = outcome, scaling, rescore_last
        self.value_coef, self.value_scaling = value_coef, value_scaling
        self.needs = frozenset({"values"}) if value_coef else frozenset()
        self.provides = frozenset({"returns"}) if value_coef else frozenset()

    def __call__(self, step: RolloutStep) -> None:
        known = step.broadcast(scored(step))
        rewards = torch.where(known, self._rewards(step), 0.0)
        if self.rescore_last:
            rewards = rescore_last(rewards, step.segments)
        values = None
        if self.value_coef:
            raw = step.quantity("values").to(rewards)
            values = scale_scores(raw, self.value_scaling, pooled_moments(step, raw[known]))
            step.quantities["returns"] = torch.where(known, rewards, raw)
        advantages = q_advantages(rewards, values, value_coef=self.value_coef, value_scaling="none")
        step.advantages = torch.where(known, advantages, 0.0)
        step.metrics["reinforce/advantage"] = mean(step.advantages)

    def _rewards(self, step: RolloutStep) -> Tensor:
        tokens, outcome, at = step.token_rewards, torch.where(scored(step), step.rewards, 0.0), scored(step)
        if tokens is not None:
            tokens = scale_scores(tokens, self.scaling, pooled_moments(step, tokens[step.broadcast(at)]))
        elif self.outcome == "ignore":
            raise RunError("credit 'reinforce': outcome is 'ignore' and no reward was given per token")
        else:
            outcome = scale_scores(outcome, self.scaling, pooled_moments(step, outcome[at]))
        if self.outcome == "ignore":
            assert tokens is not None  # refused above
            return tokens
        spread = step.broadcast(outcome)
        if self.outcome == "last":
            spread = torch.where(step.segments.is_last, spread, 0.0)
        return spread if tokens is None else tokens + spread


@rollout_credit("normalize", phase="rewards")
class Normalize:
    """Puts rewards on a scale: (reward - mean) / deviation.

    Args:
        of: "outcome": of completions; "tokens": of tokens.
        scaling: "zscore", "std" (not centred) or "centre" (not divided).
        over: what mean and deviation are of: "running": everything seen so far, this rollout included, which is
            saved with the run; "rollout": this rollout, of all ranks.
        mean, std: fixed instead, such as those of a reward model on held-out data (RTO); both or neither.
        clip: bound of the result's size.

    Raises:
        RecipeError: one of mean and std without the other.
    """

    def __init__(
        self,
        *,
        of: Literal["outcome", "tokens"] = "outcome",
        scaling: Scaling = "zscore",
        over: Literal["running", "rollout"] = "running",
        mean: Number | None = None,
        std: Positive | None = None,
        clip: Positive | None = None,
    ) -> None:
        if (mean is None) != (std is None):
            raise RecipeError(f"credit 'normalize': mean is {mean} and std {std}; expected both or neither")
        self.of, self.scaling, self.over, self.clip = of, scaling, over, clip
        self.fixed = None if mean is None or std is None else Moments(1, mean, std**2)
        self.moments = Moments()

    def __call__(self, step: RolloutStep) -> None:
        rewards = step.rewards if self.of == "outcome" else step.token_rewards
        if rewards is None:
            raise RunError("credit 'normalize': no reward was given per token, and `of` is 'tokens'")
        known = scored(step) if self.of == "outcome" else step.broadcast(scored(step))
        moments = self.fixed
        if moments is None:
            now = pooled_moments(step, rewards[known])
            self.moments = self.moments + now if self.over == "running" else now
            moments = self.moments
        scaled = scale_scores(rewards, self.scaling, moments)
        if self.clip is not None:
            scaled = scaled.clamp(-self.clip, self.clip)
        if self.of == "outcome":
            step.rewards = scaled
        else:
            step.token_rewards = scaled
        step.metrics |= {"rewards/mean_before": moments.mean, "rewards/std_before": moments.std}

    def state_dict(self) -> dict[str, Any]:
        m = self.moments
        return {"count": m.count, "mean": m.mean, "squares": m.squares}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moments = Moments(int(state["count"]), float(state["mean"]), float(state["squares"]))


@rollout_credit("kl_penalty", phase="rewards", needs={"ref_logps"})
class KLPenalty:
    """Takes coef * KL to the reference off the reward of each token, as PPO does (arXiv 1909.08593).

    Args:
        coef: reward per nat; the first one, where it adapts.
        form: what estimates the KL of a token: "k1" (PPO, RTO), "k2", "k3" or "abs" (Q-RM); see `sampled_kl`.
        target: the coefficient adapts to hold this mean KL, nats per token; None: it is fixed.
        horizon: completions over which it adapts.
    """

    def __init__(
        self,
        *,
        coef: NonNegative = 0.01,
        form: SampledKL = "k1",
        target: Positive | None = None,
        horizon: Positive = 10000.0,
    ) -> None:
        self.form = form
        self.controller = KLCoefficient(coef, target, horizon)

    def __call__(self, step: RolloutStep) -> None:
        kl = sampled_kl(step.quantity("old_logps"), step.quantity("ref_logps"), self.form)
        before = torch.zeros_like(kl) if step.token_rewards is None else step.token_rewards
        step.token_rewards = penalised(before, kl, self.controller.coef)
        step.metrics |= {"kl_penalty/kl": mean(kl), "kl_penalty/coef": self.controller.coef}
        self.controller.follow(step, kl)

    def state_dict(self) -> dict[str, Any]:
        return self.controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.controller.load_state_dict(state)


class KLCoefficient:
    """A coefficient that is fixed, or follows a target over all ranks' rollouts."""

    def __init__(self, coef: float, target: float | None, horizon: float) -> None:
        self.adaptive = target is not None
        self._controller = AdaptiveKL(coef, target or 1.0, horizon)

    @property
    def coef(self) -> float:
        return self._controller.coef

    def follow(self, step: RolloutStep, kl: Tensor) -> None:
        """Take in the KL of a rollout's tokens `[N]`; it acts from the next rollout on."""
        if self.adaptive:
            moments = pooled_moments(step, kl)
            self._controller.update(moments.mean, sum(step.gather(len(step.segments))))

    def state_dict(self) -> dict[str, Any]:
        return self._controller.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._controller.load_state_dict(state)
