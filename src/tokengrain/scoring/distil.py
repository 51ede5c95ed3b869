"""The KL to a teacher in one chunk of the fused head: student, target and contrast together.

With p = softmax(z / tau) and the teacher's q held constant,

    KL(p||q) = sum_v p (log p - log q),    d KL / dz = p (log p - log q - KL) / tau.

Three `[n, V]` buffers suffice: the student's logits, the target's, which become log q and then log p - log q,
and the contrast's, which become p. A fourth is needed where the student's softmax is not that of its other
quantities: another temperature, fewer tokens, or some banned ones. The slow twin is
`tokengrain.scoring.teacher.teacher_quantities`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from tokengrain.scoring.chunks import Job, Scratch, block_rows, chunk_logits, softmax_
from tokengrain.scoring.head import Distribution, Head
from tokengrain.scoring.teacher import Teacher

CONSTANTS = ("teacher_alpha", "tvd", "teacher_reward")


def may_ban(head: Head, teacher: Teacher) -> bool:
    """Whether a logit of the student, the target or the contrast can be -inf."""
    distributions = [d for d in (teacher.target, teacher.contrast) if d is not None]
    given = [d.hidden for d in distributions if d.head.is_identity]
    biases = [h.bias for h in (head, *(d.head for d in distributions)) if h.bias is not None and h.softcap is None]
    return any(bool(values.isneginf().any()) for values in (*given, *biases))


def student_logits(logits: Tensor, job: Job, scratch: Scratch) -> Tensor:
    """The student's logits over the shared vocabulary: `logits` itself where one softmax serves all quantities."""
    assert job.teacher is not None
    n, vocab = len(logits), job.teacher.vocab_size
    alone = job.names == ("teacher_kl",)
    if vocab == logits.shape[1] and (alone or (job.teacher.temperature == 1.0 and not job.banned)):
        return logits
    return scratch("student", n, vocab).copy_(logits[:, :vocab])


def log_ratio(
    student: Tensor, job: Job, rows: slice, scratch: Scratch, strength: Tensor | None = None
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(log p, log p - log q, constants) of a chunk, `[n, V]`, `[n, V]` and `[n]` each. Overwrites `student`.

    Args:
        student: logits, not divided by the temperature.
        strength: alpha if it is known; the constants are then not computed again.
    """
    teacher = job.teacher
    assert teacher is not None
    target = _teacher_logits(teacher.target, rows, scratch, "target")
    contrast = None if teacher.contrast is None else _teacher_logits(teacher.contrast, rows, scratch, "contrast")
    banned = None
    if job.banned:
        every = [z for z in (student, target, contrast) if z is not None]
        banned = torch.stack([z.isneginf() for z in every]).any(0)
        for z in every:
            z.masked_fill_(banned, float("-inf"))
    constants: dict[str, Tensor] = {}
    if strength is None:
        target = softmax_(target, log=True)
        contrast = None if contrast is None else softmax_(contrast, log=True)
        constants = _constants(target, contrast, job, rows)
        strength = constants["teacher_alpha"]
    if contrast is not None:
        # target + (alpha - shift) (target - contrast)
        torch.lerp(contrast, target, (1.0 + strength - teacher.shift)[:, None], out=target)
        target = target if banned is None else target.masked_fill_(banned, float("-inf"))
    if teacher.temperature != 1.0:
        student.div_(teacher.temperature)
        target.div_(teacher.temperature)
    logp, logq = softmax_(student, log=True), softmax_(target, log=True)
    ratio = torch.sub(logp, logq, out=logq)
    return logp, ratio if banned is None else ratio.masked_fill_(banned, 0.0), constants


def _teacher_logits(distribution: Distribution, rows: slice, scratch: Scratch, name: str) -> Tensor:
    """Multiplied in the accumulation type: extrapolation amplifies what rounding does to logits."""
    return chunk_logits(distribution.hidden[rows], distribution.head, scratch.dtype, scratch, name)


def _constants(target: Tensor, contrast: Tensor | None, job: Job, rows: slice) -> dict[str, Tensor]:
    """Total variation, strength and reward from log-probabilities."""
    assert job.teacher is not None
    if contrast is None:
        tvd = reward = target.new_zeros(len(target))
    else:
        step = block_rows(target.shape[1], target)
        parts = [
            # A few rows at a time: their probabilities stay in the cache and need no buffer.
            a.exp().sub_(b.exp()).abs_().sum(-1)
            for a, b in zip(target.split(step), contrast.split(step))
        ]
        tvd = torch.cat(parts).mul_(0.5)
        labels = job.labels[rows, None]
        reward = (target.gather(1, labels) - contrast.gather(1, labels)).squeeze(1)
    alpha = job.teacher.slope * tvd + job.teacher.offset
    return {"teacher_alpha": alpha, "tvd": tvd, "teacher_reward": reward}


def forward_chunk(
    student: Tensor, job: Job, rows: slice, values: Mapping[str, Tensor], scratch: Scratch, vocab: int, *, basis: bool
) -> tuple[Tensor, Tensor | None]:
    """Fills the four values of a chunk; returns log p and, if asked for, the basis (see `basis_`)."""
    logp, ratio, constants = log_ratio(student, job, rows, scratch)
    for name, value in constants.items():
        values[name][rows] = value
    p = torch.exp(logp, out=scratch("contrast", *logp.shape))
    kl = values["teacher_kl"][rows] = torch.linalg.vecdot(p, ratio)
    return logp, basis_(p, ratio, kl, scratch, vocab) if basis else None


def recomputed_chunk(
    student: Tensor, job: Job, rows: slice, kl: Tensor, strength: Tensor, scratch: Scratch, vocab: int
) -> tuple[Tensor, Tensor]:
    """(p, basis) of a chunk whose KL and strength `[n]` are known."""
    logp, ratio, _ = log_ratio(student, job, rows, scratch, strength)
    p = logp.exp_()
    return p, basis_(p, ratio, kl, scratch, vocab)


def basis_(p: Tensor, ratio: Tensor, kl: Tensor, scratch: Scratch, vocab: int) -> Tensor:
    """`[n, vocab]` matrix tau * d KL / dz; 0 for tokens outside the shared vocabulary. Overwrites `ratio`."""
    out = ratio.sub_(kl[:, None]).mul_(p)
    if out.shape[1] == vocab:
        return out
    wide = scratch("wide", len(out))
    wide[:, out.shape[1] :] = 0.0
    wide[:, : out.shape[1]] = out
    return wide
