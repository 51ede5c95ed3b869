"""Shared parts of the losses on preference pairs.

Everywhere: N counted completion tokens, C = 2P completions, P pairs; completion 2i is the chosen and
2i + 1 the rejected one of pair i. Only counted tokens are in the flat vectors, so there is nothing to mask.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.settings import check_choice

MarginLoss = Literal["sigmoid", "hinge", "robust"]


def pair_difference(per_completion: Tensor, segments: Segments) -> Tensor:
    """Chosen minus rejected: `[2P] -> [P]`."""
    chosen, rejected = segments.pairs(per_completion)
    return chosen - rejected


def margin_loss(margin: Tensor, loss_type: MarginLoss = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """Loss of a margin, `[P] -> [P]`; label_smoothing e is the assumed share of swapped labels.

    sigmoid: -(1-e) log σ(m) - e log σ(-m)                     (e > 0: conservative DPO)
    robust:  (-(1-e) log σ(m) + e log σ(-m)) / (1 - 2e)        (unbiased under a share e of swapped labels)
    hinge:   max(0, 1 - m)                                     (which has no smoothing)
    """
    check_choice("loss_type", loss_type, MarginLoss)
    e = label_smoothing
    if not 0 <= e < 0.5:
        raise ValueError(f"label_smoothing must lie in [0, 0.5), got {e}")
    if loss_type == "hinge":
        if e:
            raise ValueError(f"loss_type 'hinge' has no label smoothing, got label_smoothing={e}")
        return torch.relu(1 - margin)
    if e == 0:
        return -F.logsigmoid(margin)
    if loss_type == "robust":
        return (-(1 - e) * F.logsigmoid(margin) + e * F.logsigmoid(-margin)) / (1 - 2 * e)
    return -(1 - e) * F.logsigmoid(margin) - e * F.logsigmoid(-margin)


def higher(chosen: Tensor, rejected: Tensor) -> Tensor:
    """1 where the chosen one is higher, 0 where it is lower, and half where they are equal, `[P]`."""
    return 0.5 + 0.5 * (chosen - rejected).sign()


def reward_metrics(rewards: Tensor, segments: Segments) -> dict[str, Tensor]:
    """Rewards `[2P]` by side, their margin, and whether the chosen one is higher: `[P]` each, detached."""
    chosen, rejected = segments.pairs(rewards.detach())
    return {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": higher(chosen, rejected),
        "rewards/margins": chosen - rejected,
    }


def pair_metrics(rewards: Tensor, logps: Tensor, segments: Segments) -> dict[str, Tensor]:
    """What every pair loss on log-probabilities `[N]` logs, `[P]` each, detached.

    `rewards` `[2P]` are implicit ones of completions, never token-weighted: comparable across methods.
    """
    logps_chosen, logps_rejected = segments.pairs(segments.sum(logps.detach()))
    return {**reward_metrics(rewards, segments), "logps/chosen": logps_chosen, "logps/rejected": logps_rejected}


def both_sides_counted(segments: Segments) -> Tensor:
    """Which pairs have a counted token on either side, bool `[P]`."""
    return torch.minimum(*segments.pairs(segments.lengths)) > 0


def chosen_token_losses(logps: Tensor, segments: Segments, sft_weight: float) -> Tensor | None:
    """`-sft_weight * logp` of every chosen token, or None if the weight is 0; a normaliser makes it a token mean."""
    return -sft_weight * logps[segments.is_chosen] if sft_weight else None


def log_ratios(logps: Tensor, ref_logps: Tensor) -> Tensor:
    """d_t = log p_t - log q_t, `[N]`; no gradient reaches the reference."""
    return logps - ref_logps.detach()


def completion_lengths(segments: Segments, like: Tensor) -> Tensor:
    """Counted tokens per completion `[C]` in the dtype of `like`, at least 1 so that it can divide."""
    return segments.lengths.clamp(min=1).to(like.dtype)


def weight_metrics(weights: Tensor, segments: Segments) -> dict[str, Tensor]:
    """Per pair: its lowest token weight, and the share of its tokens whose weight is not positive."""
    lowest = torch.minimum(*segments.pairs(-segments.max(-weights)))
    chosen, rejected = segments.pairs(segments.sum((weights <= 0).to(weights.dtype)))
    tokens = torch.add(*segments.pairs(segments.lengths)).clamp(min=1)
    lowest = torch.where(torch.isfinite(lowest), lowest, 1.0)  # a pair without tokens has no weight: 1 is neutral
    return {"weights/min": lowest, "weights/nonpositive": (chosen + rejected) / tokens}
