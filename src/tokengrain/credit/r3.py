"""R3, the reasoning reflection reward of DRO (arXiv 2506.13351 v1): reference tokens that depend on the reasoning.

A prompt has G rollouts. Each rollout's reasoning is followed by the *reference* answer instead of its own, and the
reference is scored token by token: flat vectors `[N]` in which every completion is the reference under one rollout,
so that the completions of a group have equally many tokens. Tokens whose log-probability varies over the rollouts
weigh more:

    sigma_j = deviation over i of lp[i, j]    w_j ~ sigma_j^power [sigma_j >= threshold]    R3_i = sum_j w_j lp[i, j]

Sigma measures variability, not relevance: with noise of heavy tails over tokens R3 is worse than the plain mean
(power 0). Choices that the paper leaves open are arguments; their defaults are ours. Nothing carries gradient.
A reward belongs to the rollout: `group_advantages(rewards, group, eps=1e-4)`, broadcast over its own tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.objectives.selection import top_tokens

Normalise = Literal["sum", "mean", "none"]
Rule = Literal["threshold", "top"]
CHUNK = 4_000_000  # elements held at once by the propagation


@dataclass(frozen=True)
class Propagation:
    """The correction for what a wrong token does to those after it.

    Attributes:
        gamma: how fast it fades, per token; 0: never, infinite: no correction.
        window: tokens within which it acts; None: all.
        rule, value: which tokens are reflective, see `reflective_tokens`.
    """

    gamma: float = 0.5
    window: int | None = None
    rule: Rule = "top"
    value: float = 0.1


@dataclass(frozen=True)
class R3:
    """Rewards and what they come from.

    Attributes:
        rewards: `[C]`; NaN for rollouts that are left out.
        tokens: `[N]`, what every reference token adds to the reward.
        sigma, weights: `[N]`, equal for all rollouts of a group.
        reflective: bool `[N]`, the tokens that propagation starts from; None without.
        log_propagation: `[N]`, what it adds to the log-probabilities, <= 0; None without.
        metrics: `[C]` each.
    """

    rewards: Tensor
    tokens: Tensor
    sigma: Tensor
    weights: Tensor
    reflective: Tensor | None = None
    log_propagation: Tensor | None = None
    metrics: dict[str, Tensor] = field(default_factory=dict)


def r3_rewards(
    logps: Tensor,
    segments: Segments,
    group: Tensor,
    *,
    usable: Tensor | None = None,
    baseline: Tensor | None = None,
    propagation: Propagation | None = None,
    power: float = 1.0,
    threshold: float = 0.0,
    normalize: Normalise = "sum",
    ddof: int = 0,
    floor: float | None = None,
    min_sigma: float = 0.0,
    positions: Tensor | None = None,
) -> R3:
    """R3 of every rollout: plain, with a masked baseline, or with propagation.

    Args:
        logps: log-probabilities of the reference tokens after each rollout's reasoning `[N]`, nats.
        segments: cuts `[N]` into C rollouts.
        group: long `[C]`, the prompt of each.
        usable: bool `[C]`; a rollout without a finished reasoning has reward NaN and no part in sigma. None: all.
        baseline: the same log-probabilities with the reasoning masked `[N]`, subtracted. If all rollouts of a group
            have the same (`repeat_for_rollouts`), every reward of the group shifts alike and advantages within the
            group are exactly those without: then it only serves clipping, comparison across prompts, and logs.
        propagation: see there; not together with a baseline.
        power: 1: weights go with the deviation, 2: with the variance, 0: the plain mean.
        threshold: the deviation below which a token has weight 0, nats.
        normalize: "sum": weights add up to 1 (R3 is a mean, nats per token), "mean": to their number, "none".
        ddof: of the deviation.
        floor: least log-probability, since one at -50 swamps all others; None: none.
        min_sigma: a group whose largest deviation is below it has rewards NaN: what varies is noise.
        positions: place of every token in the reference, for distances `[N]`; None: that among counted tokens.
    """
    if baseline is not None and propagation is not None:
        raise ValueError("r3_rewards: give a baseline or a propagation, not both")
    lp = logps.detach()
    lp = lp if floor is None else lp.clamp(min=floor)
    sigma = variability(lp, segments, group, ddof=ddof, usable=usable)
    weights = r3_weights(sigma, segments, power=power, threshold=threshold, normalize=normalize)
    values, reflective, spread = lp, None, None
    if baseline is not None:
        below = baseline.detach()
        values = lp - (below if floor is None else below.clamp(min=floor))
    if propagation is not None:
        p = propagation
        reflective = reflective_tokens(sigma, segments, rule=p.rule, value=p.value)
        spread = log_propagation(lp, reflective, segments, gamma=p.gamma, window=p.window, positions=positions)
        values = lp + spread
    # A token of weight 0 adds nothing, whatever its log-probability.
    tokens = torch.where(weights > 0, weights * values, 0.0)
    largest = torch.where(segments.lengths > 0, segments.max(sigma), 0.0)
    left_out = (segments.lengths == 0) | (largest < min_sigma)
    if usable is not None:
        left_out = left_out | ~usable.bool()
    rewards = torch.where(left_out, torch.nan, segments.sum(tokens))
    effective = _effective(weights, segments)
    metrics = {"r3/sigma_max": largest, "r3/sigma": segments.mean(sigma), "r3/effective_tokens": effective}
    return R3(rewards, tokens, sigma, weights, reflective, spread, metrics)


def variability(
    logps: Tensor, segments: Segments, group: Tensor, *, ddof: int = 0, usable: Tensor | None = None
) -> Tensor:
    """sigma: standard deviation of each reference token's log-probability over the rollouts of its group, `[N]`.

    Equal for all rollouts of a group; 0 where fewer than two are usable, and exactly 0 where all are equal.

    Raises:
        ValueError: rollouts of one group with different numbers of tokens: they are not the same reference.
    """
    slot, slots = _slots(segments, group)
    lp = logps.detach()
    keep = torch.ones_like(slot, dtype=torch.bool) if usable is None else segments.broadcast(usable.bool())

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(slots).index_add(0, slot[keep], values[keep])

    count = total(torch.ones_like(lp))
    mean = (total(lp) / count.clamp(min=1))[slot]
    low = lp.new_full((slots,), torch.inf).scatter_reduce(0, slot[keep], lp[keep], "amin")
    high = lp.new_full((slots,), -torch.inf).scatter_reduce(0, slot[keep], lp[keep], "amax")
    # Masked before the square: a rollout that is left out may hold anything, infinities included.
    squares = total(torch.where(keep, lp - mean, 0.0).square())
    variance = squares / (count - ddof).clamp(min=1)
    return torch.where((high > low) & (count > ddof), variance, 0.0).sqrt()[slot]


def r3_weights(
    sigma: Tensor, segments: Segments, *, power: float = 1.0, threshold: float = 0.0, normalize: Normalise = "sum"
) -> Tensor:
    """Weights from deviations, `[N]`; uniform where all (nearly) vanish and normalisation would divide by 0."""
    if power < 0:
        raise ValueError(f"r3_weights: power must not be negative, got {power}")
    w = torch.where(sigma >= threshold, sigma**power, 0.0)
    if normalize == "none":
        return w
    if normalize not in ("sum", "mean"):
        raise ValueError(f"normalize must be 'sum', 'mean' or 'none', got {normalize!r}")
    total, length = segments.sum(w), segments.lengths.to(w.dtype)
    flat = segments.broadcast(total <= 1e-12 * length)
    share = torch.where(flat, 1 / segments.broadcast(length), w / segments.broadcast(torch.where(total > 0, total, 1)))
    return share if normalize == "sum" else share * segments.broadcast(length)


def reflective_tokens(sigma: Tensor, segments: Segments, *, rule: Rule = "top", value: float = 0.1) -> Tensor:
    """The tokens that reflect the reasoning, bool `[N]`; how they are chosen is not specified in the paper.

    Args:
        rule: "threshold": sigma >= value; "top": the highest share `value` of each completion, rounded up, the
            earliest among equals.
    """
    if rule == "threshold":
        return sigma >= value
    if rule != "top":
        raise ValueError(f"rule must be 'threshold' or 'top', got {rule!r}")
    if not 0 < value <= 1:
        raise ValueError(f"the share of reflective tokens must lie in (0, 1], got {value}")
    return top_tokens(sigma, segments, share_counts(segments, value))


def log_propagation(
    logps: Tensor,
    reflective: Tensor,
    segments: Segments,
    *,
    gamma: float = 0.5,
    window: int | None = None,
    positions: Tensor | None = None,
) -> Tensor:
    """Sum over the reflective tokens k before j of log(1 - (1 - p_k) exp(-gamma (j - k))): `[N]`, each <= 0.

    It penalises a doubtful reflective token more than once, by design.

    Args:
        logps: `[N]`; reflective: bool `[N]`.
        gamma: >= 0, may be infinite. 0: log p_k for every later token.
        window: only j - k <= window; None: all.
        positions: as for `r3_rewards`.
    """
    if not gamma >= 0:
        raise ValueError(f"gamma must not be negative, got {gamma}")
    place = segments.positions if positions is None else positions
    lp, mask = segments.to_padded(logps.detach())
    if math.isinf(gamma) or not segments.total:
        return torch.zeros_like(logps)
    at, _ = segments.to_padded(place.to(lp.dtype))
    starts, which = _starts(reflective.bool(), segments)
    out = torch.zeros_like(lp)
    rows, width = lp.shape
    size = max(1, CHUNK // max(rows * width, 1))
    for first in range(0, starts.shape[1], size):
        k, real = starts[:, first : first + size], which[:, first : first + size]
        d = at[:, None, :] - at.gather(1, k)[:, :, None]
        acts = real[:, :, None] & (d > 0)
        if window is not None:
            acts &= d <= window
        log_P = _log_passed(lp.gather(1, k)[:, :, None], gamma * torch.where(acts, d, 1.0))
        out += torch.where(acts, log_P, 0.0).sum(1)
    return out[mask]


def repeat_for_rollouts(values: Tensor, references: Segments, segments: Segments, group: Tensor) -> Tensor:
    """One value per reference token of each prompt, repeated for its rollouts: `[M] -> [N]`.

    Args:
        references: cuts `[M]` into the G references.
        segments, group: the rollouts, as for `r3_rewards`.
    """
    lengths = references.lengths[group]
    if not torch.equal(lengths, segments.lengths):
        raise ValueError("repeat_for_rollouts: a rollout and its reference differ in their numbers of tokens")
    return values[segments.broadcast(references.offsets[:-1][group]) + segments.positions]


def length_rewards(answer_lengths: Tensor, reference_lengths: Tensor, *, slope: float = 0.5) -> Tensor:
    """1 - slope * | |y| - |answer| | / |y|: `[C]`, in tokens of the answer, never of the reasoning. Not clipped.

    R3 never looks at the sampled answer; this keeps a model from appending to it.

    Args:
        answer_lengths, reference_lengths: `[C]`.
    """
    if bool((reference_lengths <= 0).any()):
        raise ValueError("length_rewards: a reference without tokens has no length to compare with")
    return 1 - slope * (reference_lengths - answer_lengths).abs() / reference_lengths


def share_counts(segments: Segments, share: float) -> Tensor:
    """A share of each completion's tokens, rounded up and at least one: long `[C]`."""
    # 0.07 * 100 is 7.000000000000001 in binary and means 7.
    return (share * segments.lengths.double() - 1e-9).ceil().long().clamp(min=1)


def _effective(weights: Tensor, segments: Segments) -> Tensor:
    """How many tokens share the weight, `[C]`: their number if all weigh alike, 1 if one has it all."""
    squares = segments.sum(weights.square())
    return segments.sum(weights).square() / torch.where(squares > 0, squares, 1.0)


def _slots(segments: Segments, group: Tensor) -> tuple[Tensor, int]:
    """A number per reference token, the same in all rollouts of its group: long `[N]`; and how many there are."""
    groups = int(group.max()) + 1 if group.numel() else 0
    lengths = segments.lengths.new_zeros(groups).scatter_reduce(0, group, segments.lengths, "amax")
    if not torch.equal(lengths[group], segments.lengths):
        raise ValueError("the rollouts of a prompt must be scored on the same reference: their tokens differ in number")
    ends = lengths.cumsum(0)
    return segments.broadcast((ends - lengths)[group]) + segments.positions, int(lengths.sum())


def _log_passed(logp: Tensor, fade: Tensor) -> Tensor:
    """log(1 - (1 - p) exp(-fade)), never above 0, with all digits at both ends.

    Near 1 what is lost is the small number; where p and fade are tiny, p exp(-fade) + (1 - exp(-fade)) is.
    """
    lost = -torch.expm1(logp) * torch.exp(-fade)
    gained = torch.log(-torch.expm1(-fade))  # -inf where fade = 0: nothing is gained
    return torch.where(lost < 0.5, torch.log1p(-lost), torch.logaddexp(logp - fade, gained))


def _starts(reflective: Tensor, segments: Segments) -> tuple[Tensor, Tensor]:
    """Columns of the reflective tokens of each completion, padded: long `[C, K]`, and which are real, bool."""
    kept = segments.narrow(reflective)
    return kept.to_padded(segments.positions[reflective])
