"""Random rollouts in float64, and the clipped loss written plainly on rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.loss import Counts, LossOutput, NormaliserName, make_normaliser

F64 = torch.float64


@dataclass
class Rollouts:
    """Flat vectors of completions of unequal lengths; about half of the ratios lie outside [0.8, 1.2]."""

    segments: Segments
    logps: Tensor
    old_logps: Tensor
    ref_logps: Tensor
    advantages: Tensor
    weights: Tensor

    def normalised(self, output: LossOutput, name: NormaliserName = "mean") -> Tensor:
        counts = Counts.of(self.segments, pairs=False, prompts=len(self.segments) // 2)
        return make_normaliser(name)(output, counts)

    def gradient(self, loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, self.logps, retain_graph=True)[0]


def rollouts(lengths: tuple[int, ...] = (4, 2, 1, 5), seed: int = 0, spread: float = 0.4) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def random() -> Tensor:
        return torch.randn(n, dtype=F64, generator=generator)

    old = -random().abs() - 0.5
    logps = (old + spread * random()).requires_grad_()
    return Rollouts(Segments.from_lengths(lengths), logps, old, old + 0.3 * random(), random(), random().abs())


def plain_token_loss(
    x: Rollouts, low: Tensor | float, high: Tensor | float, cap: float | None = None, ratio: Tensor | None = None
) -> Tensor:
    """-min(r A, clip(r, low, high) A), at most cap |A| for A < 0, as the papers write it: the slow twin, `[N]`."""
    r = torch.exp(x.logps - x.old_logps) if ratio is None else ratio
    low, high = (torch.as_tensor(bound, dtype=F64) for bound in (low, high))
    losses = -torch.minimum(r * x.advantages, torch.maximum(torch.minimum(r, high), low) * x.advantages)
    if cap is not None:
        bounded = torch.minimum(losses, -x.advantages * cap)
        losses = torch.where(x.advantages < 0, bounded, losses)
    return losses


def rows(x: Rollouts, values: Tensor, reduce: Callable[[Tensor], Tensor]) -> Tensor:
    """Reduce each completion by itself: `[N] -> [C]`."""
    return torch.stack([reduce(part) for part in x.segments.split(values)])
