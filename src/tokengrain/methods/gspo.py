"""GSPO: Group Sequence Policy Optimization (arXiv 2507.18071), in the token form.

    s   = exp(mean over the completion's tokens of log π(t) - log π_old(t))                     one ratio per completion
    s_t = sg[s] π(t) / sg[π(t)]                                                                       (equation 14)
    l_t = -min(s_t A_t, clip(s_t, 1 - epsilon, 1 + epsilon_high) A_t)                                 (equation 13)

With one advantage per completion value and gradient are those of the sequence form (equation 5), so there is no second
form; with token credit the completion's tokens are clipped by the sign of their own advantage.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.loss import LossOutput
from tokengrain.method import Card, objective
from tokengrain.methods._clipped import KLEstimator
from tokengrain.methods.grpo import grpo_loss
from tokengrain.settings import NonNegative, Positive

CARD = Card(
    "gspo",
    "GSPO",
    "one ratio for each completion",
    "Group Sequence Policy Optimization",
    "2507.18071",
    "2025",
    trains="policy, online",
    credit="the group's mean (every token of a completion alike)",
)


@objective("gspo", unit="completions")
def gspo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    old_logps: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    epsilon: NonNegative = 3e-4,
    epsilon_high: NonNegative = 4e-4,
    ratio_cap: Positive | None = None,
    beta: NonNegative = 0.0,
    kl: KLEstimator = "k3",
    kl_importance: bool = False,
    clamp: bool = False,
) -> LossOutput:
    """The clipped policy loss with one ratio per completion; belongs to the normaliser "mean".

    Its tokens are averaged within a completion: a sum would weigh completions by their length.

    Args:
        logps: log-probabilities under the policy `[N]`, nats; in float32 or wider, for clip ranges so narrow.
        epsilon, epsilon_high: distance of the bounds from 1. The defaults are the paper's; a range such as PPO's 0.2
            would never clip a mean of many tokens.
        others: as for `grpo_loss`.
    """
    given: Any = {"old_logps": old_logps, "advantages": advantages, "ref_logps": ref_logps, "entropy": entropy}
    given |= {"weights": weights, "epsilon": epsilon, "epsilon_high": epsilon_high, "ratio_cap": ratio_cap}
    given |= {"beta": beta, "kl": kl, "kl_importance": kl_importance, "clamp": clamp}
    return grpo_loss(logps, segments, importance="sequence", **given)
