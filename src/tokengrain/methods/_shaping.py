"""From token scores to the rewards and advantages of a rollout (Q-RM, arXiv 2505.23363, sections 2.5 to 2.7).

Everything here is data for the policy step: flat vectors `[N]` over the tokens of all completions of a rollout,
without gradient. A token's score is the score of the action that produced it, so nothing is shifted. Statistics
pool all tokens of the rollout, with the population's standard deviation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.methods._clipped import KLEstimator, kl_estimate

Scaling = Literal["std", "zscore", "centre", "none"]
SampledKL = KLEstimator | Literal["abs"]


class Spread(Protocol):
    """What scores are scaled by: a mean and a (population) standard deviation."""

    @property
    def mean(self) -> float: ...

    @property
    def std(self) -> float: ...


@dataclass(frozen=True)
class Moments:
    """Mean and spread of numbers seen so far; those of two sets add up, whatever their sizes.

    Attributes:
        count: how many.
        mean: their mean.
        squares: sum of squared distances from the mean.
    """

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

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


def scale_scores(values: Tensor, scaling: Scaling = "std", moments: Spread | None = None) -> Tensor:
    """Scores on a scale that rewards can live on: `[N] -> [N]`, detached.

    std:    z / s              (the authors' code: they found it to work better)
    zscore: (z - mean) / s     (the paper)
    centre: z - mean
    none:   z

    Scores that do not vary (s = 0, up to rounding) have no scale: "std" leaves them, "zscore" gives 0.

    Args:
        moments: mean and spread to use; None: those of `values`.
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


def sampled_kl(logps: Tensor, ref_logps: Tensor, form: SampledKL = "k1") -> Tensor:
    """What a sampled token says about KL(policy || reference), `[N]`, detached.

    "abs" is |log policy - log reference|, Q-RM's penalty; the others are those of `kl_estimate`.
    """
    if form == "abs":
        return (logps - ref_logps).detach().abs()
    return kl_estimate(logps.detach(), ref_logps, form)


def penalised(rewards: Tensor, kl: Tensor, kl_coef: float) -> Tensor:
    """Rewards minus kl_coef * KL, `[N]`, detached; the KL comes after any scaling of the rewards."""
    return (rewards - kl_coef * kl).detach()


def rescore_last(rewards: Tensor, segments: Segments) -> Tensor:
    """The last token of each completion gets the mean reward of the completion, its own included: `[N]`."""
    return torch.where(segments.is_last, segments.broadcast(segments.mean(rewards)), rewards).detach()


def q_advantages(
    rewards: Tensor, values: Tensor | None = None, *, value_coef: float = 0.01, value_scaling: Scaling = "std"
) -> Tensor:
    """A = r - value_coef * V with a Q-function as reward: no GAE, no bootstrapping. `[N]`, detached.

    Args:
        rewards: scaled scores, KL subtracted; also what the critic is trained on.
        values: V of the state before each token, None without a critic.
        value_coef, value_scaling: 0.01 and "std" in the authors' code; 1 and "none" in the paper's Algorithm 1.
    """
    if values is None:
        return rewards.detach()
    return (rewards - value_coef * scale_scores(values, value_scaling)).detach()
