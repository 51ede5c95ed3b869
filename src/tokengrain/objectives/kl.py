"""Single-sample estimators of KL(policy || reference) per token, from the sampled token's log-probabilities.

With d = log p_ref - log p and tokens drawn from p (Schulman, "Approximating KL divergence", 2020):

    k1 = -d                    unbiased, large variance, may be negative; its gradient is 0 on average
    k2 = d^2 / 2               biased; its gradient is that of the KL on average
    k3 = exp(d) - d - 1        unbiased, never negative; its gradient is that of KL(ref || policy) on average

"On average" holds for tokens drawn from the policy itself; after updates on the same rollouts the estimate
must be weighed by the importance ratio to stay so.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokengrain.callables import check_choice

KLEstimator = Literal["k1", "k2", "k3"]

# What verl clamps to, where asked for.
MAX_LOG_RATIO = 20.0
MAX_K3 = 10.0


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: KLEstimator = "k3", *, clamp: bool = False) -> Tensor:
    """Estimates of KL(policy || reference), one per token, differentiable in `logps`.

    Args:
        logps: log-probabilities of the sampled tokens under the policy `[N]`, nats.
        ref_logps: the same under the reference `[N]`; no gradient flows into it.
        estimator: "k1", "k2" or "k3".
        clamp: as verl does for k3: d to +-20 and the estimate to at most 10, with gradient 0 outside.

    Returns:
        `[N]`, nats; 0 where both are equal.

    Raises:
        ValueError: an unknown estimator.
    """
    check_choice("estimator", estimator, KLEstimator)
    d = ref_logps.detach() - logps
    if estimator == "k1":
        return -d
    if estimator == "k2":
        return d.square() / 2
    if not clamp:
        return torch.expm1(d) - d
    d = d.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    return (torch.expm1(d) - d).clamp(max=MAX_K3)
