"""The core that TGDPO and T-REG share: a pair loss whose tokens carry weights 1 ± alpha * r.

With token rewards r, a chosen token weighs f = 1 + alpha r and a rejected one f = 1 - alpha r. For both
methods the gradient on a token's log-probability is the same formula,
    -c * f_t on chosen, +c * f_t on rejected,
and they differ in which margin gives c = scale * sigmoid(-margin): the weighted one (TGDPO) or the
unweighted one (T-REG, whose regulariser is a detached weight times a weighted log-likelihood).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.objectives.pairwise import margin_loss, pair_difference

SequenceWeight = Literal["dynamic"]


def token_weights(
    token_rewards: Tensor,
    segments: Segments,
    *,
    alpha: float,
    clamp_min: float | None = None,
    normalise: bool = False,
) -> Tensor:
    """f = 1 + alpha r on chosen tokens, 1 - alpha r on rejected ones: `[N] -> [N]`, no gradient.

    Args:
        token_rewards: r `[N]`.
        clamp_min: floor of f (None: none, as the authors); a floored token keeps the floor.
        normalise: divide f by its mean over the completion, so that a completion's weights average 1.
    """
    sign = torch.where(segments.is_chosen, 1.0, -1.0).to(token_rewards.dtype)
    f = 1 + alpha * sign * token_rewards.detach()
    if clamp_min is not None:
        f = f.clamp(min=clamp_min)
    if normalise:
        f = f / segments.broadcast(segments.mean(f))
    return f


@dataclass
class TokenWeighted:
    """Per pair `[P]` unless said otherwise.

    Attributes:
        losses: what is optimised.
        base: the loss without credit, detached.
        rewards: unweighted implicit reward of each completion `[C]`, detached.
        margin: the weighted margin, detached.
        sequence_weights: w of T-REG (all 1 where there is none), detached.
    """

    losses: Tensor
    base: Tensor
    rewards: Tensor
    margin: Tensor
    sequence_weights: Tensor


def token_weighted_loss(
    logps: Tensor,
    weights: Tensor,
    segments: Segments,
    *,
    ref_logps: Tensor | None,
    scale: Tensor | float,
    margin: Literal["weighted", "unweighted"],
    gamma: float = 0.0,
    sequence_weight: float | SequenceWeight = "dynamic",
    gamma_in_sequence_weight: bool = True,
) -> TokenWeighted:
    """Pair loss with token weights; with all weights 1 it is the base loss (DPO, SimPO) bit for bit.

    Args:
        logps: log-probabilities under the policy `[N]`.
        weights: f `[N]`, see `token_weights`.
        ref_logps: log-probabilities under the reference `[N]`; None for a reference-free base.
        scale: implicit reward per nat: beta, or beta / length as a tensor `[C]`.
        margin: which margin stands inside the sigmoid.
        gamma: target margin, subtracted.
        sequence_weight: w of T-REG: "dynamic" is σ(-unweighted margin), a number is constant.
        gamma_in_sequence_weight: whether the dynamic w contains gamma.
    """
    d = logps if ref_logps is None else logps - ref_logps.detach()
    rewards = scale * segments.sum(d)
    plain = pair_difference(rewards, segments)
    weighted = pair_difference(scale * segments.sum(weights * d), segments)
    base = margin_loss(plain - gamma)
    if margin == "weighted":
        w = torch.ones_like(plain)
        losses = margin_loss(weighted - gamma)
    else:
        shift = gamma if gamma_in_sequence_weight else 0.0
        # Detached: else the optimiser could shrink the loss through w, R having an arbitrary constant.
        w = (
            torch.sigmoid(shift - plain.detach())
            if sequence_weight == "dynamic"
            else torch.full_like(plain, float(sequence_weight))
        )
        # alpha * (R_w + R_l): f - 1 is +alpha r on chosen, -alpha r on rejected; policy log-probs alone.
        regulariser = -pair_difference(scale * segments.sum((weights - 1) * logps), segments)
        losses = base + w * regulariser
    return TokenWeighted(losses, base.detach(), rewards.detach(), (weighted - gamma).detach(), w.detach())


def weight_metrics(weights: Tensor, segments: Segments) -> dict[str, Tensor]:
    """Per pair: its lowest token weight, and the share of its tokens whose weight is not positive."""
    lowest = torch.minimum(*segments.pairs(-segments.max(-weights)))
    chosen, rejected = segments.pairs(segments.sum((weights <= 0).to(weights.dtype)))
    tokens = torch.add(*segments.pairs(segments.lengths)).clamp(min=1)
    # A pair without tokens has no weight: 1 is neutral.
    lowest = torch.where(torch.isfinite(lowest), lowest, torch.ones_like(lowest))
    return {"weights/min": lowest, "weights/nonpositive": (chosen + rejected) / tokens}
