"""What the rollout loop works with: models, data, settings, and the other ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tokengrain.errors import RunError
from tokengrain.rewards import RewardSuite
from tokengrain.rollout.base import Sampler
from tokengrain.scoring.head import Head
from tokengrain.training.online.config import OnlineConfig
from tokengrain.training.online.prompts import PromptDataset
from tokengrain.training.online.scoring import RolloutScorer
from tokengrain.training.online.step import CreditStep


@dataclass
class Ranks:
    """This rank, and how it talks to the others."""

    rank: int = 0
    world: int = 1
    exchange: Callable[[Any], list[Any]] = lambda value: [value]

    def largest(self, number: int) -> int:
        return max(self.exchange(number))

    def total(self, number: float) -> float:
        return float(sum(self.exchange(number)))

    def together(self, work: Callable[[], Any]) -> Any:
        """`work()`; if it fails on one rank it fails on all, so that none waits for another.

        Raises:
            TokengrainError: its own, or `RunError` where another rank failed.
        """
        if self.world == 1:
            return work()
        result, error = None, None
        try:
            result = work()
        except Exception as caught:  # whatever it is: the other ranks must hear of it
            error = caught
        failed = [message for message in self.exchange(None if error is None else str(error)) if message is not None]
        if error is not None:
            raise error
        if failed:
            raise RunError(f"the rollout failed on another rank: {failed[0]}")
        return result


@dataclass
class LoopParts:
    """What a loop works with.

    Attributes:
        wanted: columns that the buffer must keep, if they are there.
        required: quantities to score for the objective, of "old_logps", "ref_logps", "entropy", "values".
        weights_taken: whether the objective takes token weights; if not, advantages are multiplied by them.
        refresh: called before sampling, for samplers that have to be given new weights.
        head_of: the policy's head.
    """

    args: OnlineConfig
    model: Any
    prompts: PromptDataset
    sampler: Sampler
    rewards: RewardSuite | None
    steps: list[CreditStep]
    scorer: RolloutScorer
    wanted: frozenset[str]
    required: frozenset[str]
    weights_taken: bool
    refresh: Callable[[], None]
    head_of: Callable[[], Head]
    device: torch.device
    ranks: Ranks = field(default_factory=Ranks)
