"""GRPO: Group Relative Policy Optimization (arXiv 2402.03300), and DAPO and Dr. GRPO, which are settings of it.

    A_i = (R_i - mean of its group) / (deviation of its group + eps)        the same for all tokens of completion i
    l_t = -min(r_t A, clip(r_t, 1 - epsilon, 1 + epsilon_high) A) + beta KL_t      r_t = π(t) / π_old(t)

    GRPO      reduction "mean",     normaliser "mean"
    DAPO      reduction "sum",      normaliser "token_mean", epsilon_high 0.28; credit filter_groups and overlong
              (arXiv 2503.14476)
    Dr. GRPO  reduction "constant", normaliser "mean", credit group with scale "none" (arXiv 2503.20783)

TimeMaster (arXiv 2506.13705) is GRPO on plots of time series, after SFT, with a reward of its own.

A reward that is NaN belongs to a completion that could not be scored: it is left out of mean and deviation, and its
advantage is 0.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, RunError, require
from tokengrain.loss import LossOutput
from tokengrain.method import Card, Rollout, objective, rollout_credit
from tokengrain.methods._clipped import (
    Correction,
    KLEstimator,
    Reduction,
    clipped_tokens,
    importance_weights,
    policy_loss,
    sequence_log_ratio,
)
from tokengrain.methods._shaping import GroupStatistics, scored
from tokengrain.settings import NonNegative, Positive, Share, check_choice

GRPO = Card(
    "grpo",
    "GRPO",
    "answers compared within their group",
    "DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models",
    "2402.03300",
    "2024",
    trains="policy, online",
    credit="the group's mean (every token of a completion alike)",
)
DRGRPO = replace(
    GRPO,
    name="drgrpo",
    title="Dr. GRPO",
    idea="GRPO without its length bias",
    paper_title="Understanding R1-Zero-Like Training: A Critical Perspective",
    arxiv="2503.20783",
    venue="COLM 2025",
)
DAPO = Card(
    "dapo",
    "DAPO",
    "clips higher, skips unanimous groups",
    "DAPO: An Open-Source LLM Reinforcement Learning System at Scale",
    "2503.14476",
    "2025",
    trains="policy, online",
    credit="the group's mean, of groups that differ; length penalty",
    objective="grpo",
)
TIMEMASTER = Card(
    "timemaster",
    "TimeMaster",
    "series as plots; form, then class",
    "TimeMaster: Training Time-Series Multimodal LLMs to Reason via Reinforcement Learning",
    "2506.13705",
    "2025",
    trains="policy that sees, online",
    credit="the group's mean of a reward for form, class and a judged part",
    objective="grpo",
)

Importance = Literal["token", "sequence"]
Scale = Literal["group", "none", "batch"]
Baseline = Literal["mean", "leave_one_out"]


@objective("grpo", unit="completions")
def grpo_loss(
    logps: Tensor,
    segments: Segments,
    *,
    old_logps: Tensor,
    advantages: Tensor,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    weights: Tensor | None = None,
    kl_weights: Tensor | None = None,
    epsilon: NonNegative = 0.2,
    epsilon_high: NonNegative | None = None,
    ratio_cap: Positive | None = None,
    importance: Importance = "token",
    beta: NonNegative = 0.0,
    kl: KLEstimator = "k3",
    kl_importance: bool = False,
    clamp: bool = False,
    reduction: Reduction = "mean",
    max_length: Positive | None = None,
) -> LossOutput:
    """The clipped policy loss on groups of sampled completions.

    Args:
        epsilon: the ratio is clipped below at 1 - epsilon, and above at 1 + epsilon.
        epsilon_high: if given, it is clipped above at 1 + epsilon_high (DAPO's clip-higher: 0.28).
        ratio_cap: bound of the ratio where the advantage is negative (dual clip; verl: 3 or 10).
        importance: "token": ratio of each token; "sequence": one ratio per completion, see `gspo_loss`.
        others: see `policy_loss`.
    """
    check_choice("importance", importance, Importance)
    old_logps = old_logps.detach()
    log_ratio = sequence_log_ratio(logps, old_logps, segments) if importance == "sequence" else logps - old_logps
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    tokens = clipped_tokens(log_ratio, advantages, 1 - epsilon, high, ratio_cap, clamp=clamp)
    given: Any = {"old_logps": old_logps, "advantages": advantages, "ref_logps": ref_logps, "entropy": entropy}
    given |= {"weights": weights, "kl_weights": kl_weights, "reduction": reduction, "max_length": max_length}
    return policy_loss(tokens, logps, segments, **given, beta=beta, kl=kl, kl_importance=kl_importance, clamp=clamp)


# Advantages.


@rollout_credit("group", phase="advantages", group=True, unscored=True)
def group(
    rollout: Rollout,
    *,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    eps: NonNegative = 1e-6,
    ddof: Literal[0, 1] = 1,
) -> None:
    """The same advantage for all tokens of a completion: its reward against those of its group.

    GRPO, DAPO: scale "group"; Dr. GRPO: "none"; RLOO: baseline "leave_one_out" with scale "none". Token rewards count
    with their sum.

    Args:
        scale: what the difference is divided by: "group": the group's standard deviation + eps; "none"; "batch": the
            deviation of all rewards of the rollout, on all ranks, + eps.
        baseline: "mean" of the group, or "leave_one_out": the mean of its other completions (arXiv 2402.14740), which
            is G / (G - 1) times the same difference.
        eps: 1e-6 in verl, 1e-4 in TRL.
        ddof: of the deviation; 1 as in TRL and verl.
    """
    total = _counted(rollout)
    settings: Any = {"scale": scale, "baseline": baseline, "eps": eps, "ddof": ddof}
    settings["everyone"] = rollout.gather(total) if scale == "batch" else None
    rollout.advantages = rollout.broadcast(group_advantages(total, rollout.group, **settings))


def group_advantages(
    rewards: Tensor,
    group: Tensor,
    *,
    scale: Scale = "group",
    baseline: Baseline = "mean",
    eps: float = 1e-6,
    ddof: int = 1,
    everyone: Tensor | None = None,
) -> Tensor:
    """One advantage per completion `[C]`, exactly 0 where all rewards of a group are equal; see `group`.

    Rewards are `[C]`, NaN where a completion could not be scored; scale "batch" takes the deviation of `everyone`.
    """
    s = GroupStatistics(rewards.detach(), group, ddof)
    if bool((torch.bincount(group) == 1).any()):
        warnings.warn("a group of one completion has advantage 0: nothing to compare it with", stacklevel=2)
    advantages = s.deviations
    if baseline == "leave_one_out":
        advantages = advantages * (s.count / (s.count - 1).clamp(min=1))[group]
    if scale == "group":
        return advantages / (s.std[group] + eps)
    if scale == "batch":
        pool = s.rewards if everyone is None else everyone
        return advantages / (GroupStatistics(pool, torch.zeros_like(pool, dtype=torch.long), ddof).std + eps)
    return advantages


@rollout_credit("broadcast", phase="advantages", unscored=True)
def broadcast(rollout: Rollout, *, baseline: Literal["none", "batch"] = "none") -> None:
    """The reward itself as the advantage of all tokens of a completion; 0 where it could not be scored.

    Args:
        baseline: "batch": minus the mean reward of the rollout, on all ranks; "none": as it is.
    """
    rewards = _counted(rollout)
    if baseline == "batch":
        rewards = rewards - rollout.gather(rewards).nanmean()
    rollout.advantages = rollout.broadcast(torch.nan_to_num(rewards, nan=0.0))


def _counted(rollout: Rollout) -> Tensor:
    """The sum of a completion's rewards `[C]`; NaN also for prompts that are not trained on."""
    return torch.where(scored(rollout), rollout.total, torch.nan)


# DAPO: which prompts are trained on, and what becomes of long completions.


@rollout_credit("filter_groups", phase="filter", refill=lambda settings: settings["refill"], unscored=True)
def filter_groups(
    rollout: Rollout,
    *,
    metric: Literal["correct", "reward"] | str = "correct",
    refill: bool = True,
    low: Share | None = None,
    high: Share | None = None,
) -> None:
    """Leaves out prompts whose completions teach nothing: DAPO's dynamic sampling.

    Args:
        metric: "correct": the reward that says what is correct (a shaped reward varies in every group); "reward":
            the sum of all rewards; otherwise the name of a reward.
        refill: sample other prompts in place of those left out, until there are enough (see `max_refills`).
        low, high: also leave out prompts whose mean of the metric is not in between, low and high included;
            None: no such bound.
    """
    if metric == "reward":
        values = rollout.total
    elif metric != "correct":
        what = f"credit 'filter_groups': no reward {metric!r}; there are {', '.join(rollout.by_name)}"
        require(metric in rollout.by_name, RunError, what)
        values = rollout.by_name[metric]
    elif rollout.correct is None:
        raise RunError("credit 'filter_groups' by correctness needs a reward")
    else:  # a completion that could not be scored says nothing about its group
        values = torch.where(rollout.rewards.isnan(), torch.nan, rollout.correct.to(rollout.rewards.dtype))
    mean = GroupStatistics(values.double(), rollout.group).mean
    bounds = (mean >= (-math.inf if low is None else low)) & (mean <= (math.inf if high is None else high))
    rollout.drop(informative_groups(values, rollout.group) & bounds)


def informative_groups(metric: Tensor, group: Tensor) -> Tensor:
    """The groups whose metric `[C]` is not constant, bool `[G]`. A group of one completion is kept, as in verl."""
    return GroupStatistics(metric.to(torch.float64), group).varied | (torch.bincount(group) == 1)


def _check_overlong(settings: Mapping[str, Any], max_new_tokens: float | None = None) -> None:
    limit = settings["max_length"] if settings["max_length"] is not None else max_new_tokens
    buffer = settings["buffer"] or 0.0
    if limit is not None and buffer > limit:
        what = f"credit 'overlong': buffer is {buffer:g}; expected at most {limit:g}, the limit"
        raise RecipeError(f"{what} (max_length, or max_new_tokens of the training), or none: a fifth of it")


@rollout_credit(
    "overlong",
    phase="rewards",
    check=_check_overlong,
    limit=lambda tokens, settings: _check_overlong(settings, tokens),
    unscored=True,
)
def overlong(
    rollout: Rollout, *, buffer: Positive | None = None, factor: NonNegative = 1.0, max_length: Positive | None = None
) -> None:
    """DAPO's soft overlong punishment, added to the outcome of a completion.

    Args:
        buffer: tokens before the limit within which the penalty grows from 0 to `factor`; at most the limit. None: a
            fifth of it, as in the paper (4096 of 20480).
        factor: largest penalty.
        max_length: the limit, tokens; None: the longest completion that is sampled.
    """
    limit = max_length if max_length is not None else rollout.max_new_tokens
    lengths = rollout.segments.lengths.to(rollout.rewards.dtype)
    penalty = overlong_penalty(lengths, max_length=limit, buffer=buffer or limit / 5, factor=factor)
    rollout.metrics["reward/overlong"] = float(penalty.mean())
    rollout.rewards = rollout.rewards + penalty


def overlong_penalty(lengths: Tensor, *, max_length: float, buffer: float, factor: float = 1.0) -> Tensor:
    """0 up to max_length - buffer, then falling linearly to -factor at max_length, and -factor beyond: `[C]`."""
    lengths = lengths if lengths.is_floating_point() else lengths.to(torch.get_default_dtype())
    return factor * ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


@rollout_credit("mask_truncated", phase="after")
def mask_truncated(rollout: Rollout) -> None:
    """DAPO's overlong filtering: no update sees truncated completions, in its normaliser and KL neither."""
    if rollout.advantages is None:
        raise RunError("credit 'mask_truncated' needs advantages; expected a rollout credit that sets them")
    rollout.masked = rollout.truncated
    rollout.advantages = torch.where(rollout.broadcast(rollout.truncated), 0.0, rollout.advantages)


# For samplers whose probabilities are not the trainer's.


@rollout_credit("importance", phase="after", provides={"weights"})
def importance(
    rollout: Rollout, *, kind: Correction = "token", cap: Positive = 2.0, against: Literal["raw", "sampling"] = "raw"
) -> None:
    """Weighs tokens by how much more probable they are to the trainer than to the sampler, truncated.

    Args:
        kind: "token": the ratio of the token; "sequence": of the whole completion, for all its tokens.
        cap: largest weight.
        against: "raw": the sampler's probabilities at temperature 1: corrects for what the engine computes
            differently; "sampling": those that tokens were drawn from: also for temperature, top-k, top-p, min-p.
    """
    column = f"{against}_logps"
    if column not in rollout.quantities:
        raise RunError(f"credit 'importance': the sampler does not know {column}; expected against: another one")
    old = rollout.quantity("old_logps")
    weights = importance_weights(rollout.quantity(column), old, rollout.segments, kind=kind, cap=cap)
    rollout.metrics["importance/mean"] = float(weights.mean())
    rollout.metrics["importance/capped"] = float((weights >= cap * (1 - 1e-6)).to(weights.dtype).mean())
    rollout.weights = weights if rollout.weights is None else rollout.weights * weights
