"""The language-model head as data, and per-token quantities of its distribution in plain torch.

`logits_quantities` is what the fast path in `tokengrain.scoring.fused` must equal: a few lines that keep
all logits in memory. It also serves models whose head cannot be taken apart.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokengrain.errors import ModelError
from tokengrain.scoring.teacher import Teacher, teacher_quantities


@dataclass(frozen=True)
class Head:
    """Hidden states to logits: `softcap * tanh(scale * (h W^T + b) / softcap)`.

    Attributes:
        weight: `[V, H]`; `[V, 0]` for the identity, whose "hidden states" are the logits themselves.
        bias: `[V]` or None.
        scale: the logits are multiplied by it (Granite divides by `logits_scaling`, Cohere multiplies).
        softcap: bound of the tanh that Gemma applies to its logits; None: no bound.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def is_identity(self) -> bool:
        return self.weight.shape[1] == 0

    def logits(self, hidden: Tensor) -> Tensor:
        """`[n, H] -> [n, V]` in float32 (float64 for float64 weights), by plain differentiable torch."""
        if self.is_identity:
            return self.finish(hidden[:, : self.vocab_size])
        return self.finish(torch.nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def finish(self, logits: Tensor) -> Tensor:
        """What follows the projection: raw logits `[n, V]` to logits, scale and cap applied."""
        logits = logits.to(accumulation_dtype(logits.dtype)) * self.scale
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def detach(self) -> Head:
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias)

    def cut(self, vocab: int) -> Head:
        """The head of the first `vocab` tokens alone: views, no copies."""
        if vocab >= self.vocab_size:
            return self
        return replace(self, weight=self.weight[:vocab], bias=None if self.bias is None else self.bias[:vocab])


@dataclass(frozen=True)
class Distribution:
    """A model's next-token distribution at every counted token of a batch, without its logits.

    Attributes:
        hidden: `[N, H]`, the last hidden states, after the final norm.
        head: the head that turns them into logits. No gradient ever flows into either.
    """

    hidden: Tensor
    head: Head

    @classmethod
    def of_logits(cls, logits: Tensor) -> Distribution:
        """The distribution that has these logits `[N, V]`; entries may be -inf."""
        return cls(logits, Head(logits.new_empty(logits.shape[1], 0)))

    def logits(self, dtype: torch.dtype) -> Tensor:
        """`[N, V]`, multiplied and returned in `dtype`, whatever autocast says."""
        head = self.head
        exact = replace(head, weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))
        with torch.autocast(self.hidden.device.type, enabled=False):
            return exact.logits(self.hidden.to(dtype))

    def detach(self) -> Distribution:
        return Distribution(self.hidden.detach(), self.head.detach())

    def cut(self, vocab: int) -> Distribution:
        """The same over the first `vocab` tokens alone."""
        return replace(self, head=self.head.cut(vocab))

    def at(self, tokens: Tensor | slice) -> Distribution:
        """The distributions at some of the tokens."""
        return replace(self, hidden=self.hidden[tokens])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type softmax and sums run in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reference_head_quantities(
    hidden: Tensor,
    head: Head,
    labels: Tensor,
    want: Collection[str],
    reference: Distribution | None = None,
    teacher: Teacher | None = None,
) -> dict[str, Tensor]:
    """The slow twin of `head_quantities`: same arguments and results, all `[N, V]` logits in memory."""
    return logits_quantities(head.logits(hidden), labels, want, reference, teacher)


def logits_quantities(
    logits: Tensor,
    labels: Tensor,
    want: Collection[str],
    reference: Distribution | None = None,
    teacher: Teacher | None = None,
) -> dict[str, Tensor]:
    """What `head_quantities` computes, from logits `[N, V]` by plain torch.

    Plain logits of a reference or a teacher go in by `Distribution.of_logits(logits)`, as in
    `Teacher(Distribution.of_logits(dpo), Distribution.of_logits(reverse), slope=20.0, offset=1e-3)`.
    """
    logits = logits.to(accumulation_dtype(logits.dtype))
    logp = torch.log_softmax(logits, dim=-1)
    out = {}
    if "logps" in want:
        out["logps"] = logp.gather(1, labels[:, None]).squeeze(1)
    if "entropy" in want:
        p = logp.exp()
        out["entropy"] = -torch.where(p > 0, p * logp, 0.0).sum(-1)
    if "kl" in want:
        reference = checked_reference(reference, logits.shape[1])
        with torch.no_grad():
            logq = torch.log_softmax(reference.head.logits(reference.hidden), dim=-1).to(logp.dtype)
            q = logq.exp()
        out["kl"] = torch.where(q > 0, q * (logq - logp), 0.0).sum(-1)
    if "teacher_kl" in want:
        out |= teacher_quantities(logits, labels, teacher)
    return out


def checked_reference(reference: Distribution | None, vocab: int, tokens: int | None = None) -> Distribution:
    """The reference, if it can be compared with a model of this vocabulary and batch; else ModelError."""
    if reference is None:
        raise ModelError("the KL divergence to a reference needs the reference's distribution, got none")
    if reference.head.vocab_size != vocab:
        raise ModelError(
            f"the reference's vocabulary differs from the model's; got {reference.head.vocab_size}, expected {vocab}"
        )
    if tokens is not None and reference.hidden.shape[0] != tokens:
        raise ModelError(
            f"the reference's hidden states are for another batch; got {reference.hidden.shape[0]} tokens, "
            f"expected {tokens}"
        )
    return reference
