"""GRPO: Group Relative Policy Optimization (arXiv 2402.03300), and DAPO and Dr. GRPO, which are settings of it.

    GRPO      reduction "mean",     normaliser "mean"
    DAPO      reduction "sum",      normaliser "token_mean", epsilon_high 0.28          (arXiv 2503.14476)
    Dr. GRPO  reduction "constant", normaliser "mean", advantages without scaling       (arXiv 2503.20783)

Advantages come from `tokengrain.credit.group`.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import NonNegative, Positive, check_choice
from tokengrain.objectives.clipped import (
    KLTerm,
    Reduction,
    Sampled,
    clipped_tokens,
    policy_output,
    sequence_log_ratio,
)
from tokengrain.objectives.kl import MAX_LOG_RATIO, KLEstimator
from tokengrain.objectives.output import LossOutput

Importance = Literal["token", "sequence"]


def grpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    old_logps: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    epsilon: NonNegative = 0.2,
    epsilon_high: NonNegative | None = None,
    ratio_cap: Positive | None = None,
    importance: Importance = "token",
    beta: NonNegative = 0.0,
    kl: KLEstimator = "k3",
    kl_importance: bool = False,
    clamp: bool = False,
    reduction: Reduction = "mean",
    max_length: Positive | None = None,
) -> LossOutput:
    """The clipped policy loss on groups of sampled completions.

    Args:
        logps: log-probabilities under the policy `[N]`, nats.
        segments: cuts `[N]` into C completions.
        old_logps: the same under the policy that sampled them `[N]`; `logps.detach()` for the first update.
        advantages: `[N]`; a completion's advantage repeated for its tokens, or any token credit.
        ref_logps: the same under the frozen reference `[N]`, needed if beta > 0.
        entropy: `[N]`, nats; logged if given.
        weights: `[N]`, multiply the policy's loss outside the clip; see `Sampled`.
        kl_weights: `[N]`, multiply the KL term of each token (ARES's dynamic KL); None: 1.
        epsilon: the ratio is clipped below at 1 - epsilon, and above at 1 + epsilon.
        epsilon_high: if given, it is clipped above at 1 + epsilon_high (DAPO's clip-higher: 0.28).
        ratio_cap: bound of the ratio where the advantage is negative (dual clip; verl: 3 or 10).
        importance: "token": ratio of each token; "sequence": one ratio per completion, see `gspo_loss`.
        beta: weight of the KL term; kl: its estimator; kl_importance: weigh it by the token's ratio.
        clamp: clamp log-ratios and KL estimates as verl does, with gradient 0 outside; see `kl_estimate`.
        reduction: how tokens become the loss of a completion, see `Reduction`.
        max_length: tokens, the divisor of reduction "constant".

    Returns:
        `losses` [C].

    Raises:
        ValueError: a contradiction between the settings.
    """
    check_choice("importance", importance, Importance)
    old_logps = old_logps.detach()
    log_ratio = sequence_log_ratio(logps, old_logps, segments) if importance == "sequence" else logps - old_logps
    if clamp:
        log_ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    return policy_output(
        clipped_tokens(log_ratio, advantages, 1 - epsilon, high, ratio_cap),
        segments,
        Sampled(logps, old_logps, advantages, ref_logps, entropy, weights, kl_weights),
        KLTerm(beta, kl, kl_importance, clamp),
        reduction=reduction,
        max_length=max_length,
    )
