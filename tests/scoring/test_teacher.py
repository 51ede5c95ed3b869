"""The KL to a teacher in the fused head against plain torch: values and gradients, float64."""

import pytest
import torch
from torch import Tensor

from tests.scoring.models import reference_head_quantities
from tokengrain.errors import ModelError
from tokengrain.scoring import fused
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Distribution, Head, Teacher, logits_quantities

VALUES = ("teacher_kl", "teacher_alpha", "tvd", "teacher_reward")
ALL = ("logps", "entropy", "kl", "teacher_kl")
N, H, V = 19, 6, 17
INF = float("inf")
FORMS = {
    "adaptive": {"slope": 20.0, "offset": 1e-3},
    "constant": {"slope": 0.0, "offset": 1.25},
    "theorem1": {"slope": 0.0, "offset": 2.0, "shift": 1.0},
    "interpolation": {"slope": 6.0, "offset": 1e-3, "shift": 1.0},
    "tempered": {"slope": 6.0, "offset": 1e-3, "temperature": 2.0},
}


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def distribution(seed: int, vocab: int = V, **kind) -> Distribution:
    """A model near a common one, as a DPO model and its reverse are near their start."""
    bias = draw(vocab, seed=seed + 1) if kind.pop("bias", False) else None
    weight = draw(V + 4, H, seed=7)[:vocab] + 0.3 * draw(vocab, H, seed=seed)
    return Distribution(draw(N, H, seed=8) + 0.3 * draw(N, H, seed=seed + 2), Head(weight, bias, **kind))


def problem(form: str = "adaptive", vocabs=(V, V, V), **kind) -> tuple[Tensor, Head, Tensor, Teacher, Distribution]:
    target, contrast = (distribution(10 * k, v, **kind) for k, v in ((1, vocabs[1]), (2, vocabs[2])))
    student, reference = distribution(30, vocabs[0], **kind), distribution(40, vocabs[0], **kind)
    head = student.head
    head = Head(head.weight.requires_grad_(), head.bias if head.bias is None else head.bias.requires_grad_(), **{
        k: v for k, v in kind.items() if k != "bias"
    })  # fmt: skip
    labels = torch.randint(min(vocabs), (N,), generator=torch.Generator().manual_seed(3))
    teacher = Teacher(target, None if form == "plain" else contrast, **FORMS.get(form, {"slope": 0.0, "offset": 0.5}))
    return student.hidden.requires_grad_(), head, labels, teacher, reference


def compare(args, names, **options) -> None:
    """Values of all names, and gradients of a random combination of those that have one."""
    hidden, head, labels, teacher, reference = args
    fast = head_quantities(hidden, head, labels, names, reference, teacher, **options)
    slow = reference_head_quantities(hidden, head, labels, names, reference, teacher)
    assert list(fast) == list(slow)
    torch.testing.assert_close(fast, slow, rtol=1e-11, atol=1e-12)
    assert [n for n in fast if fast[n].requires_grad] == list(names)
    inputs = [t for t in (hidden, head.weight, head.bias) if t is not None and t.requires_grad]
    grads = [
        torch.autograd.grad(sum((out[n] * draw(N, seed=k)).sum() for k, n in enumerate(names)), inputs)
        for out in (fast, slow)
    ]
    torch.testing.assert_close(*grads, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("names", [("teacher_kl",), ("logps", "teacher_kl"), ALL])
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("form", [*FORMS, "plain"])
def test_equals_plain_torch(form, chunk, names):
    compare(problem(form), names, chunk_tokens=chunk)


@pytest.mark.parametrize("names", [("teacher_kl",), ALL])
@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("vocabs", [(V, V, V), (V, V - 3, V - 1), (V - 2, V, V + 4)])
@pytest.mark.parametrize("form", ["adaptive", "tempered"])
@pytest.mark.parametrize(
    "kind", [{"scale": 0.25, "bias": True}, {"softcap": 2.0}, {"scale": 3.0, "softcap": 1.5, "bias": True}]
)
def test_heads_of_every_kind_and_size(kind, form, vocabs, chunk, names):
    compare(problem(form, vocabs, **kind), names, chunk_tokens=chunk)


@pytest.mark.parametrize("frozen", ["head", "hidden"])
@pytest.mark.parametrize("names", [("logps",), ("logps", "teacher_kl"), ALL])
@pytest.mark.parametrize("form", ["adaptive", "tempered"])
def test_frozen_head_and_frozen_hidden(frozen, names, form):
    """With a frozen head the gradient is projected in the forward pass, in chunks."""
    hidden, head, *rest = problem(form, softcap=2.0, bias=True, scale=0.5)
    args = (hidden, head.detach(), *rest) if frozen == "head" else (hidden.detach(), head, *rest)
    for options in ({"chunk_tokens": 5}, {}):
        compare(args, names, **options)
    out = head_quantities(*args[:3], names, args[4], args[3], chunk_tokens=4)
    inputs = hidden if frozen == "head" else head.weight
    first = torch.autograd.grad(out["logps"].sum(), inputs, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(out["logps"].sum(), inputs)[0], first, rtol=0, atol=0)


def test_gradcheck():
    hidden, head, labels, teacher, _ = problem("tempered", (V, V - 2, V), scale=0.5, softcap=3.0, bias=True)

    def run(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        part = teacher.map(lambda d: d.at(slice(4)))
        return head_quantities(h, Head(w, b, 0.5, 3.0), labels[:4], ("teacher_kl",), None, part, chunk_tokens=3)[
            "teacher_kl"
        ]

    inputs = [t.detach().clone().requires_grad_() for t in (hidden[:4], head.weight, head.bias)]
    assert torch.autograd.gradcheck(run, inputs)


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("form", [*FORMS, "plain"])
@pytest.mark.parametrize("who", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_banned_tokens_are_out_for_all_three(who, form, chunk):
    """-inf in one is as if the vocabulary did not have the token: same values, no gradient there, no NaN."""
    hidden, head, labels, teacher, _ = problem(form)
    labels = torch.where(labels == 3, 4, labels)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[3] = -INF

    def heads(change) -> tuple[Head, Teacher]:
        contrast = teacher.contrast and Distribution(teacher.contrast.hidden, change(teacher.contrast.head, 2))
        target = Distribution(teacher.target.hidden, change(teacher.target.head, 1))
        return change(head, 0), Teacher(target, contrast, **(FORMS.get(form) or {"slope": 0.0, "offset": 0.5}))

    if who == (2,) and teacher.contrast is None:
        return
    banned = heads(lambda h, k: Head(h.weight, bias if k in who else None))
    kept = [v for v in range(V) if v != 3]
    without = heads(lambda h, k: Head(h.weight[kept]))
    names = ("teacher_kl",)
    got = head_quantities(hidden, banned[0], labels, ("logps", *names), None, banned[1], chunk_tokens=chunk)
    alone = head_quantities(hidden, banned[0], labels, names, None, banned[1], chunk_tokens=chunk)
    moved = torch.where(labels > 3, labels - 1, labels)
    expected = head_quantities(hidden, without[0], moved, names, None, without[1])
    slow = reference_head_quantities(hidden, banned[0], labels, names, None, banned[1])
    grads = []
    for out in (got, alone, expected, slow):
        torch.testing.assert_close({n: out[n] for n in VALUES}, {n: expected[n] for n in VALUES})
        grads.append(torch.autograd.grad((out["teacher_kl"] * draw(N)).sum(), [hidden, head.weight], retain_graph=True))
        torch.testing.assert_close(grads[-1], grads[0], rtol=1e-10, atol=1e-11)
    assert not grads[0][1][3].any()


def test_plain_logits_of_a_teacher():
    """As the authors' functions take them; some entries banned at some tokens."""
    logits, target, contrast = (2 * draw(N, V, seed=s) for s in (1, 2, 3))
    logits.requires_grad_()
    labels = torch.randint(V - 1, (N,), generator=torch.Generator().manual_seed(3))
    for banned in (target[:4], contrast[2:7]):
        banned[:, V - 1] = -INF
    teacher = Teacher(Distribution.of_logits(target), Distribution.of_logits(contrast), 20.0, 1e-3)
    slow = logits_quantities(logits, labels, ("teacher_kl",), teacher=teacher)
    fast = head_quantities(logits, Head(torch.eye(V).double()), labels, ("teacher_kl",), None, teacher)
    assert tuple(slow) == VALUES
    torch.testing.assert_close(fast, slow)
    a, b = (torch.autograd.grad(x["teacher_kl"].sum(), logits)[0] for x in (fast, slow))
    torch.testing.assert_close(a, b)
    assert torch.isfinite(a).all()
    assert not a[:7, V - 1].any()
    assert a[7:, V - 1].all()


def test_no_gradient_to_target_and_contrast_even_where_weights_are_tied():
    """Identity 6, and three models over one head: the head learns as a student only."""
    hidden, head, labels, teacher, _ = problem()
    target, contrast = (d.hidden.clone().requires_grad_() for d in (teacher.target, teacher.contrast))
    tied = Teacher(Distribution(target, head), Distribution(contrast, head), **FORMS["adaptive"])
    got, slow = (
        compute(hidden, head, labels, ("teacher_kl",), None, tied)["teacher_kl"]
        for compute in (head_quantities, reference_head_quantities)
    )
    grads = [torch.autograd.grad(x.sum(), [hidden, head.weight, target], allow_unused=True) for x in (got, slow)]
    assert grads[0][2] is None
    assert grads[1][2] is None
    torch.testing.assert_close(grads[0][:2], grads[1][:2])


def test_a_broken_token_does_not_spoil_others():
    """Identity 6, second half: uncounted positions are not in the batch; a counted one keeps NaN to itself."""
    hidden, head, labels, teacher, _ = problem()
    expected = head_quantities(hidden, head, labels, ("teacher_kl",), None, teacher)["teacher_kl"]
    broken = teacher.target.hidden.clone()
    broken[2] = float("nan")
    teacher = Teacher(Distribution(broken, teacher.target.head), teacher.contrast, **FORMS["adaptive"])
    got = head_quantities(hidden, head, labels, ("teacher_kl",), None, teacher)["teacher_kl"]
    others = torch.arange(N) != 2
    torch.testing.assert_close(got[others], expected[others])
    assert got[2].isnan()


def test_float32_chunks_match_float64():
    """Identity 7: 1e-5 relative, with a large vocabulary and strength."""
    torch.manual_seed(0)
    n, vocab, size = 24, 4000, 32
    weight, near = torch.randn(vocab, size).double(), 0.05 * torch.randn(2, vocab, size).double()
    hidden, labels = torch.randn(n, size).double() / 2, torch.randint(vocab, (n,))

    def grads(dtype, compute, **options):
        h, w = hidden.to(dtype).requires_grad_(), (weight * 0.9).to(dtype).requires_grad_()
        pair = [Distribution(hidden.to(dtype), Head((weight + d).to(dtype))) for d in near]
        out = compute(h, Head(w), labels, ("teacher_kl",), None, Teacher(*pair, slope=20.0, offset=1e-3), **options)
        return [out["teacher_kl"], *torch.autograd.grad(out["teacher_kl"].mean(), [h, w])]

    exact = grads(torch.float64, reference_head_quantities)
    for options in ({}, {"chunk_tokens": 7}):
        for a, b in zip(grads(torch.float32, head_quantities, **options), exact):
            assert float((a.detach().double() - b.detach()).norm() / b.detach().norm()) < 1e-5


def test_teacher_logits_are_float32_under_autocast_and_for_16_bit_weights(monkeypatch):
    """Extrapolation by alpha = 20 would amplify what bfloat16 products round away."""
    hidden, head, labels, teacher, _ = problem(scale=0.5, bias=True)
    half = teacher.map(lambda d: Distribution(d.hidden.bfloat16(), Head(d.head.weight.bfloat16(), d.head.bias, 0.5)))
    exact = half.map(lambda d: Distribution(d.hidden.double(), Head(d.head.weight.double(), d.head.bias, 0.5)))
    student = hidden.detach().float(), Head(head.weight.detach().float(), head.bias.detach().float(), 0.5)
    # Several blocks of upcast weights.
    monkeypatch.setitem(fused.BLOCK_BYTES, "cpu", 4 * H * 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = [
            compute(*student, labels, ("teacher_kl",), None, half)
            for compute in (head_quantities, reference_head_quantities)
        ]
    precise = reference_head_quantities(
        student[0].double(), Head(student[1].weight.double(), student[1].bias.double(), 0.5), labels, ("teacher_kl",),
        None, exact,
    )  # fmt: skip
    for out in got:
        for name in ("teacher_alpha", "tvd", "teacher_reward"):
            assert out[name].dtype == torch.float32
            torch.testing.assert_close(out[name].double(), precise[name], rtol=2e-6, atol=2e-6)
        torch.testing.assert_close(out["teacher_kl"].double(), precise["teacher_kl"], rtol=0.05, atol=0.05)


@pytest.mark.parametrize("names", [("teacher_kl",), ALL])
def test_no_more_than_a_few_chunks_of_logits(monkeypatch, names):
    """Without room to keep anything, every `[., V]` buffer has at most a chunk of rows, and there are few."""
    monkeypatch.setitem(fused.KEEP_BYTES, "cpu", 0)
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 5 * V * 8)
    monkeypatch.setattr(fused, "MIN_CHUNK_TOKENS", 1)
    made = []
    scratch = fused.Scratch.__init__
    monkeypatch.setattr(fused.Scratch, "__init__", lambda self, *a: (made.append(self), scratch(self, *a))[1])
    args = problem()
    compare(args, names)
    assert {s.rows for s in made} == {5}
    assert max(len(s.buffers) for s in made) <= (3 if len(names) == 1 else 6)


def test_small_problems_are_kept_and_not_computed_again(monkeypatch):
    calls = []
    log_ratio = "tokengrain.scoring.fused.log_ratio"
    from tokengrain.scoring import fused

    original = fused.log_ratio
    monkeypatch.setattr(log_ratio, lambda *a: (calls.append(1), original(*a))[1])
    hidden, head, labels, teacher, _ = problem()
    for chunk, expected in ((None, 1), (N, 2)):
        calls.clear()
        out = head_quantities(hidden, head, labels, ("teacher_kl",), None, teacher, chunk_tokens=chunk)
        out["teacher_kl"].sum().backward()
        assert len(calls) == expected
    calls.clear()
    frozen = head_quantities(hidden, head.detach(), labels, ("teacher_kl",), None, teacher, chunk_tokens=N)
    frozen["teacher_kl"].sum().backward()
    assert len(calls) == 1


def test_no_tokens():
    hidden, head, labels, teacher, _ = problem()
    none = teacher.map(lambda d: d.at(slice(0)))
    out = head_quantities(hidden[:0], head, labels[:0], ("logps", "teacher_kl"), None, none)
    assert all(x.shape == (0,) for x in out.values())
    sum(x.sum() for x in out.values()).backward()
    assert not head.weight.grad.any()


def test_errors_name_what_differs():
    hidden, head, labels, teacher, _ = problem()
    for compute in (head_quantities, reference_head_quantities):
        with pytest.raises(ModelError, match="needs the teacher, got none"):
            compute(hidden, head, labels, ("teacher_kl",))
        short = Teacher(teacher.target, teacher.contrast.at(slice(3)), 0.0, 1.0)
        with pytest.raises(ModelError, match=f"teacher's contrast is for another batch; got 3 tokens, expected {N}"):
            compute(hidden, head, labels, ("teacher_kl",), None, short)
        small = Teacher(teacher.target.cut(4), None, 0.0, 1.0)
        with pytest.raises(ModelError, match=f"token id {int(labels.max())}; expected less than 4, the vocabulary"):
            compute(hidden, head, labels, ("teacher_kl",), None, small)
    with pytest.raises(ModelError, match="temperature must be positive; got 0"):
        Teacher(teacher.target, None, 0.0, 1.0, temperature=0.0)
