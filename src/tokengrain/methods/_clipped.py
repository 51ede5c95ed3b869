"""The clipped policy loss of PPO and its family: what PPO, GRPO, DAPO, GSPO and DCPO share.

With r the probability ratio of a token (new policy to the one that sampled it) and A its advantage
(PPO, arXiv 1707.06347, equation 7):

    l = -min(r A, clip(r, low, high) A)

which is -A min(r, high) for A >= 0 and -A max(r, low) for A < 0; `cap` bounds r in the second case as well
(dual clip, arXiv 1912.09729). It is computed from log r, clipped before the exponential, so that a ratio too
large for its type gives a gradient of exactly 0 where it is clipped, not 0 * inf.

Methods differ in what r is (of the token, of the completion), in low and high (constants, or functions of the token's
probability) and in how the tokens of a completion become its loss (`Reduction`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RolloutError, require
from tokengrain.loss import LossOutput
from tokengrain.settings import NonNegative, Positive, check_choice

Reduction = Literal["mean", "sum", "constant"]
"""Token losses to the loss of a completion. With the normaliser that belongs to it:

    "mean"      over its tokens: GRPO with "mean", DCPO with "prompt_mean"
    "sum"       DAPO with "token_mean"; a plain sum with "sum"
    "constant"  sum / max_length, the longest completion that the run allows: Dr. GRPO with "mean"
"""

KLEstimator = Literal["k1", "k2", "k3"]
SampledKL = KLEstimator | Literal["abs"]
Correction = Literal["token", "sequence"]
MAX_LOG_RATIO, MAX_K3 = 20.0, 10.0  # what verl clamps to, where asked for


@dataclass(frozen=True)
class ClippedTokens:
    """The clipped loss token by token: `[N]` each, the losses with gradient."""

    losses: Tensor
    ratio: Tensor  # not clipped
    # Tokens with gradient 0:
    low: Tensor  # A < 0 and r below its bound
    high: Tensor  # A > 0 and r above its bound
    capped: Tensor  # A < 0 and r above the cap

    @property
    def clipped(self) -> Tensor:
        """-1, 0 or +1 per token `[N]`: clipped below, not clipped, clipped above or capped."""
        return (self.high | self.capped).to(self.losses.dtype) - self.low.to(self.losses.dtype)


def clipped_tokens(
    log_ratio: Tensor,
    advantages: Tensor,
    low: Tensor | float,
    high: Tensor | float,
    cap: float | None = None,
    *,
    clamp: bool = False,
) -> ClippedTokens:
    """-min(r A, clip(r, low, high) A) of every token, from log r and A `[N]`.

    The bounds are of the ratio (not offsets from 1), numbers or `[N]`; a low bound <= 0 never clips. `cap` bounds it
    where the advantage is negative; None: the loss there has no bound. `clamp`: log r to +-20, as verl does.
    """
    if advantages.shape != log_ratio.shape:
        what = f"advantages have shape {tuple(advantages.shape)}, expected {tuple(log_ratio.shape)}: one per token"
        raise ValueError(f"{what}; segments.broadcast repeats a completion's")
    if cap is not None and not isinstance(high, Tensor) and cap < high < math.inf:
        raise ValueError(f"the ratio's cap must not lie below its upper bound {high}, got {cap}")
    d = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO) if clamp else log_ratio
    A = advantages.detach().to(d.dtype)

    def log(bound: Tensor | float) -> Tensor:
        return torch.as_tensor(bound, dtype=d.dtype, device=d.device).clamp(min=0).log()

    bottom, top, ceiling = log(low), log(high), math.inf if cap is None else math.log(cap)
    # One exponential: where A >= 0 only the upper bound acts, where A < 0 the lower one and the cap.
    bounds = torch.where(A < 0, bottom, -math.inf), torch.where(A < 0, ceiling, top)
    losses = -A * torch.exp(torch.clamp(d, *bounds))
    at = d.detach()
    return ClippedTokens(
        losses, at.exp(), low=(A < 0) & (at < bottom), high=(A > 0) & (at > top), capped=(A < 0) & (at > ceiling)
    )


def sequence_log_ratio(logps: Tensor, old_logps: Tensor, segments: Segments) -> Tensor:
    """Log of the completion's ratio at each of its tokens `[N]`: GSPO's token form (arXiv 2507.18071, equation 14).

    Its value is the mean of the completion's log-ratios, its gradient that of the token's own log-probability.
    """
    return segments.broadcast(segments.mean((logps - old_logps).detach())) + (logps - logps.detach())


def policy_loss(
    tokens: ClippedTokens,
    logps: Tensor,
    segments: Segments,
    *,
    old_logps: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    beta: float = 0.0,
    kl: KLEstimator = "k3",
    kl_importance: bool = False,
    clamp: bool = False,
    reduction: Reduction = "mean",
    max_length: float | None = None,
) -> LossOutput:
    """The clipped tokens of a batch as losses per completion, with the KL term and what is logged.

    Args:
        logps: log-probabilities under the policy `[N]`, nats.
        segments: cuts `[N]` into C completions.
        old_logps: the same under the policy that sampled them `[N]`; `logps.detach()` for the first update.
        advantages: `[N]`; a completion's advantage repeated for its tokens, or any token credit.
        ref_logps: log-probabilities under the frozen reference `[N]`, needed if beta > 0; else the KL is only logged.
        entropy: `[N]`, nats; only logged.
        weights: `[N]`, multiply the policy's loss, outside the clip, and not the KL term: importance weights of a
            sampler whose probabilities differ from the trainer's.
        kl_weights: `[N]`, multiply the KL term of each token (ARES's dynamic KL); None: 1.
        beta: weight of the KL term; kl: its estimator.
        kl_importance: weigh the KL term by the token's ratio, which keeps its gradient right after the first update
            on the same rollouts.
        clamp: as verl does: log-ratios and KL estimates, with gradient 0 outside; see `kl_estimate`.
        reduction: how tokens become the loss of a completion; max_length: tokens, the divisor of "constant".

    Returns:
        `losses` [C]. Metrics are means over the tokens of each completion, except "ratio/max".
    """
    if beta and ref_logps is None:
        raise ValueError(f"beta = {beta} needs ref_logps; without a reference beta must be 0")
    mean, dtype = segments.mean, tokens.losses.dtype
    log_ratio = (logps - old_logps).detach()
    clips = {"clip/low": tokens.low, "clip/high": tokens.high, "clip/cap": tokens.capped}
    metrics = {
        **{name: mean(clipped.to(dtype)) for name, clipped in clips.items()},
        "clip/tokens": mean(tokens.clipped.abs()),
        "ratio/mean": mean(tokens.ratio),
        "ratio/max": torch.where(segments.lengths > 0, segments.max(tokens.ratio), 1.0),
        "kl/old": mean(torch.expm1(log_ratio) - log_ratio),  # k3 of KL(old || new): the tokens are the old policy's
        "advantages/mean": mean(advantages.detach().to(dtype)),
    }
    losses = tokens.losses if weights is None else tokens.losses * weights.detach()
    if ref_logps is not None:
        divergence = kl_estimate(logps, ref_logps, kl, clamp=clamp)
        metrics["kl/ref"] = mean(divergence.detach())
        if beta:
            if kl_importance:
                divergence = divergence * torch.exp(logps - old_logps.detach())
            if kl_weights is not None:
                divergence = divergence * kl_weights.detach().to(divergence.dtype)
            losses = losses + beta * divergence
    if entropy is not None:
        metrics["entropy"] = mean(entropy.detach())
    per_token = {"loss": losses.detach(), "ratio": tokens.ratio, "clipped": tokens.clipped}
    reduced = reduce_tokens(losses, segments, reduction, max_length)
    return LossOutput(reduced, metrics, unit="completions", token_unit="tokens", tokens=per_token)


def reduce_tokens(values: Tensor, segments: Segments, reduction: Reduction, max_length: float | None = None) -> Tensor:
    """Token losses `[N]` to losses per completion `[C]`; a completion without tokens has loss 0."""
    check_choice("reduction", reduction, Reduction)
    if (reduction == "constant") != (max_length is not None):
        raise ValueError(f"max_length belongs to reduction 'constant', got {max_length!r} with {reduction!r}")
    if reduction == "mean":
        return segments.mean(values)
    total = segments.sum(values)
    return total if max_length is None else total / max_length


# Two sets of log-probabilities of the same tokens: estimates of a divergence, and importance weights.


def kl_estimate(logps: Tensor, ref_logps: Tensor, estimator: KLEstimator = "k3", *, clamp: bool = False) -> Tensor:
    """Estimates of KL(policy || reference) `[N]`, nats, from single samples, differentiable in `logps`.

    With d = log p_ref - log p and tokens drawn from p (Schulman, "Approximating KL divergence", 2020):

        k1 = -d                  unbiased, large variance, may be negative; its gradient is 0 on average
        k2 = d^2 / 2             biased; its gradient is that of the KL on average
        k3 = exp(d) - d - 1      unbiased, never negative; its gradient is that of KL(ref || policy) on average

    "On average" holds for tokens drawn from the policy itself; after updates on the same rollouts the estimate must be
    weighed by the importance ratio to stay so. `clamp`, as verl does for k3: d to +-20 and the estimate to at most 10,
    with gradient 0 outside.
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


def sampled_kl(logps: Tensor, ref_logps: Tensor, form: SampledKL = "k1") -> Tensor:
    """`kl_estimate`, or with "abs" |log policy - log reference|, Q-RM's penalty: `[N]`, detached."""
    if form == "abs":
        return (logps - ref_logps).detach().abs()
    return kl_estimate(logps.detach(), ref_logps, form)


def importance_weights(
    sampling_logps: Tensor, trainer_logps: Tensor, segments: Segments, *, kind: Correction, cap: float
) -> Tensor:
    """Truncated importance weights `[N]`, without gradient: factors of the per-token loss.

    The ratio, at most `cap`, of the trainer's probability at the time of sampling to the sampler's: of the token, or
    for all tokens of the whole completion. Engines compute in other precisions, with other kernels and sometimes with
    older weights than the trainer; then what is called on-policy is not (Yao et al. 2025, "Your Efficient RL Framework
    Secretly Brings You Off-Policy RL Training").
    """
    check_choice("kind", kind, Correction)
    d = _log_ratio(sampling_logps, trainer_logps, segments)
    if kind == "sequence":
        d = segments.broadcast(segments.sum(d))
    # Bounding the exponent instead of the weight keeps exp from overflowing.
    return d.clamp(max=math.log(cap)).exp()


def sampler_mismatch(sampling_logps: Tensor, trainer_logps: Tensor, segments: Segments) -> dict[str, float]:
    """Metrics of the mismatch of the same tokens under both, nats per token. All 0 (ratios 1) if they agree.

    The sampler's are `raw_logps`, at the temperature at which the trainer scores. `k1` and `k3` estimate KL(sampler ||
    trainer); ratios are trainer/sampler, of a token or of a whole completion (as far as it can be represented).
    """
    d = _log_ratio(sampling_logps, trainer_logps, segments)
    d = d if d.numel() else d.new_zeros(1)
    sums = segments.sum(d) if segments.total else d
    values = {
        "mean_abs": d.abs().mean(),
        "max_abs": d.abs().max(),
        "k1": -d.mean(),
        "k3": (d.expm1() - d).mean(),
        "max_ratio": d.max().exp(),
        "min_ratio": d.min().exp(),
        "max_sequence_ratio": sums.max().exp(),
    }
    return {f"mismatch/{name}": float(value) for name, value in values.items()}


def _log_ratio(sampling_logps: Tensor, trainer_logps: Tensor, segments: Segments) -> Tensor:
    expected = (segments.total,)
    for name, values in (("sampling_logps", sampling_logps), ("trainer_logps", trainer_logps)):
        shape = tuple(values.shape)
        require(shape == expected, RolloutError, f"{name} has shape {shape}; expected {expected}, one per token")
        for token in (~torch.isfinite(values)).nonzero().flatten().tolist():
            where = f"token {token} (completion {int(segments.ids[token])})"
            raise RolloutError(f"{name} is {float(values[token])} for {where}; expected finite numbers")
    return trainer_logps.detach() - sampling_logps.detach().to(trainer_logps)


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

    `values` are V of the state before each token `[N]`, `returns` what it should be. V is clipped to old_values, those
    of sampling, -/+ clip_range; where that gives the larger error the gradient is 0. `weight` is 1 in Q-RM, 0.5 in
    OpenRLHF (RTO). Of the metrics "values/error" is that of V itself, "values/clipped" how often the clipped one is
    larger.
    """
    error = (values - returns.detach()) ** 2
    metrics = {"values/mean": segments.mean(values.detach()), "values/error": segments.mean(error.detach())}
    if clip_range is not None:
        if old_values is None:
            raise ValueError(f"value_loss: clip_range = {clip_range} needs old_values, the critic's at sampling")
        old = old_values.detach()
        outside = (values - old).detach().abs() > clip_range
        clipped = (old + (values - old).clamp(-clip_range, clip_range) - returns.detach()) ** 2
        wins = outside & (clipped > error)  # inside they differ by rounding alone
        metrics["values/clipped"] = segments.mean(wins.to(values.dtype))
        error = torch.where(wins, clipped, error)
    losses = weight * reduce_tokens(error, segments, reduction, max_length)
    return LossOutput(losses, metrics, unit="completions", token_unit="tokens")
