"""The language-model head as data, and per-token quantities of its distribution in plain torch.

`logits_quantities` is what the fast path in `tokengrain.scoring.fused` must equal. It also serves models whose head
cannot be taken apart.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tokengrain.errors import ModelError, require


@dataclass(frozen=True)
class Head:
    """Hidden states to logits: `softcap * tanh(scale * (h W^T + b) / softcap)`."""

    weight: Tensor  # [V, H]; [V, 0] for the identity, whose "hidden states" are the logits themselves
    bias: Tensor | None = None  # [V]
    scale: float = 1.0  # Granite divides by `logits_scaling`, Cohere multiplies
    softcap: float | None = None  # bound of Gemma's tanh

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

    def tempered(self, temperature: float) -> Head:
        """The same with its logits divided by a temperature."""
        cap = None if self.softcap is None else self.softcap / temperature
        return replace(self, scale=self.scale / temperature, softcap=cap)

    def detach(self) -> Head:
        return replace(self, weight=self.weight.detach(), bias=None if self.bias is None else self.bias.detach())


@dataclass(frozen=True)
class Distribution:
    """A model's next-token distribution at every counted token of a batch; no gradient ever flows into it."""

    hidden: Tensor  # [N, H], after the final norm
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
        """The same over the first `vocab` tokens alone: views, no copies."""
        head = self.head
        if vocab >= head.vocab_size:
            return self
        bias = None if head.bias is None else head.bias[:vocab]
        return replace(self, head=replace(head, weight=head.weight[:vocab], bias=bias))

    def check_tokens(self, what: str, expected: int) -> None:
        """Raises ModelError unless the distribution is given at as many tokens as expected."""
        got = self.hidden.shape[0]
        require(got == expected, ModelError, f"{what} for another batch; got {got} tokens, expected {expected}")

    def at(self, tokens: Tensor | slice) -> Distribution:
        return replace(self, hidden=self.hidden[tokens])


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type softmax and sums run in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def logits_quantities(
    logits: Tensor,
    labels: Tensor,
    want: Collection[str],
    reference: Distribution | None = None,
    teacher: Teacher | None = None,
) -> dict[str, Tensor]:
    """What `head_quantities` computes, from logits `[N, V]` by plain torch.

    Plain logits of a reference or a teacher go in by `Distribution.of_logits(logits)`.
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
    size = reference.head.vocab_size
    message = f"the reference's vocabulary differs from the model's; got {size}, expected {vocab}"
    require(size == vocab, ModelError, message)
    if tokens is not None:
        reference.check_tokens("the reference's hidden states are", tokens)
    return reference


# ---- A teacher made of one or two frozen models: their logits combined, token by token.
#
# Source: "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation", arXiv 2503.02832.
# Its equations, with DPO coefficient beta0 and RLHF coefficient beta:
#
#     form            target  contrast      slope  offset      shift
#     adaptive        DPO     reverse DPO   r      epsilon     0      equations 16, 17
#     constant        DPO     reverse DPO   0      beta0/beta  0      equation 14
#     theorem1        DPO     start         0      beta0/beta  1      equations 8-11
#     interpolation   DPO     start         r      epsilon     1
#     distillation    any     None          0      any         0      plain KL to the target


@dataclass(frozen=True)
class Teacher:
    """The distribution q that a student is taught, with a strength alpha per token.

        tvd = 1/2 sum_v |softmax(z_target) - softmax(z_contrast)|            in [0, 1], at temperature 1
        alpha = slope * tvd + offset
        q = softmax((z_target + (alpha - shift) (z_target - z_contrast)) / temperature)

    Heads of one family may be padded to different sizes: student, target and contrast are cut to the smallest
    before any softmax. A token whose logit is -inf in any of them is out for all three. No gradient reaches
    target or contrast, and their logits are float32 (float64 for a float64 student) also under autocast.
    """

    target: Distribution
    contrast: Distribution | None  # None: as if it were the target
    slope: float
    offset: float
    shift: float = 0.0
    temperature: float = 1.0  # divides the student's and the combined logits in the KL

    def __post_init__(self) -> None:
        positive = self.temperature > 0
        require(positive, ModelError, f"a teacher's temperature must be positive; got {self.temperature}")

    @property
    def vocab_size(self) -> int:
        """The vocabulary that target and contrast have in common."""
        return min(d.head.vocab_size for d in (self.target, self.contrast) if d is not None)

    def map(self, change: Callable[[Distribution], Distribution]) -> Teacher:
        contrast = None if self.contrast is None else change(self.contrast)
        return replace(self, target=change(self.target), contrast=contrast)


def checked_teacher(teacher: Teacher | None, vocab: int, labels: Tensor) -> Teacher:
    """The teacher, detached and cut to what it shares with a student of this vocabulary; else ModelError."""
    if teacher is None:
        raise ModelError("the KL divergence to a teacher needs the teacher, got none")
    for name, distribution in (("target", teacher.target), ("contrast", teacher.contrast)):
        if distribution is not None:
            distribution.check_tokens(f"the teacher's {name} is", len(labels))
    shared = min(vocab, teacher.vocab_size)
    if shared < vocab and labels.numel() and (largest := int(labels.max())) >= shared:
        raise ModelError(
            f"a completion has token id {largest}; expected less than {shared}, the vocabulary that "
            "the teacher and the model share"
        )
    return teacher.map(lambda d: d.detach().cut(shared))


def teacher_quantities(logits: Tensor, labels: Tensor, teacher: Teacher | None) -> dict[str, Tensor]:
    """ "teacher_kl" and what comes with it, each `[N]`, of a student's logits `[N, V]` by plain torch."""
    teacher = checked_teacher(teacher, logits.shape[1], labels)
    student = logits[:, : min(logits.shape[1], teacher.vocab_size)]
    with torch.no_grad():
        target = teacher.target.logits(logits.dtype)
        contrast = target if teacher.contrast is None else teacher.contrast.logits(logits.dtype)
        banned = student.isneginf() | target.isneginf() | contrast.isneginf()

        def logp(z: Tensor) -> Tensor:
            return torch.log_softmax(z.masked_fill(banned, float("-inf")), dim=-1)

        target, contrast = logp(target), logp(contrast)
        tvd = 0.5 * (target.exp() - contrast.exp()).abs().sum(-1)
        alpha = teacher.slope * tvd + teacher.offset
        combined = target + (alpha - teacher.shift)[:, None] * (target - contrast)
        logq = logp(combined / teacher.temperature)
        at_label = [x.gather(1, labels[:, None]).squeeze(1) for x in (target, contrast)]
        reward = at_label[0] - at_label[1]
    student = logp(student / teacher.temperature)
    kl = (student.exp() * (student - logq).masked_fill(banned, 0.0)).sum(-1)
    return {"teacher_kl": kl, "teacher_alpha": alpha, "tvd": tvd, "teacher_reward": reward}
