"""DRO's two data filters (arXiv 2506.13351 v1, section 4.2): prompts out of reach, and prompts that vary too little.

Run before training and at intervals, with the current policy and 16 or 32 rollouts per prompt, on the reference
tokens that R3 is made of (`tokengrain.credit.r3`).
"""

from __future__ import annotations

import math
import random
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.credit.r3 import share_counts, variability

Item = TypeVar("Item", bound=Hashable)


@dataclass(frozen=True)
class PromptFilter:
    """Which prompts to keep and why.

    Attributes:
        worst_rank: `[C]`, mean rank of the worst share of the reference's tokens under each rollout.
        best: `[G]`, its least value over the rollouts of the prompt.
        reachable: bool `[G]`, stage 1.
        spread: `[G]`, the largest sigma of the prompt's reference tokens.
        order: long, the reachable prompts by falling spread.
        keep: bool `[G]`, both stages.
    """

    worst_rank: Tensor
    best: Tensor
    reachable: Tensor
    spread: Tensor
    order: Tensor
    keep: Tensor


def filter_prompts(
    logps: Tensor,
    ranks: Tensor,
    segments: Segments,
    group: Tensor,
    *,
    rho: float = 0.1,
    top_k: float = 50,
    drop: float = 0.2,
    ddof: int = 0,
) -> PromptFilter:
    """Both stages.

    Args:
        logps: log-probabilities of the reference tokens under each rollout's reasoning `[N]`.
        ranks: their ranks among the vocabulary, 1 first `[N]`, from `token_ranks`.
        segments: cuts `[N]` into C rollouts; group: long `[C]`.
        rho: share of a reference's tokens, those of the worst ranks, that decide stage 1.
        top_k: a prompt is reachable if their mean rank is at most this under one rollout at least.
        drop: share of the reachable prompts, those of the least spread, that stage 2 drops (rounded down; of equal
            ones the later prompts go).
        ddof: of sigma.
    """
    if not 0 <= drop <= 1:
        raise ValueError(f"drop must lie in [0, 1], got {drop}")
    worst = worst_ranks(ranks, segments, rho)
    groups = int(group.max()) + 1 if group.numel() else 0
    best = worst.new_full((groups,), torch.inf).scatter_reduce(0, group, worst, "amin")
    reachable = best <= top_k
    sigma = variability(logps, segments, group, ddof=ddof)
    spread = sigma.new_zeros(groups).scatter_reduce(0, group[segments.ids], sigma, "amax")
    found = reachable.nonzero().flatten()
    order = found[torch.argsort(spread[found], descending=True, stable=True)]
    keep = torch.zeros_like(reachable)
    keep[order[: len(order) - math.floor(drop * len(order) + 1e-9)]] = True
    return PromptFilter(worst, best, reachable, spread, order, keep)


def worst_ranks(ranks: Tensor, segments: Segments, rho: float) -> Tensor:
    """Mean of the worst share of ranks of each completion, at least one, rounded up: `[N] -> [C]`."""
    if not 0 < rho <= 1:
        raise ValueError(f"rho must lie in (0, 1], got {rho}")
    ranks = ranks.detach() if ranks.is_floating_point() else ranks.double()
    ordered = segments.to_padded(ranks)[0].sort(dim=1, descending=True).values
    count = share_counts(segments, rho)
    taken = torch.arange(ordered.shape[1], device=ordered.device) < count[:, None]
    return torch.where(taken, ordered, 0.0).sum(1) / count


def token_ranks(logits: Tensor, labels: Tensor) -> Tensor:
    """1 + the number of vocabulary items with a larger logit than the label: `[N, V], [N] -> long [N]`."""
    return 1 + (logits > logits.gather(1, labels[:, None])).sum(1)


def carry_over(kept: Sequence[Item], previous: Sequence[Item], *, share: float = 0.1, seed: int = 0) -> list[Item]:
    """The prompts of the next round: those that the filter kept, and a random share of the previous round's.

    Args:
        kept, previous: ids of prompts.
        share: of the previous round, rounded down.
        seed: of the draw; another one for each round.

    Returns:
        Without duplicates, the kept ones first.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], got {share}")
    drawn = random.Random(seed).sample(list(previous), math.floor(share * len(previous) + 1e-9))
    return list(dict.fromkeys([*kept, *drawn]))
