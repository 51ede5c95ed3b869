"""Random preference pairs in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.objectives import Counts, LossOutput, make_normaliser

F64 = torch.float64


@dataclass
class Example:
    """Flat vectors of a few pairs with unequal lengths."""

    segments: Segments
    logps: Tensor
    ref_logps: Tensor
    token_rewards: Tensor
    kl: Tensor

    @property
    def pairs(self) -> int:
        return len(self.segments) // 2

    @property
    def guided(self) -> dict[str, Tensor]:
        return {"ref_logps": self.ref_logps, "token_rewards": self.token_rewards}


def example(lengths: tuple[int, ...] = (4, 2, 1, 5, 3, 3), seed: int = 0) -> Example:
    """`lengths`: chosen, rejected, chosen, ... in tokens."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)

    def random() -> Tensor:
        return torch.randn(n, dtype=F64, generator=generator)

    logps = (-random().abs() - 0.1).requires_grad_()
    return Example(
        Segments.from_lengths(lengths),
        logps,
        -random().abs() - 0.1,
        random() / 2,
        random().abs().requires_grad_(),
    )


def mean_loss(output: LossOutput, segments: Segments) -> Tensor:
    return make_normaliser("mean")(output, Counts.of(segments, pairs=True))


def gradient(loss: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return torch.autograd.grad(loss(x), x)[0]


def finite_difference(loss: Callable[[Tensor], Tensor], x: Tensor, step: float = 1e-6) -> Tensor:
    """Central differences of a scalar function."""
    out = torch.zeros_like(x)
    for i in range(x.numel()):
        e = torch.zeros_like(x)
        e[i] = step
        with torch.no_grad():
            out[i] = (loss(x + e) - loss(x - e)) / (2 * step)
    return out.detach()
