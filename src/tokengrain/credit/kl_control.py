"""Weights of a KL term that follow the KL that is measured: one number, or one per difficulty bucket.

The weights are constants for the loss. Their state is what a run must save: `state_dict` gives plain numbers. Sums
over buckets (`bucket_sums`) add up over ranks; give every rank the same totals, so that weights stay equal.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tokengrain.batch import Segments

BUCKETS = ("easy", "medium", "hard")
"""Names of the difficulty buckets; in tensors a bucket is its place in this list, -1 where there is none."""


def bucket_sums(values: Tensor, buckets: Tensor) -> Tensor:
    """Sum and count of the values of each bucket: `[K], long [K] -> float64 [3, 2]`; an all-reduce adds ranks.

    A value that is NaN, or whose bucket is -1, is left out.
    """
    keep = ~torch.isnan(values) & (buckets >= 0)
    pairs = torch.stack([values.detach().double(), torch.ones_like(values, dtype=torch.float64)], dim=1)
    return pairs.new_zeros(len(BUCKETS), 2).index_add(0, buckets[keep], pairs[keep])


def bucket_means(sums: Tensor) -> dict[str, float]:
    """The mean of every bucket that has values."""
    return {name: s / n for name, (s, n) in zip(BUCKETS, sums.tolist(), strict=True) if n}


def per_bucket(values: Mapping[str, float], buckets: Tensor, missing: float = math.nan) -> Tensor:
    """A number per bucket, looked up for each item: long `[K] -> float64 [K]`; `missing` where the bucket is -1."""
    numbers = [*(values.get(name, missing) for name in BUCKETS), missing]
    return torch.tensor(numbers, dtype=torch.float64, device=buckets.device)[buckets]


@dataclass
class AdaptiveKL:
    """One coefficient pulled towards a target KL (arXiv 1909.08593): PPO and RTO, where asked for.

    Args:
        coef: the coefficient now.
        target: nats per token, or per completion, as what is measured.
        horizon: completions; larger is slower.
    """

    coef: float
    target: float
    horizon: float = 10000.0

    def update(self, kl: float, completions: int) -> float:
        """The coefficient after a rollout of so many completions with this mean KL.

        In RTO that is the mean of the completions' mean k1, weighed by their lengths: the mean over all tokens.
        """
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.coef *= 1 + error * completions / self.horizon
        return self.coef

    def state_dict(self) -> dict[str, Any]:
        return {"coef": self.coef}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.coef = float(state["coef"])


@dataclass
class LogBucketKL:
    """One weight per bucket, moved in its logarithm by a smoothed relative error: the released code of ARES.

    Args:
        target: KL per bucket, nats per token; one number for all.
        interval: only every so many updates move the weights. With the released 100 a weight moves by at most 1 %
            per hundred updates; 1 follows the error at once.
        ema: weight of the past in both averages.
        lr, clip: size of a step, and bound of the smoothed error in it.
        deadzone: relative errors below this move nothing.
        low, high: bounds of the weights.
    """

    target: Mapping[str, float] | float = 0.01
    interval: int = 100
    ema: float = 0.97
    lr: float = 0.05
    clip: float = 0.2
    deadzone: float = 0.02
    low: float = 1e-4
    high: float = 1e2
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 1.0))
    kl: dict[str, float] = field(default_factory=dict)
    error: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 0.0))
    updates: int = 0

    def update(self, sums: Tensor) -> None:
        """Take in the completions' mean KLs: `bucket_sums(segments.mean(kl), buckets)`."""
        self.updates += 1
        for name, now in bucket_means(sums).items():
            self.kl[name] = (1 - self.ema) * now + self.ema * self.kl.get(name, now)
            error = self.kl[name] / max(_of(self.target, name), 1e-8) - 1
            if abs(error) < self.deadzone or self.updates % self.interval:
                continue
            self.error[name] = (1 - self.ema) * error + self.ema * self.error[name]
            step = self.lr * min(max(self.error[name], -self.clip), self.clip)
            log = math.log(min(max(self.weights[name], self.low), self.high)) + step
            self.weights[name] = min(max(math.exp(log), self.low), self.high)

    def state_dict(self) -> dict[str, Any]:
        return {
            "weights": dict(self.weights),
            "kl": dict(self.kl),
            "error": dict(self.error),
            "updates": self.updates,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights, self.kl, self.error = (dict(state[k]) for k in ("weights", "kl", "error"))
        self.updates = int(state["updates"])


@dataclass
class LinearBucketKL:
    """One weight per bucket, multiplied by 1 + step * relative error: the paper's Algorithm 1 of ARES.

    Args:
        target: KL per bucket, nats per token; one number for all.
        step: the paper's a.
        low, high: bounds of the weights.
    """

    target: Mapping[str, float] | float = 0.01
    step: float = 0.1
    low: float = 1e-3
    high: float = 10.0
    weights: dict[str, float] = field(default_factory=lambda: dict.fromkeys(BUCKETS, 1.0))

    def update(self, sums: Tensor) -> None:
        """Take in `bucket_sums(controlled_kl(...), buckets)`: tokens of flagged windows count as KL 0."""
        for name, now in bucket_means(sums).items():
            error = now / max(_of(self.target, name), 1e-8) - 1
            self.weights[name] = min(max(self.weights[name] * (1 + self.step * error), self.low), self.high)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": dict(self.weights)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.weights = dict(state["weights"])


def kl_token_weights(weights: Tensor, segments: Segments, relaxed: Tensor | None = None, rho: float = 0.5) -> Tensor:
    """Weight of every token's KL: that of its completion, times rho where relaxed. `[N]`, constants.

    Args:
        weights: `[C]`, for example `per_bucket(controller.weights, buckets[group])`.
        relaxed: bool `[N]`, tokens whose windows are flagged (`HighEntropy.mask`); None: none.
        rho: factor of relaxed tokens, in [0, 1]; the paper gives no value.
    """
    if not 0 <= rho <= 1:
        raise ValueError(f"kl_token_weights: rho must lie in [0, 1], got {rho}")
    tokens = segments.broadcast(weights.detach())
    return tokens if relaxed is None else torch.where(relaxed.bool(), rho * tokens, tokens)


def controlled_kl(kl: Tensor, segments: Segments, relaxed: Tensor) -> Tensor:
    """Mean KL of each completion `[C]` with relaxed tokens as 0, over all its tokens: relaxation hides no drift."""
    return segments.mean(torch.where(relaxed.bool(), 0.0, kl.detach()))


def _of(target: Mapping[str, float] | float, name: str) -> float:
    return target[name] if isinstance(target, Mapping) else target
