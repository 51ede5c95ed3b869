"""A teacher made of one or two frozen models: their logits combined, token by token.

Source: "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation", arXiv 2503.02832.
The forms of its equations, with DPO coefficient beta0 and RLHF coefficient beta:

    form            target  contrast      slope  offset      shift
    adaptive        DPO     reverse DPO   r      epsilon     0      equations 16, 17
    constant        DPO     reverse DPO   0      beta0/beta  0      equation 14
    theorem1        DPO     start         0      beta0/beta  1      equations 8-11
    interpolation   DPO     start         r      epsilon     1
    distillation    any     None          0      any         0      plain KL to the target
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tokengrain.errors import ModelError

if TYPE_CHECKING:
    from tokengrain.scoring.head import Distribution


@dataclass(frozen=True)
class Teacher:
    """The distribution q that a student is taught, with a strength alpha per token.

        tvd = 1/2 sum_v |softmax(z_target) - softmax(z_contrast)|            in [0, 1], at temperature 1
        alpha = slope * tvd + offset
        q = softmax((z_target + (alpha - shift) (z_target - z_contrast)) / temperature)

    Heads of one family may be padded to different sizes: student, target and contrast are cut to the smallest
    before any softmax. A token whose logit is -inf in any of them is out for all three. No gradient reaches
    target or contrast, and their logits are float32 (float64 for a float64 student) also under autocast.

    Attributes:
        target, contrast: at the same N tokens as the student. None for contrast: as if it were the target.
        slope, offset, shift: see above.
        temperature: divides the student's and the combined logits in the KL.
    """

    target: Distribution
    contrast: Distribution | None
    slope: float
    offset: float
    shift: float = 0.0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ModelError(f"a teacher's temperature must be positive; got {self.temperature}")

    @property
    def vocab_size(self) -> int:
        """The vocabulary that target and contrast have in common."""
        sizes = [d.head.vocab_size for d in (self.target, self.contrast) if d is not None]
        return min(sizes)

    def map(self, change: Callable[[Distribution], Distribution]) -> Teacher:
        """The same teacher of changed distributions."""
        contrast = None if self.contrast is None else change(self.contrast)
        return replace(self, target=change(self.target), contrast=contrast)


def checked_teacher(teacher: Teacher | None, vocab: int, labels: Tensor) -> Teacher:
    """The teacher, detached and cut to what it shares with a student of this vocabulary; else ModelError."""
    if teacher is None:
        raise ModelError("the KL divergence to a teacher needs the teacher, got none")
    for name, distribution in (("target", teacher.target), ("contrast", teacher.contrast)):
        if distribution is not None and distribution.hidden.shape[0] != len(labels):
            raise ModelError(
                f"the teacher's {name} is for another batch; got {distribution.hidden.shape[0]} tokens, "
                f"expected {len(labels)}"
            )
    shared = min(vocab, teacher.vocab_size)
    if shared < vocab and labels.numel() and int(labels.max()) >= shared:
        raise ModelError(
            f"a completion has token id {int(labels.max())}; expected less than {shared}, the vocabulary that "
            "the teacher and the model share"
        )
    return teacher.map(lambda d: d.detach().cut(shared))


def teacher_quantities(logits: Tensor, labels: Tensor, teacher: Teacher | None) -> dict[str, Tensor]:
    """`teacher_kl`, `teacher_alpha`, `tvd`, `teacher_reward`, each `[N]`, by plain torch; see `head_quantities`.

    Args:
        logits: the student's, `[N, V]`, float32 or float64.
        labels: long `[N]`.
        teacher: at the same tokens.
    """
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
