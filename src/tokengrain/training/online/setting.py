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


@dataclass(frozen=True)
class _Failed:
    """What a rank sends in place of a value when its work has failed."""

    rank: int
    message: str


@dataclass
class Ranks:
    """This rank, and how it talks to the others.

    Attributes:
        link: gives the values of all ranks, in the order of ranks; every rank must call it equally often.
    """

    rank: int = 0
    world: int = 1
    link: Callable[[Any], list[Any]] = lambda value: [value]
    _guarded: bool = field(default=False, init=False)
    _told: bool = field(default=False, init=False)

    def exchange(self, value: Any) -> list[Any]:
        """The values of all ranks, in the order of ranks.

        Raises:
            RunError: another rank's work failed, see `together`.
        """
        values = self.link(value)
        failed = next((v for v in values if isinstance(v, _Failed)), None)
        if failed is not None:
            self._told = True
            raise RunError(f"the rollout failed on another rank, rank {failed.rank}: {failed.message}")
        return values

    def largest(self, number: int) -> int:
        return max(self.exchange(number))

    def total(self, number: float) -> float:
        return float(sum(self.exchange(number)))

    def together(self, work: Callable[[], Any]) -> Any:
        """`work()`, which may exchange; if it fails on one rank it fails on all, so that none waits for another.

        A rank that fails says so in place of the next value that it would have exchanged. The others hear of it
        there, wherever they are in their work. May be nested.

        Raises:
            Exception: its own error, or `RunError` where another rank failed.
        """
        if self.world == 1:
            return work()
        if self._guarded:
            return self._met(work)
        self._guarded, self._told = True, False
        try:
            return self._met(work)
        except Exception as error:  # whatever it is: the other ranks must hear of it, once
            if not self._told:
                self.link(_Failed(self.rank, str(error) or type(error).__name__))
            raise
        finally:
            self._guarded = False

    def _met(self, work: Callable[[], Any]) -> Any:
        """`work()`, and then nobody goes on before all have done theirs."""
        result = work()
        self.exchange(None)
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
