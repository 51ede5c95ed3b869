"""AlignDistil."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.examples import F64, gradient
from tokengrain.batch import Segments
from tokengrain.errors import RecipeError
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.methods.aligndistil import aligndistil_loss, teacher_strength
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Distribution, Head, Teacher

LENGTHS = (4, 1, 3)
VOCAB = 6


@dataclass
class Logits:
    """Logits `[N, V]` of student, target (DPO model) and contrast, with labels `[N]`."""

    segments: Segments
    student: Tensor
    target: Tensor
    contrast: Tensor
    labels: Tensor

    def scores(self, student: Tensor, form: Any = "adaptive", tau: float = 1.0, **numbers: float) -> dict[str, Tensor]:
        strength = teacher_strength(form, **numbers)
        contrast = None if form == "distil" else Distribution.of_logits(self.contrast)
        teacher = Teacher(Distribution.of_logits(self.target), contrast, temperature=tau, **asdict(strength))
        head = Head(torch.eye(student.shape[1], dtype=F64))
        return head_quantities(student, head, self.labels, ("logps", "teacher_kl"), teacher=teacher)

    def loss(self, student: Tensor, form: Any = "adaptive", beta0: float = 0.1, **settings: Any) -> LossOutput:
        normalize = settings.pop("length_normalize", True)
        scores = self.scores(student, form, beta0=beta0, **settings)
        return aligndistil_loss(
            scores["logps"],
            self.segments,
            teacher_kl=scores["teacher_kl"],
            teacher_alpha=scores["teacher_alpha"],
            beta0=beta0,
            length_normalize=normalize,
        )

    def gradient(self, form: Any = "adaptive", **settings: Any) -> Tensor:
        return gradient(lambda s: _mean(self.loss(s, form, **settings), self.segments), self.student)


def _mean(output: LossOutput, segments: Segments) -> Tensor:
    return make_normaliser("mean")(output, Counts.of(segments, pairs=False))


def _teacher_logits(x: Logits, alpha: Tensor | float, shift: float = 0.0) -> Tensor:
    alpha = torch.as_tensor(alpha, dtype=F64).expand(len(x.labels))
    return x.target + (alpha - shift)[:, None] * (x.target - x.contrast)


@pytest.fixture
def x() -> Logits:
    generator = torch.Generator().manual_seed(3)
    n = sum(LENGTHS)
    student, target, contrast = (torch.randn(n, VOCAB, dtype=F64, generator=generator) for _ in range(3))
    labels = torch.randint(VOCAB, (n,), generator=generator)
    return Logits(Segments.from_lengths(LENGTHS), student.requires_grad_(), target, contrast, labels)


def test_equal_teachers_are_the_target_with_the_highest_weight(x: Logits) -> None:
    x.contrast = x.target.clone()
    scores = x.scores(x.student, r=20.0, epsilon=1e-3)
    torch.testing.assert_close(scores["teacher_alpha"], torch.full((8,), 1e-3, dtype=F64))
    torch.testing.assert_close(scores["teacher_kl"], x.scores(x.student, "distil")["teacher_kl"])
    assert x.loss(x.student, epsilon=1e-3).metrics["teacher/beta_max"].tolist() == pytest.approx([100.0] * 3)


def test_r_0_has_one_strength(x: Logits) -> None:
    assert (x.scores(x.student, r=0.0, epsilon=0.3)["teacher_alpha"] == 0.3).all()


def test_strength_and_weight(x: Logits) -> None:
    """alpha is within its bounds, tvd symmetric, and every token's weight is beta0 / alpha."""
    r, epsilon, beta0 = 7.0, 1e-3, 0.3
    scores = x.scores(x.student, r=r, epsilon=epsilon)
    alpha = scores["teacher_alpha"]
    assert bool(((alpha >= epsilon) & (alpha <= r + epsilon)).all())
    swapped = replace(x, target=x.contrast, contrast=x.target).scores(x.student, r=r, epsilon=epsilon)
    torch.testing.assert_close(swapped["tvd"], scores["tvd"])
    weights = torch.autograd.grad(
        aligndistil_loss(
            scores["logps"],
            x.segments,
            teacher_kl=(kl := torch.ones(8, dtype=F64, requires_grad=True)),
            teacher_alpha=alpha,
            beta0=beta0,
            length_normalize=False,
        ).losses.sum(),
        kl,
    )[0]
    torch.testing.assert_close(weights * alpha, torch.full((8,), beta0, dtype=F64))


def test_a_student_equal_to_the_teacher_has_no_loss_and_no_gradient(x: Logits) -> None:
    alpha = x.scores(x.student)["teacher_alpha"]
    x.student = _teacher_logits(x, alpha).requires_grad_()
    assert x.loss(x.student).losses.abs().max() < 1e-12
    assert x.gradient().abs().max() < 1e-12


@pytest.mark.parametrize(("tau", "normalize"), [(1.0, True), (1.0, False), (2.5, True)])
def test_closed_form_gradient(x: Logits, tau: float, normalize: bool) -> None:
    scores = x.scores(x.student, tau=tau)
    beta_t = 0.1 / scores["teacher_alpha"]
    logp = torch.log_softmax(x.student / tau, -1).detach()
    logq = torch.log_softmax(_teacher_logits(x, scores["teacher_alpha"]) / tau, -1)
    kl = (logp.exp() * (logp - logq)).sum(-1)
    factor = beta_t / tau / 3
    factor = factor / x.segments.broadcast(x.segments.lengths) if normalize else factor
    expected = factor[:, None] * logp.exp() * (logp - logq - kl[:, None])
    found = x.gradient(tau=tau, length_normalize=normalize)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    assert found.sum(-1).abs().max() < 1e-12


def test_what_the_loss_equals(x: Logits) -> None:
    """Spec 2.5: KL to the DPO model at beta_t, minus the contrastive reward at beta0, plus a constant."""
    beta0 = 0.2
    scores = x.scores(x.student, r=4.0)
    alpha = scores["teacher_alpha"]
    beta_t = beta0 / alpha
    logp, logd, logr = (torch.log_softmax(z, -1).detach() for z in (x.student, x.target, x.contrast))
    log_z = torch.logsumexp((1 + alpha)[:, None] * logd - alpha[:, None] * logr, -1)
    to_dpo = (logp.exp() * (logp - logd)).sum(-1)
    reward = beta0 * (logp.exp() * (logd - logr)).sum(-1)
    torch.testing.assert_close(
        beta_t * scores["teacher_kl"].detach(), beta_t * to_dpo - reward + beta_t * log_z, rtol=1e-12, atol=1e-12
    )


def test_theorem_1_at_its_limits(x: Logits) -> None:
    at_dpo = x.scores(x.student, "theorem1", beta0=0.1, beta=0.1)["teacher_kl"]
    torch.testing.assert_close(at_dpo, x.scores(x.student, "distil")["teacher_kl"])
    other = replace(x, contrast=torch.randn_like(x.contrast))
    torch.testing.assert_close(other.scores(x.student, "theorem1", beta0=0.1, beta=0.1)["teacher_kl"], at_dpo)
    at_reference = replace(x, target=x.contrast).scores(x.student, "distil")["teacher_kl"]
    far = x.scores(x.student, "theorem1", beta0=0.1, beta=1e12)["teacher_kl"]
    torch.testing.assert_close(far, at_reference)


def test_forms_are_the_combinations_that_they_name(x: Logits) -> None:
    def kl(teacher: Tensor) -> Tensor:
        p, q = (torch.log_softmax(z, -1).detach() for z in (x.student, teacher))
        return (p.exp() * (p - q)).sum(-1)

    tvd = x.scores(x.student)["tvd"][:, None]
    for form, numbers, alpha in (
        ("constant", {"beta": 0.08}, 0.1 / 0.08),
        ("theorem1", {"beta": 0.08}, 0.1 / 0.08),
        ("interpolation", {"r": 3.0}, 3 * tvd + 1e-3),
        ("adaptive", {"r": 3.0}, 3 * tvd + 1e-3),
    ):
        if form in ("theorem1", "interpolation"):
            teacher = alpha * x.target + (1 - alpha) * x.contrast
        else:
            teacher = x.target + alpha * (x.target - x.contrast)
        found = x.scores(x.student, form, beta0=0.1, **numbers)["teacher_kl"].detach()
        torch.testing.assert_close(found, kl(teacher), rtol=1e-10, atol=1e-12)
    # The token weight of a constant form is its beta.
    losses = x.loss(x.student, "constant", beta0=0.1, beta=0.08).losses
    mean_kl = x.segments.mean(x.scores(x.student, "constant", beta0=0.1, beta=0.08)["teacher_kl"])
    torch.testing.assert_close(losses, 0.08 * mean_kl)
    assert teacher_strength("distil", beta0=0.1, beta=0.4).offset == pytest.approx(0.25)


def test_shifting_logits_and_permuting_the_vocabulary(x: Logits) -> None:
    base, grad = x.loss(x.student).losses, x.gradient()
    for name in ("student", "target", "contrast"):
        shifted = replace(x, **{name: getattr(x, name) + torch.randn(8, 1, dtype=F64)})
        torch.testing.assert_close(shifted.loss(shifted.student).losses, base)
    order = torch.randperm(VOCAB)
    student = x.student.detach()[:, order].requires_grad_()
    permuted = Logits(x.segments, student, x.target[:, order], x.contrast[:, order], order.argsort()[x.labels])
    torch.testing.assert_close(permuted.loss(student).losses, base)
    torch.testing.assert_close(permuted.gradient(), grad[:, order])


def test_a_token_that_one_teacher_cannot_say_is_out_for_all(x: Logits) -> None:
    base, grad = x.loss(x.student).losses, x.gradient()
    extra = torch.zeros(8, 1, dtype=F64)
    student = torch.cat([x.student.detach(), extra + 2], 1).requires_grad_()
    wide = Logits(
        x.segments, student, torch.cat([x.target, extra], 1), torch.cat([x.contrast, extra - torch.inf], 1), x.labels
    )
    torch.testing.assert_close(wide.loss(student).losses, base)
    found = wide.gradient()
    torch.testing.assert_close(found[:, :VOCAB], grad)
    assert bool((found[:, VOCAB] == 0).all())


def test_no_gradient_to_the_teachers(x: Logits) -> None:
    x.target.requires_grad_()
    x.contrast.requires_grad_()
    grads = torch.autograd.grad(x.loss(x.student).losses.sum(), (x.student, x.target, x.contrast), allow_unused=True)
    assert grads[0].abs().max() > 0
    assert grads[1] is None
    assert grads[2] is None


def test_constant_equals_adaptive_where_the_teachers_differ_alike(x: Logits) -> None:
    x.target, x.contrast = x.target[:1].expand(8, -1), x.contrast[:1].expand(8, -1)
    alpha = float(x.scores(x.student, r=5.0)["teacher_alpha"][0])
    constant = x.loss(x.student, "constant", beta=0.1 / alpha).losses
    torch.testing.assert_close(constant, x.loss(x.student, r=5.0).losses)
    torch.testing.assert_close(x.gradient("constant", beta=0.1 / alpha), x.gradient(r=5.0))


def test_empty_completions_and_the_order_of_completions() -> None:
    kl, alpha = torch.rand(4, dtype=F64), torch.rand(4, dtype=F64) + 0.1
    for normalize in (True, False):

        def losses(order: list[int], lengths: list[int], normalize: bool = normalize) -> LossOutput:
            return aligndistil_loss(
                -kl[order],
                Segments.from_lengths(lengths),
                teacher_kl=kl[order],
                teacher_alpha=alpha[order],
                length_normalize=normalize,
            )

        output = losses([0, 1, 2, 3], [3, 0, 1])
        assert output.losses[1] == 0
        assert output.unit == "completions"
        assert all(torch.isfinite(v).all() and v.shape == (3,) for v in output.metrics.values())
        torch.testing.assert_close(losses([3, 0, 1, 2], [1, 0, 3]).losses, output.losses.flip(0))


@pytest.mark.parametrize(
    ("form", "numbers", "message"),
    [
        ("adaptiv", {}, "unknown"),
        ("constant", {}, "needs beta"),
        ("theorem1", {}, "needs beta"),
        ("adaptive", {"beta": 0.1}, "not from beta"),
        ("interpolation", {"beta": 0.1}, "not from beta"),
        ("adaptive", {"epsilon": 0.0}, "epsilon must be positive"),
        ("adaptive", {"r": -1.0}, "r must be finite and not negative"),
        ("constant", {"beta": 0.0}, "beta must be positive"),
        ("distil", {"beta0": float("nan")}, "beta0 must be positive"),
    ],
)
def test_bad_settings_are_refused(form: Any, numbers: dict[str, float], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        teacher_strength(form, **numbers)
