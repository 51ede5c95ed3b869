"""The reward-KL frontier: how much of the best possible reward a policy reached at the KL that it spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

MIN_KL = 0.01
"""Nats. Below this a policy counts as unmoved: both sides of the share's fraction are noise there."""


@dataclass(frozen=True)
class Frontier:
    """Best mean reward at every mean KL, from points of increasing KL; the first is the reference itself.

    Between points the reward is interpolated in √KL, in which it is nearly straight (near the reference
    R − R0 ≈ √(2·KL·Var R)). Beyond the last point it stays what it is there.

    Args:
        kl: nats per completion, first 0, increasing.
        reward: mean reward, not decreasing.
    """

    kl: Sequence[float]
    reward: Sequence[float]
    _root: Tensor = field(init=False, repr=False, compare=False)
    _reward: Tensor = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        kl = torch.tensor(self.kl, dtype=torch.float64)
        reward = torch.tensor(self.reward, dtype=torch.float64)
        if len(kl) != len(reward) or len(kl) < 2:
            raise ValueError(f"a frontier needs as many rewards as KLs and at least 2, got {len(reward)} and {len(kl)}")
        if kl[0] != 0 or (kl.diff() < 0).any() or (reward.diff() < -1e-9).any():
            raise ValueError("a frontier needs KLs that start at 0 and increase, and rewards that do not decrease")
        object.__setattr__(self, "_root", kl.sqrt())
        object.__setattr__(self, "_reward", reward)

    @property
    def base_reward(self) -> float:
        """R0, the mean reward of the reference."""
        return self.reward[0]

    def best_reward(self, kl: Tensor | float) -> Tensor:
        """R*(KL), the best mean reward at these KLs (nats; below 0 counts as 0)."""
        root = torch.as_tensor(kl, dtype=torch.float64).clamp(min=0).sqrt()
        right = torch.searchsorted(self._root, root.contiguous()).clamp(1, len(self._root) - 1)
        x0, x1 = self._root[right - 1], self._root[right]
        y0, y1 = self._reward[right - 1], self._reward[right]
        part = ((root - x0) / (x1 - x0).clamp(min=1e-12)).clamp(0, 1)
        return y0 + part * (y1 - y0)

    def share(self, reward: Tensor | float, kl: Tensor | float) -> Tensor:
        """f = (R − R0)/(R*(KL) − R0): 0 is the reference, 1 is on the frontier; 0 where KL < `MIN_KL`."""
        reward, kl = torch.as_tensor(reward, dtype=torch.float64), torch.as_tensor(kl, dtype=torch.float64)
        room = self.best_reward(kl) - self.base_reward
        return ((reward - self.base_reward) / room.clamp(min=1e-12)).where(kl >= MIN_KL, 0.0)

    def curve(self, max_kl: float | None = None, points: int = 200) -> dict[str, list[float]]:
        """`{"kl": [...], "reward": [...]}` for a plot, dense where the curve bends."""
        end = math.sqrt(self.kl[-1] if max_kl is None else max_kl)
        kl = torch.linspace(0, end, points, dtype=torch.float64).square()
        return {"kl": kl.tolist(), "reward": self.best_reward(kl).tolist()}
