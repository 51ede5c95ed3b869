"""SimPO: Simple Preference Optimization with a reference-free reward (arXiv 2405.14734, equations 4 and 6).

L = -log σ(ρ_w - ρ_l - γ),    ρ = β · mean of log π_t over the completion
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import require
from tokengrain.loss import LossOutput
from tokengrain.method import Card, objective
from tokengrain.methods._pairs import (
    both_sides_counted,
    chosen_token_losses,
    margin_loss,
    pair_difference,
    pair_metrics,
)
from tokengrain.settings import NonNegative, Number, Positive, Smoothing

CARD = Card(
    "simpo",
    "SimPO",
    "mean log-probability with a margin",
    "SimPO: Simple Preference Optimization with a Reference-Free Reward",
    "2405.14734",
    "NeurIPS 2024",
)


@objective("simpo")
def simpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    beta: Positive = 2.0,
    gamma_beta_ratio: Number | None = None,
    gamma: Number | None = None,
    loss_type: Literal["sigmoid", "hinge"] = "sigmoid",
    label_smoothing: Smoothing = 0.0,
    sft_weight: NonNegative = 0.0,
) -> LossOutput:
    """SimPO on preference pairs; no reference.

    Args:
        beta: scale of the mean log-probability.
        gamma_beta_ratio: target margin divided by beta (the authors' code).
        gamma: target margin (the paper, TRL). Give at most one of the two; neither means a ratio of 0.25, the default
            of the authors' code.
        label_smoothing: assumed share of swapped labels, in [0, 0.5).
        sft_weight: weight of an added token-mean cross-entropy over all chosen tokens of the step.

    Returns:
        `losses` [P]; rewards in the metrics are beta * mean log-probability, without gamma. A pair with an empty side
        (nothing selected there) has loss 0 and stays in the count: a mean over no tokens is 0, better than any text's.
    """
    margin_target = simpo_gamma(beta, gamma_beta_ratio, gamma)
    rewards = beta * segments.mean(logps)  # equation 4: length-normalised
    margin = pair_difference(rewards, segments) - margin_target
    losses = margin_loss(margin, loss_type, label_smoothing)  # equation 6
    both = both_sides_counted(segments)
    losses = torch.where(both, losses, 0.0)
    compared = torch.where(both.repeat_interleave(2), rewards, 0.0)  # else a mean of no tokens wins
    metrics = pair_metrics(compared, logps, segments)
    return LossOutput(losses, metrics, chosen_token_losses(logps, segments, sft_weight))


def simpo_gamma(beta: float, gamma_beta_ratio: float | None, gamma: float | None) -> float:
    """The target margin, from at most one of its two names."""
    both = f"give gamma or gamma_beta_ratio, not both; got gamma={gamma} and gamma_beta_ratio={gamma_beta_ratio}"
    require(gamma is None or gamma_beta_ratio is None, ValueError, both)
    if gamma is not None:
        return gamma
    return beta * (0.25 if gamma_beta_ratio is None else gamma_beta_ratio)
