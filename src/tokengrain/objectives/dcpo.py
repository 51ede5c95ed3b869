"""DCPO: Dynamic Clipping Policy Optimization (arXiv 2509.02333): clip bounds from each token's probability.

Its smoothed advantages are in `tokengrain.credit.dcpo`. The paper's loss (equation 8) is reduction "mean" with
the normaliser "prompt_mean".
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import NonNegative, Positive
from tokengrain.objectives.clipped import KLTerm, Reduction, Sampled, clipped_tokens, policy_output
from tokengrain.objectives.kl import MAX_LOG_RATIO, KLEstimator
from tokengrain.objectives.output import LossOutput

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
