"""Random preference pairs in float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Distribution, Head

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


@dataclass
class PairLogits:
    """Policy and reference logits `[N, V]` of pairs with labels `[N]`, for losses that take the full KL."""

    segments: Segments
    policy: Tensor
    reference: Tensor
    labels: Tensor

    def scores(self, policy: Tensor, reference: Tensor | None = None, chunk: int | None = None) -> dict[str, Tensor]:
        """logps and kl of the policy, with the logits as hidden states behind an identity head."""
        head = Head(torch.eye(policy.shape[1], dtype=F64))
        q = Distribution(self.reference if reference is None else reference, head)
        return head_quantities(policy, head, self.labels, ("logps", "kl"), q, chunk_tokens=chunk)

    def apply(self, logps: Tensor, **given: Any) -> LossOutput:
        """The loss that is tested, of log-probabilities with ref_logps, kl and settings."""
        raise NotImplementedError

    def loss(self, policy: Tensor, reference: Tensor | None = None, **hyper: Any) -> LossOutput:
        reference = self.reference if reference is None else reference
        scores, ref_logps = self.scores(policy, reference), self.scores(reference)["logps"]
        return self.apply(scores["logps"], ref_logps=ref_logps, kl=scores["kl"], **hyper)

    def gradient(self, **hyper: Any) -> Tensor:
        return gradient(lambda p: mean_loss(self.loss(p, **hyper), self.segments), self.policy)


def pair_logits(lengths: tuple[int, ...], vocabulary: int, seed: int) -> tuple[Segments, Tensor, Tensor, Tensor]:
    """What `PairLogits` is made of, at random; the policy's logits with gradient."""
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    policy, reference = (torch.randn(n, vocabulary, dtype=F64, generator=generator) for _ in range(2))
    labels = torch.randint(vocabulary, (n,), generator=generator)
    return Segments.from_lengths(lengths), policy.requires_grad_(), reference, labels


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
