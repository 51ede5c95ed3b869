"""The KL to a teacher: the equations and identities of AlignDistil (arXiv 2503.02832) on plain logits, float64."""

import torch
from torch import Tensor

from tests.scoring.test_teacher import FORMS, draw
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Distribution, Head, Teacher

N, V = 19, 17


def written_out(student: Tensor, target: Tensor, contrast: Tensor, slope: float, offset: float) -> dict[str, Tensor]:
    """Equations 16 and 17 and the gradient, temperature 1."""
    p_d, p_r = target.softmax(-1), contrast.softmax(-1)
    tvd = (p_d - p_r).abs().sum(-1) / 2
    alpha = slope * tvd + offset
    logq = (target + alpha[:, None] * (target - contrast)).log_softmax(-1)
    p, logp = student.softmax(-1), student.log_softmax(-1)
    kl = (p * (logp - logq)).sum(-1)
    return {"tvd": tvd, "alpha": alpha, "kl": kl, "gradient": p * (logp - logq - kl[:, None])}


def logits_of(seed: int) -> Tensor:
    return 1.5 * draw(N, V, seed=seed)


def taught(student, target, contrast, **form) -> dict[str, Tensor]:
    wrapped = [None if z is None else Distribution.of_logits(z) for z in (target, contrast)]
    labels = torch.arange(N) % V
    return head_quantities(
        student, Head(torch.eye(V).double()), labels, ("teacher_kl",), None, Teacher(*wrapped, **form)
    )


def test_the_equations_as_printed():
    student, target, contrast = logits_of(1).requires_grad_(), logits_of(2), logits_of(3)
    got = taught(student, target, contrast, **FORMS["adaptive"])
    expected = written_out(student.detach(), target, contrast, 20.0, 1e-3)
    for name, key in (("tvd", "tvd"), ("teacher_alpha", "alpha"), ("teacher_kl", "kl")):
        torch.testing.assert_close(got[name], expected[key], rtol=1e-12, atol=1e-12)
    gradient = torch.autograd.grad(got["teacher_kl"].sum(), student)[0]
    torch.testing.assert_close(gradient, expected["gradient"], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(N).double())
    reward = (target.log_softmax(-1) - contrast.log_softmax(-1))[torch.arange(N), torch.arange(N) % V]
    torch.testing.assert_close(got["teacher_reward"], reward)


def test_equal_models_give_the_offset():
    """Identity 1: alpha is exactly epsilon and the teacher the DPO model, in float32 too; so it is for r = 0."""
    student, target = logits_of(1), logits_of(2)
    for dtype in (torch.float64, torch.float32):
        got = taught(student.to(dtype), target.to(dtype), target.to(dtype).clone(), slope=20.0, offset=1e-3)
        assert torch.equal(got["teacher_alpha"], torch.full((N,), 1e-3, dtype=dtype))
        plain = taught(student.to(dtype), target.to(dtype), None, slope=20.0, offset=1e-3)
        torch.testing.assert_close(got, plain)
    none = taught(student, target, logits_of(3), slope=0.0, offset=1e-3)
    assert torch.equal(none["teacher_alpha"], torch.full((N,), 1e-3, dtype=torch.float64))


def test_strength_is_bounded_and_symmetric():
    """Identity 2."""
    one = taught(logits_of(1), logits_of(2), logits_of(3), slope=20.0, offset=1e-3)
    other = taught(logits_of(1), logits_of(3), logits_of(2), slope=20.0, offset=1e-3)
    torch.testing.assert_close(one["tvd"], other["tvd"])
    torch.testing.assert_close(one["teacher_reward"], -other["teacher_reward"])
    assert ((one["teacher_alpha"] >= 1e-3) & (one["teacher_alpha"] <= 20.001)).all()


def test_a_student_that_is_the_teacher_stays():
    """Identity 3, first half."""
    target, contrast = logits_of(2), logits_of(3)
    alpha = written_out(target, target, contrast, 2.0, 1e-3)["alpha"]
    student = (target + alpha[:, None] * (target - contrast) + 5.0).requires_grad_()
    kl = taught(student, target, contrast, slope=2.0, offset=1e-3)["teacher_kl"]
    torch.testing.assert_close(kl, torch.zeros(N).double(), rtol=0, atol=1e-13)
    torch.testing.assert_close(
        torch.autograd.grad(kl.sum(), student)[0], torch.zeros(N, V).double(), rtol=0, atol=1e-13
    )


def test_the_loss_is_reinforcement_with_a_loosened_anchor():
    """Identity 3, second half: reward of fixed strength, KL to the DPO model, a normaliser."""
    beta0, student, target, contrast = 0.1, logits_of(1), logits_of(2), logits_of(3)
    got = taught(student, target, contrast, slope=4.0, offset=1e-3)
    alpha = got["teacher_alpha"]
    logp, log_d, log_r = (z.log_softmax(-1) for z in (student, target, contrast))
    normaliser = ((1 + alpha)[:, None] * log_d - alpha[:, None] * log_r).logsumexp(-1)
    anchor = (logp.exp() * (logp - log_d)).sum(-1)
    reward = beta0 * (logp.exp() * (log_d - log_r)).sum(-1)
    torch.testing.assert_close(
        beta0 / alpha * got["teacher_kl"], beta0 / alpha * (anchor + normaliser) - reward, rtol=1e-12, atol=1e-12
    )


def test_theorem_1_at_its_ends():
    """Identity 4: beta = beta0 teaches the DPO model whatever the start, beta -> infinity the start."""
    student, target, start = logits_of(1), logits_of(2), logits_of(3)
    for alpha, end in ((1.0, target), (0.0, start)):
        got = taught(student, target, start, slope=0.0, offset=alpha, shift=1.0)["teacher_kl"]
        torch.testing.assert_close(got, taught(student, end, None, slope=0.0, offset=1.0)["teacher_kl"])


def test_constants_per_position_and_permutations():
    """Identity 5."""
    every = [logits_of(s) for s in (1, 2, 3)]
    every[0].requires_grad_()
    labels = torch.arange(N) % V
    got = taught(*every, **FORMS["tempered"])
    shifted = taught(*(z + 10 * draw(N, 1, seed=9 + k) for k, z in enumerate(every)), **FORMS["tempered"])
    torch.testing.assert_close(got, shifted, rtol=1e-11, atol=1e-11)
    order = torch.randperm(V, generator=torch.Generator().manual_seed(4))
    permuted = [z.detach()[:, order] for z in every]
    permuted[0].requires_grad_()
    wrapped = [Distribution.of_logits(z) for z in permuted[1:]]
    again = head_quantities(
        permuted[0], Head(torch.eye(V).double()), order.argsort()[labels], ("teacher_kl",), None,
        Teacher(*wrapped, **FORMS["tempered"]),
    )  # fmt: skip
    torch.testing.assert_close(got, again)
    a, b = (torch.autograd.grad(x["teacher_kl"].sum(), z)[0] for x, z in ((got, every[0]), (again, permuted[0])))
    torch.testing.assert_close(a[:, order], b)


def test_constant_strength_equals_adaptive_where_the_distance_is_the_same():
    """Identity 8."""
    student, target, contrast = (z[:1].repeat(N, 1) for z in (logits_of(1), logits_of(2), logits_of(3)))
    adaptive = taught(student, target, contrast, slope=6.0, offset=1e-3)
    constant = taught(student, target, contrast, slope=0.0, offset=float(adaptive["teacher_alpha"][0]))
    torch.testing.assert_close(constant, adaptive)
