"""Credit steps of PPO, RTO and REINFORCE: rewards per token, what is taken off for the KL, and advantages from them.

The reward of a token is `step.token_rewards`; the outcome of a completion, `step.rewards`, stands on its last token.
A completion that could not be scored (NaN) has advantage 0 and teaches the critic nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.callables import NonNegative, Number, Positive, Share
from tokengrain.credit.gae import gae, whiten
from tokengrain.credit.kl_control import AdaptiveKL
from tokengrain.credit.shaping import (
    Moments,
    SampledKL,
    Scaling,
    penalised,
    q_advantages,
    rescore_last,
    sampled_kl,
    scale_scores,
)
from tokengrain.errors import RecipeError, RunError
from tokengrain.training.online.parts import mean, pooled_moments, scored, token_level
from tokengrain.training.online.step import Phase, RolloutStep, Stateless


class GAE(Stateless):
    """Generalised advantage estimation (arXiv 1506.02438) of the tokens' rewards; the critic's targets.

    Args:
        gamma: discount per token.
        lam: 0.95 in PPO and RTO; 1 gives the rewards still to come, minus V.
        whiten: mean 0 and variance 1 over all tokens of the rollout, of all ranks. Targets are not whitened.
        use_values: False: without a critic, V = 0.

    Raises:
        RecipeError: lam < 1 without a critic, where it would only hide rewards that lie far ahead.
    """

    name = "gae"
    phase: Phase = "advantages"
    provides = frozenset({"returns"})

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


class Reinforce(Stateless):
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

    name = "reinforce"
    phase: Phase = "advantages"

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

    name = "normalize"
    phase: Phase = "rewards"
    needs: frozenset[str] = frozenset()

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


class KLPenalty:
    """Takes coef * KL to the reference off the reward of each token, as PPO does (arXiv 1909.08593).

    Args:
        coef: reward per nat; the first one, where it adapts.
        form: what estimates the KL of a token: "k1" (PPO, RTO), "k2", "k3" or "abs" (Q-RM); see `sampled_kl`.
        target: the coefficient adapts to hold this mean KL, nats per token; None: it is fixed.
        horizon: completions over which it adapts.
    """

    name = "kl_penalty"
    phase: Phase = "rewards"
    needs = frozenset({"ref_logps"})

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
