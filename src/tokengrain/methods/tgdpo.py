"""TGDPO: DPO with token-level reward guidance (arXiv 2506.14574, equation 14).

    L   = -log σ(β (Σ_t f_t d_t of chosen - Σ_t f_t d_t of rejected)),    d_t = log π_t - log ref_t
    f_t = 1 + α r_t (chosen),  1 - α r_t (rejected),                      r_t = β' (log guide_t - log ref_t)

The guide is the same model after DPO (or SimPO) on the same pairs, see recipes/tgdpo.yaml. α = 0 is DPO.
"""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor

from tokengrain.batch import Segments, TokenBatch
from tokengrain.loss import LossOutput, token_weights
from tokengrain.method import Card, credit, objective
from tokengrain.methods._pairs import log_ratios, margin_loss, pair_difference, pair_metrics, weight_metrics
from tokengrain.scoring.reference import scorer_logps
from tokengrain.settings import Number, Positive

CARD = Card(
    "tgdpo",
    "TGDPO",
    "DPO weighted by a guide's rewards",
    "TGDPO: Harnessing Token-Level Reward Guidance for Enhancing Direct Preference Optimization",
    "2506.14574",
    "ICML 2025",
    trains="guide, then policy, offline pairs",
    credit="log-ratio of a DPO- or SimPO-trained guide",
)

WRONG_WAY = """tgdpo: some token weights are not positive (the log has weights/min), so these tokens are pushed the \
wrong way; lower alpha, set weight_clamp_min, or scale the token rewards"""


@credit("guide", values="signed")
def guide(batch: TokenBatch, *, model: Any, reference: Any, beta: Positive = 0.1) -> Tensor:
    """r_t = β (log guide - log reference): how much a preference-trained guide raises each token (TGDPO).

    With a guide trained by DPO with this β it is DPO's implicit token reward (arXiv 2404.12358).

    Args:
        model: the guide, trained with DPO or SimPO. Same tokenizer as the policy.
        reference: where the guide started from.
        beta: reward per nat. The paper's theory means the β that the guide was trained with; the authors' code uses
            the β of the run that is guided.
    """
    return guide_rewards(scorer_logps(model, batch), scorer_logps(reference, batch), beta)


def guide_rewards(guide_logps: Tensor, ref_logps: Tensor, beta: float) -> Tensor:
    """r of each token `[N]`, detached."""
    return (beta * (guide_logps - ref_logps)).detach()


@objective("tgdpo")
def tgdpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    ref_logps: Tensor,
    token_rewards: Tensor,
    beta: Positive = 0.1,
    alpha: Number = 0.5,
    weight_clamp_min: Number | None = None,
    normalise_weights: bool = False,
) -> LossOutput:
    """DPO whose tokens weigh f inside the margin.

    Args:
        beta, alpha: strength of the tie to the reference, and of the guidance.
        weight_clamp_min: floor of f (None: none, as the authors). The theory needs f > 0.
        normalise_weights: divide each completion's f by their mean (ours, not the authors').

    Returns:
        `losses` [P]; rewards in the metrics are unweighted, "weighted/margins" is the margin that is trained.
    """
    d = log_ratios(logps, ref_logps)
    f = token_weights(token_rewards, segments, alpha=alpha, clamp_min=weight_clamp_min, normalise=normalise_weights)
    margin = pair_difference(beta * segments.sum(f * d), segments)
    rewards = (beta * segments.sum(d)).detach()  # unweighted: comparable across methods
    metrics = pair_metrics(rewards, logps, segments) | weight_metrics(f, segments)
    metrics["weighted/margins"] = margin.detach()
    metrics["loss/base"] = margin_loss(pair_difference(rewards, segments))
    if bool((metrics["weights/nonpositive"] > 0).any()):
        warnings.warn(WRONG_WAY, stacklevel=2)
    return LossOutput(margin_loss(margin), metrics)
