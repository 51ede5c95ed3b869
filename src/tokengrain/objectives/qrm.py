"""Q-RM: a discriminative reward model with one score per token (arXiv 2505.23363)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import NonNegative, Number, check_choice
from tokengrain.objectives.output import LossOutput
from tokengrain.objectives.pairwise import both_sides_counted, margin_loss, pair_difference, reward_metrics

Pooling = Literal["mean", "last"]


def qrm_loss(
    token_scores: Tensor,
    segments: Segments,
    *,
    beta: NonNegative = 0.2,
    gamma: Number = 2.0,
    pooling: Pooling = "mean",
) -> LossOutput:
    """Bradley-Terry on a score per completion, pooled from its tokens, with a margin.

    The loss pulls every token of a completion alike; which token earned what comes from the backbone that all
    pairs share.

    Args:
        token_scores: the reward model's score of each token, read at the token itself `[N]`.
        segments: cuts `[N]` into 2P completions: chosen, rejected, chosen, ...
        beta: scale of the scores. The gap of the pooled scores grows to about gamma / beta.
        gamma: target margin.
        pooling: "mean", or "last": the last token alone, the usual outcome reward model.

    Returns:
        `losses` [P]; a pair with an empty side has loss 0 and "valid" 0. Rewards in the metrics are the pooled
        scores, without beta.
    """
    pooled = pooled_scores(token_scores, segments, pooling)
    valid = both_sides_counted(segments)
    losses = torch.where(valid, margin_loss(beta * pair_difference(pooled, segments) - gamma), 0.0)
    metrics = reward_metrics(pooled, segments)
    metrics["valid"] = valid.to(pooled.dtype)
    return LossOutput(losses, metrics)


def pooled_scores(token_scores: Tensor, segments: Segments, pooling: Pooling = "mean") -> Tensor:
    """One score per completion `[C]` from those of its tokens `[N]`; 0 for an empty one. Ranks best-of-n.

    The mean, not the sum: a sum would prefer long completions. In float32 at least.
    """
    check_choice("pooling", pooling, Pooling)
    scores = token_scores if token_scores.dtype == torch.float64 else token_scores.float()
    if pooling == "mean":
        return segments.mean(scores)
    return segments.sum(torch.where(segments.is_last, scores, 0.0))
