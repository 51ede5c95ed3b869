"""TIS-DPO: DPO with token-level importance sampling and estimated weights (arXiv 2410.04350).

    L   = -log σ(β (Σ_t w_t d_t of chosen - Σ_t w_t d_t of rejected)),    d_t = log π_t - log ref_t
    w_t = k exp(+μ clamp(r_t, L, U)) (chosen),  k exp(-μ clamp(r_t, L, U)) (rejected)
    r_t = log good_t - log bad_t, in nats

`good` and `bad` are contrastive models: here DPO on the pairs and DPO on the exchanged pairs, the credit
`contrastive_dpo` with beta 1 (see recipes/tis_dpo.yaml). r is clamped before μ turns its sign, so the bounds are not
mirrored on the rejected side. μ = 0 or equal models: DPO. The paper's KL term η is off in the released settings, and
left out here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.loss import LossOutput
from tokengrain.method import Card, objective
from tokengrain.methods._pairs import log_ratios, margin_loss, pair_difference, pair_metrics, weight_metrics
from tokengrain.settings import NonNegative, Number, Positive

CARD = Card(
    "tis_dpo",
    "TIS-DPO",
    "weights tokens by contrastive models",
    "TIS-DPO: Token-level Importance Sampling for Direct Preference Optimization With Estimated Weights",
    "2410.04350",
    "ICLR 2025",
    trains="two contrastive models, then policy, offline pairs",
    credit="log-ratio of a DPO model to a reverse DPO model",
)


@objective("tis_dpo")
def tis_dpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    ref_logps: Tensor,
    token_rewards: Tensor,
    beta: Positive = 0.1,
    mu: NonNegative = 1.0,
    k: Positive = 1.0,
    lower: Number = -0.5,
    upper: Number = 1.5,
) -> LossOutput:
    """DPO whose tokens weigh w inside the margin.

    Args:
        token_rewards: r `[N]`, nats.
        beta: strength of the tie to the reference.
        mu: how strongly r counts; 0 is DPO.
        k: factor of all weights. It acts as a factor of beta.
        lower, upper: L and U, the bounds of r.

    Returns:
        `losses` [P]; rewards in the metrics are unweighted.
    """
    if lower > upper:
        raise ValueError(f"lower must not be above upper, got lower={lower} and upper={upper}")
    sign = torch.where(segments.is_chosen, mu, -mu).to(logps.dtype)
    r = token_rewards.detach().to(logps.dtype)
    w = k * torch.exp(sign * r.clamp(lower, upper))
    d = log_ratios(logps, ref_logps)
    margin = beta * pair_difference(segments.sum(w * d), segments)
    metrics = pair_metrics(beta * segments.sum(d.detach()), logps, segments) | weight_metrics(w, segments)
    metrics["weighted/margins"] = margin.detach()
    chosen, rejected = segments.pairs(segments.mean(((r < lower) | (r > upper)).to(logps.dtype)))
    metrics["weights/clamped"] = (chosen + rejected) / 2
    return LossOutput(margin_loss(margin), metrics)
