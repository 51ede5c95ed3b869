"""AlignDistil: alignment as adaptive policy distillation (arXiv 2503.02832, equations 11 to 19).

    L       = Σ_t β_t KL(π ‖ teacher_t) / length,    β_t = β0 / α_t
    teacher = softmax(z_d + α_t (z_d - z_reverse)),  α_t = r TVD_t + ε,  TVD_t between the two models

The student learns, token by token, the distribution of a synthetic teacher whose logits z extrapolate past a DPO model,
away from one trained by DPO on exchanged pairs. Teacher and KL are computed in `tokengrain.scoring`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from tokengrain.batch import Segments, TokenBatch
from tokengrain.errors import RecipeError, require
from tokengrain.loss import LossOutput
from tokengrain.method import Card, credit, objective
from tokengrain.scoring.head import Teacher
from tokengrain.scoring.reference import Reference, scorer_logps
from tokengrain.settings import NonNegative, Positive

CARD = Card(
    "aligndistil",
    "AlignDistil",
    "distils DPO against reverse DPO",
    "AlignDistil: Token-Level Language Model Alignment as Adaptive Policy Distillation",
    "2503.02832",
    "ACL 2025",
    trains="two teachers, then policy, offline pairs",
    credit="a DPO model against a reverse DPO model, whole vocabulary",
)
ONLINE = replace(
    CARD,
    name="aligndistil_online",
    title="AlignDistil (on-policy)",
    idea="the same on the policy's samples",
    trains="two teachers on pairs, then policy, online",
)

TeacherForm = Literal["adaptive", "constant", "theorem1", "interpolation", "distil"]


@credit("contrastive_dpo", values="signed")
def contrastive_dpo(batch: TokenBatch, *, model: Any, reverse: Any, beta: Positive = 0.1) -> Tensor:
    """β (log p_model - log p_reverse): log-ratio of a DPO model to a reverse DPO model (AlignDistil).

    Both start from the same weights; the reverse one learned from the pairs with chosen and rejected exchanged, so it
    is worse than the start where the other is better, and the contrast is about twice the guide's.

    Args:
        model: trained by DPO on the pairs: a model, or anything called like a `Reference`.
        reverse: trained by DPO on the exchanged pairs. Same tokenizer.
        beta: reward per nat; the theory means the β that both were trained with.
    """
    return (beta * (scorer_logps(model, batch) - scorer_logps(reverse, batch))).detach()


@dataclass(frozen=True)
class Strength:
    """alpha_t = slope * tvd_t + offset, and the teacher is target + (alpha_t - shift) * (target - contrast)."""

    slope: float
    offset: float
    shift: float


def teacher_strength(
    form: TeacherForm = "adaptive",
    *,
    r: NonNegative = 20.0,
    epsilon: Positive = 1e-3,
    beta0: Positive = 0.1,
    beta: Positive | None = None,
) -> Strength:
    """The numbers of a teacher for `aligndistil_loss`; see `ContrastiveTeacher`."""
    what = f"teacher {form!r}"
    if form not in get_args(TeacherForm):
        raise RecipeError(f"{what}: unknown; expected adaptive, constant, theorem1, interpolation or distil")
    for name, value in (("epsilon", epsilon), ("beta0", beta0), ("beta", beta)):
        positive = value is None or 0 < value < float("inf")
        require(positive, RecipeError, f"{what}: {name} must be positive and finite, got {value}")
    require(0 <= r < float("inf"), RecipeError, f"{what}: r must be finite and not negative, got {r}")
    shift = float(form in ("theorem1", "interpolation"))
    if form in ("adaptive", "interpolation"):
        unused = f"{what} takes its strength from r and epsilon, not from beta; got beta={beta}"
        require(beta is None, RecipeError, unused)
        return Strength(r, epsilon, shift)
    if beta is None and form != "distil":
        raise RecipeError(f"{what} needs beta, the KL coefficient: its strength is beta0 / beta")
    return Strength(0.0, beta0 / (beta0 if beta is None else beta), shift)


class ContrastiveTeacher:
    """AlignDistil's teacher: logits z_target + s (z_target - z_contrast), s by form (arXiv 2503.02832).

    With z the logits of the DPO model d, of the reverse one, and of the reference (the starting model), form is

        "adaptive"       z_d + alpha_t (z_d - z_reverse), alpha_t = r tvd_t + epsilon    (equation 16)
        "constant"       the same with alpha = beta0 / beta                              (equation 15)
        "theorem1"       alpha z_d + (1 - alpha) z_ref, alpha = beta0 / beta             (equation 11)
        "interpolation"  the same with alpha_t = r tvd_t + epsilon
        "distil"         z_d itself; every token weighs beta (or beta0)

    Args:
        target: the DPO model, as a `Reference`.
        contrast: the reverse DPO model, for "theorem1" and "interpolation" the starting model; None for "distil".
        r: highest strength of the adaptive forms; tvd_t, half the L1 distance of the two teachers, is in [0, 1]. The
            flag of the authors' code is r / 2.
        epsilon: strength where the teachers agree.
        beta0: the beta that the teachers were trained with.
        beta: the KL coefficient of the constant forms.
        temperature: divides the logits of student and teacher.

    Raises `RecipeError` for a form without its second model, or with one that it does not use; an unknown form, a
    number out of range, or a beta that is missing or has no use.
    """

    def __init__(
        self,
        *,
        target: Reference,
        contrast: Reference | None = None,
        form: TeacherForm = "adaptive",
        r: float = 20.0,
        epsilon: float = 1e-3,
        beta0: float = 0.1,
        beta: float | None = None,
        temperature: float = 1.0,
    ) -> None:
        needs = "no second model" if form == "distil" else "a second model, the contrast"
        require((contrast is None) == (form == "distil"), RecipeError, f"a teacher of form {form!r} needs {needs}")
        self.target, self.contrast, self.temperature = target, contrast, temperature
        self.strength = teacher_strength(form, r=r, epsilon=epsilon, beta0=beta0, beta=beta)

    def __call__(self, batch: TokenBatch) -> Teacher:
        """The teacher's distribution at every counted token of `batch`, without its logits."""
        target: Any = self.target(batch, {"distribution"}).distribution
        contrast = self.contrast(batch, {"distribution"}).distribution if self.contrast is not None else None
        return Teacher(target=target, contrast=contrast, temperature=self.temperature, **vars(self.strength))


@objective(
    "aligndistil",
    unit="completions",
    roles=(),
    no_credit="its credit is the difference of its two teachers",
    teacher=ContrastiveTeacher,
)
def aligndistil_loss(
    logps: Tensor,
    segments: Segments,
    *,
    teacher_kl: Tensor,
    teacher_alpha: Tensor,
    beta0: Positive = 0.1,
    length_normalize: bool = True,
) -> LossOutput:
    """Reverse KL to a synthetic teacher, each token weighted by beta_t = beta0 / alpha_t.

    Args:
        logps: logged, not trained.
        teacher_kl: KL(student || teacher) over the full vocabulary in the state before each token `[N]`, nats,
            with gradient to the student.
        teacher_alpha: alpha_t, how far the teacher extrapolates at each token `[N]`, above 0.
        beta0: the beta that the two teachers were trained with by DPO.
        length_normalize: divide the sum over each completion by its length.

    Returns:
        `losses` [C]; a completion without tokens has loss 0 and stays in the count. Metrics: "kl/teacher"
        (nats per token), mean alpha, and the highest beta_t: tokens on which the teachers agree are pulled
        hardest, up to beta0 / epsilon.
    """
    beta_t = beta0 / teacher_alpha.detach()
    token_losses = beta_t * teacher_kl  # equation 17
    losses = segments.mean(token_losses) if length_normalize else segments.sum(token_losses)  # equations 18, 19
    highest = segments.max(beta_t)
    metrics = {
        "kl/teacher": segments.mean(teacher_kl.detach()),
        "teacher/alpha": segments.mean(teacher_alpha.detach()),
        "teacher/beta_max": torch.where(torch.isfinite(highest), highest, 0.0),  # -inf without tokens
        "logps": segments.sum(logps.detach()),
    }
    return LossOutput(losses, metrics, unit="completions")
