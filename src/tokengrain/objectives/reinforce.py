"""REINFORCE with one weight per token."""

from __future__ import annotations

from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import Positive
from tokengrain.objectives.clipped import Reduction, reduce_tokens
from tokengrain.objectives.output import LossOutput


def reinforce_loss(
    logps: Tensor,
    segments: Segments,
    *,
    advantages: Tensor,
    reduction: Reduction = "sum",
    max_length: Positive | None = None,
) -> LossOutput:
    """Policy gradient: -advantage * log-probability of every token.

    Args:
        logps: log-probabilities under the policy `[N]`, nats.
        segments: cuts `[N]` into C completions.
        advantages: weight of each token `[N]`; no gradient flows into them.
        reduction, max_length: how tokens become the loss of a completion, see `Reduction`. Q-RM pools the tokens
            of a minibatch: "sum" with the normaliser "token_mean".

    Returns:
        `losses` [C].
    """
    losses = reduce_tokens(-advantages.detach() * logps, segments, reduction, max_length)
    metrics = {"advantages/mean": segments.mean(advantages.detach()), "logps": segments.sum(logps.detach())}
    return LossOutput(losses, metrics, unit="completions", token_unit="tokens")
