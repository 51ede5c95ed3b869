"""PPO (arXiv 1707.06347) and REINFORCE on rewards per token, with a critic or without.

    r_t = token reward - coef KL_t + [t last] outcome           credit token_rewards, normalize, kl_penalty
    δ_t = r_t + γ V_{t+1} - V_t,    A_t = δ_t + γ λ A_{t+1}     credit gae (arXiv 1506.02438); the critic learns A + V
    A_t = r_t - value_coef V_t                                  credit reinforce: a reward that is a Q-value already
    l_t = -min(ρ_t A_t, clip(ρ_t, 1 ± clip_range) A_t)          objective ppo, ρ_t = π(t) / π_old(t)
    l_t = -A_t log π(t)                                         objective reinforce

One time step is one counted token. Tokens that do not count (tool output, a user's turn) are not in the flat vectors,
so nothing decays through a gap. After the last token of a completion there is no value to bootstrap from, truncated or
not, as in the authors' code of RTO (arXiv 2404.18922). A completion that could not be scored (NaN) has advantage 0 and
teaches the critic nothing.

In Q-RM (arXiv 2505.23363) the tokens of a minibatch are pooled: reduction "sum" with the normaliser "token_mean". In
RTO completions weigh alike: reduction "mean" with the normaliser "mean".
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, RunError, require
from tokengrain.loss import LossOutput
from tokengrain.method import Card, Rollout, as_credit, checked_credit, objective, rollout_credit
from tokengrain.methods._clipped import Reduction, SampledKL, clipped_tokens, policy_loss, reduce_tokens, sampled_kl
from tokengrain.methods._shaping import Moments, Scaling, mean, pooled_moments, scale_scores, scored, token_level
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
        clip_range: the ratio of the two policies is clipped to 1 -/+ this; None: no clipping.
        ratio_cap: bound of the ratio where the advantage is negative (dual clip); None: none.
        others: see `policy_loss`.

    Returns:
        `losses` [C]; metrics as for GRPO, and "ratio/outside", the share of tokens whose ratio lies outside the range,
        whether the clip acts (A has the sign that it needs) or not.
    """
    low, high = (0.0, math.inf) if clip_range is None else (1 - clip_range, 1 + clip_range)
    tokens = clipped_tokens(logps - old_logps.detach(), advantages, low, high, ratio_cap)
    given: Any = {"old_logps": old_logps, "advantages": advantages, "reduction": reduction, "max_length": max_length}
    output = policy_loss(tokens, logps, segments, **given)
    outside = (tokens.ratio < low) | (tokens.ratio > high)
    output.metrics["ratio/outside"] = segments.mean(outside.to(logps.dtype))
    return output


@objective("reinforce", unit="completions")
def reinforce_loss(
    logps: Tensor,
    segments: Segments,
    *,
    advantages: Tensor,
    reduction: Reduction = "sum",
    max_length: Positive | None = None,
) -> LossOutput:
    """Policy gradient: -advantage * log-probability of every token; for the arguments see `policy_loss`."""
    losses = reduce_tokens(-advantages.detach() * logps, segments, reduction, max_length)
    metrics = {"advantages/mean": segments.mean(advantages.detach()), "logps": segments.sum(logps.detach())}
    return LossOutput(losses, metrics, unit="completions", token_unit="tokens")


# Rewards of a completion (`rollout.rewards`) and of its tokens (`rollout.token_rewards`).


@rollout_credit("token_rewards", phase="rewards", provides={"rewards"})
@dataclass(kw_only=True)
class TokenRewards:
    """Rewards per token from a credit source."""

    source: Any  # a credit source, a function of a `TokenBatch`, an import string of one, or a mapping with `name`
    scale: Number = 1.0
    clip: Positive | None = None  # bound of the absolute value after scaling
    combine: Literal["add", "replace"] = "add"  # to the token rewards there are, or instead of them
    outcome: bool = True  # else rewards per completion are set to 0, so that the token rewards are all there is

    def __post_init__(self) -> None:
        self.source = as_credit(self.source)

    def __call__(self, rollout: Rollout) -> None:
        values = self.scale * checked_credit(self.source(rollout.batch), rollout.batch, self.source.name)
        values = values if self.clip is None else values.clamp(-self.clip, self.clip)
        # A completion without a valid outcome stays out, whatever its tokens earn.
        values = values.to(rollout.rewards.dtype).masked_fill(rollout.broadcast(rollout.rewards.isnan()), 0.0)
        rollout.metrics["reward/tokens"] = float(rollout.segments.sum(values).mean())
        if self.combine == "add" and rollout.token_rewards is not None:
            values = values + rollout.token_rewards
        rollout.token_rewards = values
        if not self.outcome:
            rollout.rewards = rollout.rewards * 0.0  # NaN stays NaN


@rollout_credit("normalize", phase="rewards", unscored=True)
@dataclass(kw_only=True)
class Normalize:
    """Puts rewards on a scale: (reward - mean) / deviation."""

    of: Literal["outcome", "tokens"] = "outcome"  # rewards of completions, or of tokens
    scaling: Scaling = "zscore"  # or "std" (not centred), "centre" (not divided)
    # What mean and deviation are of: everything seen so far, this rollout included, which is saved with the run; or
    # this rollout, of all ranks.
    over: Literal["running", "rollout"] = "running"
    mean: Number | None = None  # fixed instead, such as those of a reward model on held-out data (RTO)
    std: Positive | None = None
    clip: Positive | None = None  # bound of the result's size
    moments: Moments = field(default=Moments(), init=False)

    def __post_init__(self) -> None:
        half = f"credit 'normalize': mean is {self.mean} and std {self.std}; expected both or neither"
        require((self.mean is None) == (self.std is None), RecipeError, half)

    def __call__(self, rollout: Rollout) -> None:
        name = "rewards" if self.of == "outcome" else "token_rewards"
        rewards = getattr(rollout, name)
        if rewards is None:
            raise RunError("credit 'normalize': no reward was given per token, and `of` is 'tokens'")
        known = scored(rollout) if self.of == "outcome" else rollout.broadcast(scored(rollout))
        if self.mean is not None and self.std is not None:
            moments = Moments(1, self.mean, self.std**2)
        else:
            now = pooled_moments(rollout, rewards[known])
            moments = self.moments = self.moments + now if self.over == "running" else now
        scaled = scale_scores(rewards, self.scaling, moments)
        setattr(rollout, name, scaled if self.clip is None else scaled.clamp(-self.clip, self.clip))
        rollout.metrics |= {"rewards/mean_before": moments.mean, "rewards/std_before": moments.std}

    def state_dict(self) -> dict[str, Any]:
        return vars(self.moments).copy()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.moments = Moments(int(state["count"]), float(state["mean"]), float(state["squares"]))


@rollout_credit("kl_penalty", phase="rewards", needs={"ref_logps"})
@dataclass(kw_only=True)
class KLPenalty:
    """Takes coef * KL to the reference off the reward of each token, as PPO does (arXiv 1909.08593)."""

    coef: NonNegative = 0.01  # reward per nat, after any scaling; the first one, where it adapts
    form: SampledKL = "k1"  # what estimates the KL of a token: "k1" (PPO, RTO), "k2", "k3" or "abs" (Q-RM)
    target: Positive | None = None  # the coefficient adapts to hold this mean KL, nats per token; None: it is fixed
    horizon: Positive = 10000.0  # completions over which it adapts

    def __call__(self, rollout: Rollout) -> None:
        kl = sampled_kl(rollout.quantity("old_logps"), rollout.quantity("ref_logps"), self.form)
        before = torch.zeros_like(kl) if rollout.token_rewards is None else rollout.token_rewards
        rollout.token_rewards = (before - self.coef * kl).detach()
        rollout.metrics |= {"kl_penalty/kl": mean(kl), "kl_penalty/coef": self.coef}
        self.coef = next_coefficient(rollout, kl, self.coef, self.target, self.horizon)

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.coef = float(state["coef"])


def next_coefficient(rollout: Rollout, kl: Tensor, coef: float, target: float | None, horizon: float) -> float:
    """The coefficient of the next rollout, from the KL of this one's tokens `[N]` on all ranks (arXiv 1909.08593)."""
    if target is None:
        return coef
    completions = sum(rollout.gather(len(rollout.segments)))
    return adapted(coef, pooled_moments(rollout, kl).mean, completions, target=target, horizon=horizon)


def adapted(coef: float, kl: float, completions: int, *, target: float, horizon: float) -> float:
    return coef * (1 + min(max(kl / target - 1, -0.2), 0.2) * completions / horizon)


# Advantages.


def _check_gae(settings: Mapping[str, Any]) -> None:
    lam = settings["lam"]  # below 1, without values, it would only hide rewards that lie far ahead
    missing = f"credit 'gae': lam is {lam}, which needs a critic's values; set lam: 1, or give a critic"
    require(lam >= 1 or settings["use_values"], RecipeError, missing)


@rollout_credit(
    "gae",
    phase="advantages",
    needs=lambda settings: {"values"} if settings["use_values"] else (),
    provides={"returns"},
    check=_check_gae,
)
def gae_credit(
    rollout: Rollout, *, gamma: Share = 1.0, lam: Share = 0.95, whiten: bool = True, use_values: bool = True
) -> None:
    """Generalised advantage estimation of the tokens' rewards; the critic's targets.

    Args:
        gamma: discount per token.
        lam: weight of the next token's advantage: 0 gives the one-step error, 1 the rewards still to come, minus V.
        whiten: mean 0 and variance 1 over all tokens of the rollout, of all ranks. Targets are not whitened.
        use_values: False: without a critic, V = 0.
    """
    values = rollout.quantity("values") if use_values else None
    found = gae(token_level(rollout), rollout.segments, values=values, gamma=gamma, lam=lam)
    known = rollout.broadcast(scored(rollout))
    still = torch.zeros_like(found.returns) if values is None else values.to(found.returns)
    returns = torch.where(known, found.returns, still)
    moments = pooled_moments(rollout, found.advantages[known])
    advantages = whitened(found.advantages, moments) if whiten else found.advantages
    rollout.advantages = torch.where(known, advantages, 0.0)
    rollout.quantities["returns"] = returns
    rollout.metrics |= {"gae/advantage": moments.mean, "gae/advantage_std": moments.std, "gae/return": mean(returns)}
    if values is not None:
        # The share of the returns' variance that the values explain: 1 is all, below 0 is worse than none.
        total, left = (pooled_moments(rollout, x).std for x in (returns[known], returns[known] - still[known]))
        rollout.metrics["gae/explained_variance"] = 1 - (left / total) ** 2 if total > 0 else 0.0


class Advantages(NamedTuple):
    """Without gradient, `[N]` each: A, not whitened, and A + V, the critic's target."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor, segments: Segments, *, values: Tensor | None = None, gamma: float = 1.0, lam: float = 0.95
) -> Advantages:
    """A_t = δ_t + γ λ A_{t+1}, δ_t = r_t + γ V_{t+1} - V_t, per completion, of rewards and V (None: 0) `[N]`."""
    r = rewards.detach()
    V = torch.zeros_like(r) if values is None else values.detach()
    dtype = torch.promote_types(torch.promote_types(r.dtype, V.dtype), torch.float32)
    r, V = r.to(dtype), V.to(dtype)
    following = torch.where(segments.is_last, 0.0, V.roll(-1))
    A, mask = segments.to_padded(r + gamma * following - V)
    # Σ over i >= 0 of (γ λ)^i δ_{t+i}, over 1, 2, 4, ... places: log2(T) operations on whole rows, not T on columns.
    reach = 1
    while reach < A.shape[1]:
        tail = torch.zeros_like(A)
        tail[:, :-reach] = A[:, reach:]
        A, reach = A + (gamma * lam) ** reach * tail, 2 * reach
    advantages = A[mask]
    return Advantages(advantages, advantages + V)


def whitened(advantages: Tensor, moments: Moments | None = None, *, variance_floor: float = 1e-8) -> Tensor:
    """Mean 0 and population variance 1 over all ranks' tokens of the rollout: `[N] -> [N]`, detached; 0 if constant."""
    moments = Moments.of(advantages) if moments is None else moments
    return (advantages.detach() - moments.mean) / max(moments.std**2, variance_floor) ** 0.5


@rollout_credit(
    "reinforce",
    phase="advantages",
    needs=lambda settings: {"values"} if settings["value_coef"] else (),
    provides=lambda settings: {"returns"} if settings["value_coef"] else (),
)
def reinforce(
    rollout: Rollout,
    *,
    outcome: Literal["broadcast", "last", "ignore"] = "broadcast",
    scaling: Scaling = "none",
    rescore_last: bool = False,
    value_coef: NonNegative = 0.0,
    value_scaling: Scaling = "std",
) -> None:
    """Rewards as they are for advantages: REINFORCE, and PPO on a Q-function (Q-RM, arXiv 2505.23363).

    Nothing is discounted and no reward moves to earlier tokens. For rewards that arrive late use `gae` with lam 1.

    Args:
        outcome: the completion's reward: "broadcast" on each of its tokens, "last" on the last one, "ignore".
        scaling: of the rewards per token (where there are none, of the outcomes), over the rollout of all ranks:
            "std" in Q-RM's code, "zscore" in its paper. To scale before a KL penalty use `normalize`.
        rescore_last: the last token gets the mean reward of its completion (Q-RM's REINFORCE).
        value_coef: A = reward - value_coef * V; 0.01 in Q-RM's PPO, 1 in its paper. Above 0 it needs a critic, whose
            targets are the rewards.
        value_scaling: of V, over the rollout of all ranks; "std" in Q-RM's code, "none" in its paper.
    """
    known = rollout.broadcast(scored(rollout))
    rewards = torch.where(known, _rewards(rollout, outcome, scaling), 0.0)
    if rescore_last:
        rewards = rescored(rewards, rollout.segments)
    advantages = rewards
    if value_coef:
        values = rollout.quantity("values").to(rewards)
        scaled = scale_scores(values, value_scaling, pooled_moments(rollout, values[known]))
        rollout.quantities["returns"] = torch.where(known, rewards, values)
        advantages = (rewards - value_coef * scaled).detach()
    rollout.advantages = torch.where(known, advantages, 0.0)
    rollout.metrics["reinforce/advantage"] = mean(rollout.advantages)


def _rewards(rollout: Rollout, outcome: str, scaling: Scaling) -> Tensor:
    """Per token `[N]`: what was given so, and the outcome."""
    tokens, known = rollout.token_rewards, scored(rollout)
    missing = "credit 'reinforce': outcome is 'ignore' and no reward was given per token"
    require(tokens is not None or outcome != "ignore", RunError, missing)
    whole = torch.where(known, rollout.rewards, 0.0)
    if tokens is None:
        whole = scale_scores(whole, scaling, pooled_moments(rollout, whole[known]))
    spread = rollout.broadcast(whole)
    spread = torch.where(rollout.segments.is_last, spread, 0.0) if outcome == "last" else spread
    if tokens is None:
        return spread
    tokens = scale_scores(tokens, scaling, pooled_moments(rollout, tokens[rollout.broadcast(known)]))
    return tokens if outcome == "ignore" else tokens + spread


def rescored(rewards: Tensor, segments: Segments) -> Tensor:
    """The last token of each completion gets the mean reward of the completion, its own included: `[N]`."""
    return torch.where(segments.is_last, segments.broadcast(segments.mean(rewards)), rewards).detach()
