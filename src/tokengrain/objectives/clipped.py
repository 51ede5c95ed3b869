"""The clipped policy loss of PPO and its family: what PPO, GRPO, DAPO, GSPO and DCPO share.

With r the probability ratio of a token (new policy to the one that sampled it) and A its advantage
(PPO, arXiv 1707.06347, equation 7):

    l = -min(r A, clip(r, low, high) A)

which is -A min(r, high) for A >= 0 and -A max(r, low) for A < 0; `cap` bounds r in the second case as well
(dual clip, arXiv 1912.09729). It is computed from log r, clipped before the exponential, so that a ratio too
large for its type gives a gradient of exactly 0 where it is clipped, not 0 * inf.

Methods differ in what r is (of the token, of the completion), in low and high (constants, or functions of the
token's probability) and in how the tokens of a completion become its loss (`Reduction`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.callables import check_choice
from tokengrain.objectives.kl import KLEstimator, kl_estimate
from tokengrain.objectives.output import LossOutput

Reduction = Literal["mean", "sum", "constant"]
"""Token losses to the loss of a completion. With the normaliser that belongs to it:

    "mean"      over its tokens: GRPO with "mean", DCPO with "prompt_mean"
    "sum"       DAPO with "token_mean"; a plain sum with "sum"
    "constant"  sum / max_length, the longest completion that the run allows: Dr. GRPO with "mean"
"""


@dataclass(frozen=True)
class ClippedTokens:
    """The clipped loss token by token.

    Attributes:
        losses: `[N]`, with gradient.
        ratio: `[N]`, detached, not clipped.
        low: bool `[N]`: A < 0 and r below its bound. These tokens, and those below, have gradient 0.
        high: bool `[N]`: A > 0 and r above its bound.
        capped: bool `[N]`: A < 0 and r above the cap.
    """

    losses: Tensor
    ratio: Tensor
    low: Tensor
    high: Tensor
    capped: Tensor

    @property
    def clipped(self) -> Tensor:
        """-1, 0 or +1 per token `[N]`: clipped below, not clipped, clipped above or capped."""
        return (self.high | self.capped).to(self.losses.dtype) - self.low.to(self.losses.dtype)


def clipped_tokens(
    log_ratio: Tensor, advantages: Tensor, low: Tensor | float, high: Tensor | float, cap: float | None = None
) -> ClippedTokens:
    """-min(r A, clip(r, low, high) A) of every token.

    Args:
        log_ratio: log of the new policy's probability over that of the sampling policy `[N]`, with gradient.
        advantages: `[N]`, constants.
        low, high: bounds of the ratio (not offsets from 1), numbers or `[N]`; a low bound <= 0 never clips.
        cap: bound of the ratio where the advantage is negative; None: the loss there has no bound.

    Raises:
        ValueError: advantages of another shape; or a cap below the upper bound.
    """
    if advantages.shape != log_ratio.shape:
        raise ValueError(
            f"advantages have shape {tuple(advantages.shape)}, expected {tuple(log_ratio.shape)}: one per token; "
            "segments.broadcast repeats a completion's"
        )
    if cap is not None and not isinstance(high, Tensor) and cap < high < math.inf:
        raise ValueError(f"the ratio's cap must not lie below its upper bound {high}, got {cap}")
    d, A = log_ratio, advantages.detach().to(log_ratio.dtype)
    bottom, top = _log(low, d), _log(high, d)
    ceiling = math.inf if cap is None else math.log(cap)
    # One exponential: where A >= 0 only the upper bound acts, where A < 0 the lower one and the cap.
    lower = torch.where(A < 0, bottom, -math.inf)
    upper = torch.where(A < 0, ceiling, top)
    losses = -A * torch.exp(torch.clamp(d, lower, upper))
    at = d.detach()
    return ClippedTokens(
        losses, at.exp(), low=(A < 0) & (at < bottom), high=(A > 0) & (at > top), capped=(A < 0) & (at > ceiling)
    )


def sequence_log_ratio(logps: Tensor, old_logps: Tensor, segments: Segments) -> Tensor:
    """Log of the completion's ratio at each of its tokens `[N]`: the mean of the tokens' log-ratios (GSPO).

    In the token form (arXiv 2507.18071, equation 14): its value is the completion's, its gradient that of the
    token's own log-probability, so that tokens may have advantages of their own. If they are equal within a
    completion, value and gradient of the loss are those of the sequence form (equation 5).
    """
    whole = segments.broadcast(segments.mean((logps - old_logps).detach()))
    return whole + (logps - logps.detach())


def reduce_tokens(values: Tensor, segments: Segments, reduction: Reduction, max_length: float | None = None) -> Tensor:
    """Token losses `[N]` to losses per completion `[C]`; a completion without tokens has loss 0.

    Raises:
        ValueError: an unknown reduction; "constant" without a positive `max_length`; or `max_length` with another.
    """
    check_choice("reduction", reduction, Reduction)
    if (reduction == "constant") != (max_length is not None):
        raise ValueError(f"max_length belongs to reduction 'constant', got {max_length!r} with {reduction!r}")
    if reduction == "mean":
        return segments.mean(values)
    total = segments.sum(values)
    return total if max_length is None else total / max_length


@dataclass(frozen=True)
class Sampled:
    """What is known of sampled tokens, `[N]` each; those that may be None are optional.

    Attributes:
        logps, old_logps, ref_logps, entropy: nats; entropy is only logged.
        advantages: constants.
        weights: constants: multiply the policy's loss, outside the clip, and not the KL term (importance weights
            of a sampler whose probabilities differ from the trainer's).
        kl_weights: constants: multiply the KL term of each token (ARES's dynamic KL); None: 1.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    ref_logps: Tensor | None = None
    entropy: Tensor | None = None
    weights: Tensor | None = None
    kl_weights: Tensor | None = None


@dataclass(frozen=True)
class KLTerm:
    """The KL term of a policy loss.

    Attributes:
        beta: its weight.
        estimator, clamp: see `kl_estimate`.
        importance: weigh it by the token's ratio, which keeps its gradient right after the first update on the
            same rollouts.
    """

    beta: float = 0.0
    estimator: KLEstimator = "k3"
    importance: bool = False
    clamp: bool = False

    def losses(self, divergence: Tensor, sampled: Sampled) -> Tensor:
        """The term of every token `[N]`, from estimates of its KL."""
        if self.importance:
            divergence = divergence * torch.exp(sampled.logps - sampled.old_logps.detach())
        if sampled.kl_weights is not None:
            divergence = divergence * sampled.kl_weights.detach().to(divergence.dtype)
        return self.beta * divergence


def policy_output(
    tokens: ClippedTokens,
    segments: Segments,
    sampled: Sampled,
    kl: KLTerm | None = None,
    *,
    reduction: Reduction = "mean",
    max_length: float | None = None,
) -> LossOutput:
    """The clipped tokens of a batch as losses per completion, with the KL term and what is logged.

    Args:
        tokens: from `clipped_tokens`.
        kl: the KL term; None: none, and if there are ref_logps its k3 is logged.
        reduction, max_length: see `Reduction`.

    Returns:
        `losses` [C]. Metrics are means over the tokens of each completion, except "ratio/max".

    Raises:
        ValueError: beta > 0 without ref_logps.
    """
    kl = KLTerm() if kl is None else kl
    if kl.beta and sampled.ref_logps is None:
        raise ValueError(f"beta = {kl.beta} needs ref_logps; without a reference beta must be 0")
    losses = tokens.losses if sampled.weights is None else tokens.losses * sampled.weights.detach()
    metrics = _policy_metrics(tokens, segments, sampled)
    if sampled.ref_logps is not None:
        divergence = kl_estimate(sampled.logps, sampled.ref_logps, kl.estimator, clamp=kl.clamp)
        metrics["kl/ref"] = segments.mean(divergence.detach())
        if kl.beta:
            losses = losses + kl.losses(divergence, sampled)
    if sampled.entropy is not None:
        metrics["entropy"] = segments.mean(sampled.entropy.detach())
    per_token = {"loss": losses.detach(), "ratio": tokens.ratio, "clipped": tokens.clipped}
    reduced = reduce_tokens(losses, segments, reduction, max_length)
    return LossOutput(reduced, metrics, unit="completions", token_unit="tokens", tokens=per_token)


def _policy_metrics(tokens: ClippedTokens, segments: Segments, sampled: Sampled) -> dict[str, Tensor]:
    """What every clipped loss logs, one value per completion `[C]`."""
    dtype, mean = tokens.losses.dtype, segments.mean
    log_ratio = (sampled.logps - sampled.old_logps).detach()
    return {
        "clip/low": mean(tokens.low.to(dtype)),
        "clip/high": mean(tokens.high.to(dtype)),
        "clip/cap": mean(tokens.capped.to(dtype)),
        "clip/tokens": mean(tokens.clipped.abs()),
        "ratio/mean": mean(tokens.ratio),
        "ratio/max": torch.where(segments.lengths > 0, segments.max(tokens.ratio), 1.0),
        "kl/old": mean(torch.expm1(log_ratio) - log_ratio),  # k3 of KL(old || new): the tokens are the old policy's
        "advantages/mean": mean(sampled.advantages.detach().to(dtype)),
    }


def _log(bound: Tensor | float, like: Tensor) -> Tensor:
    return torch.as_tensor(bound, dtype=like.dtype, device=like.device).clamp(min=0).log()
