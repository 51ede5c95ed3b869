"""What rollout credits share: one rank's share among all ranks, and the reward of a token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tokengrain.method import RolloutStep
from tokengrain.methods._shaping import Moments


def scored(step: RolloutStep) -> Tensor:
    """Completions that have a reward and belong to a prompt that is trained on, bool `[C]`."""
    known = ~torch.isnan(step.rewards)
    return known if step.keep is None else known & step.keep[step.group]


def token_level(step: RolloutStep) -> Tensor:
    """The reward of every token `[N]`: what was given per token, and the outcome on the last one.

    0 on all tokens of a completion that could not be scored.
    """
    outcome = torch.where(scored(step), step.rewards, 0.0)
    rewards = torch.where(step.segments.is_last, step.broadcast(outcome), 0.0)
    if step.token_rewards is not None:
        rewards = rewards + step.token_rewards
    return torch.where(step.broadcast(scored(step)), rewards, 0.0)


def shares(step: RolloutStep, mine: Any) -> tuple[list[Any], int]:
    """What every rank gave, in the order of ranks, and which of them is this rank's.

    Args:
        mine: compared by equality, so without NaN. Where two ranks gave the same either will do.
    """
    parts = step.gather(mine)
    return parts, parts.index(mine)


def mean(values: Tensor) -> float:
    """Mean of the numbers in `values`, NaN left out; 0 of nothing."""
    known = values[~torch.isnan(values)] if values.is_floating_point() else values
    return float(known.double().mean()) if known.numel() else 0.0


def pooled_moments(step: RolloutStep, values: Tensor) -> Moments:
    """Mean and spread of the values of all ranks."""
    return sum(step.gather(Moments.of(values)), Moments())
