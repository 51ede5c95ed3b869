"""PPO's losses as functions of flat tensors: the clipped policy loss (arXiv 1707.06347) and the value loss.

Where advantages and returns come from is the business of `tokengrain.credit.gae` and `tokengrain.credit.shaping`.
In Q-RM the tokens of a minibatch are pooled: reduction "sum" with the normaliser "token_mean". In RTO completions
weigh alike: reduction "mean" with the normaliser "mean".
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import NonNegative, Positive
from tokengrain.objectives.clipped import Reduction, Sampled, clipped_tokens, policy_output, reduce_tokens
from tokengrain.objectives.output import LossOutput


def ppo_policy_loss(
    logps: Tensor,
    segments: Segments,
    *,
    old_logps: Tensor,
    advantages: Tensor,
    clip_range: Positive | None = 0.2,
    ratio_cap: Positive | None = None,
    reduction: Reduction = "sum",
    max_length: Positive | None = None,
) -> LossOutput:
    """PPO's policy loss with one advantage per token.

    Args:
        logps: log-probabilities under the policy `[N]`, nats.
        segments: cuts `[N]` into C completions.
        old_logps: the same when the completions were sampled `[N]`.
        advantages: A `[N]`; no gradient flows into them.
        clip_range: the ratio of the two policies is clipped to 1 -/+ this; None: no clipping.
        ratio_cap: bound of the ratio where the advantage is negative (dual clip); None: none.
        reduction, max_length: how tokens become the loss of a completion, see `Reduction`.

    Returns:
        `losses` [C]; metrics as for GRPO, and "ratio/outside", the share of tokens whose ratio lies outside the
        range, whether the clip acts (A has the sign that it needs) or not.
    """
    low, high = (0.0, math.inf) if clip_range is None else (1 - clip_range, 1 + clip_range)
    tokens = clipped_tokens(logps - old_logps.detach(), advantages, low, high, ratio_cap)
    sampled = Sampled(logps, old_logps, advantages)
    output = policy_output(tokens, segments, sampled, reduction=reduction, max_length=max_length)
    outside = (tokens.ratio < low) | (tokens.ratio > high)
    output.metrics["ratio/outside"] = segments.mean(outside.to(logps.dtype))
    return output


def value_loss(
    values: Tensor,
    segments: Segments,
    *,
    returns: Tensor,
    old_values: Tensor | None = None,
    clip_range: Positive | None = None,
    weight: NonNegative = 1.0,
    reduction: Reduction = "sum",
    max_length: Positive | None = None,
) -> LossOutput:
    """Squared error of a critic, the larger of that of V and that of V clipped to a range around its old value.

    Args:
        values: V of the state before each token `[N]`.
        segments: cuts `[N]` into C completions.
        returns: what V should be `[N]`; no gradient flows into them.
        old_values: V when the completions were sampled `[N]`, needed with clip_range.
        clip_range: V is clipped to old_values -/+ this; where that gives the larger error the gradient is 0.
            None: no clipping.
        weight: 1 is Q-RM's, 0.5 OpenRLHF's (RTO).
        reduction, max_length: how tokens become the loss of a completion, see `Reduction`.

    Returns:
        `losses` [C]; in the metrics "values/mean", "values/error" (mean squared error of V itself) and, with
        clip_range, "values/clipped" (share of tokens whose clipped error is the larger one).

    Raises:
        ValueError: clip_range without old_values.
    """
    if clip_range is not None and old_values is None:
        raise ValueError(f"value_loss: clip_range = {clip_range} needs old_values, the critic's at sampling")
    error = (values - returns.detach()) ** 2
    metrics = {"values/mean": segments.mean(values.detach()), "values/error": segments.mean(error.detach())}
    if clip_range is not None and old_values is not None:
        old = old_values.detach()
        outside = (values - old).detach().abs() > clip_range
        clipped = (old + (values - old).clamp(-clip_range, clip_range) - returns.detach()) ** 2
        wins = outside & (clipped > error)  # inside they differ by rounding alone
        metrics["values/clipped"] = segments.mean(wins.to(values.dtype))
        error = torch.where(wins, clipped, error)
    losses = weight * reduce_tokens(error, segments, reduction, max_length)
    return LossOutput(losses, metrics, unit="completions", token_unit="tokens")
