"""The fused head against plain torch: values and gradients, float64."""

import itertools

import pytest
import torch
from torch import Tensor

from tests.scoring.models import reference_head_quantities
from tokengrain.errors import ModelError
from tokengrain.scoring import fused
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Distribution, Head

WANT = ("logps", "entropy", "kl")
N, H, V = 23, 6, 17


def problem(
    *,
    scale: float = 1.0,
    softcap: float | None = None,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
) -> tuple[Tensor, Head, Tensor, Distribution]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    head = Head(draw(V, H).requires_grad_(), draw(V).requires_grad_() if bias else None, scale, softcap)
    reference = Distribution(draw(N, H), Head(draw(V, H), draw(V) if bias else None, scale, softcap))
    labels = torch.randint(V, (N,), generator=generator)
    return draw(N, H).requires_grad_(), head, labels, reference


def gradients(out: dict[str, Tensor], hidden: Tensor, head: Head, names: tuple[str, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    factors = {name: torch.randn(N, generator=generator, dtype=torch.float64) for name in WANT}
    total = sum((out[name] * factors[name]).sum() for name in names)
    inputs = [hidden, head.weight, *([head.bias] if head.bias is not None else [])]
    return list(torch.autograd.grad(total, inputs))


@pytest.mark.parametrize("names", [n for k in (1, 2, 3) for n in itertools.combinations(WANT, k)])
@pytest.mark.parametrize("chunk", [None, 1, 5, 100])
@pytest.mark.parametrize(
    "kind",
    [{}, {"scale": 0.25}, {"softcap": 2.0}, {"bias": True}, {"scale": 3.0, "softcap": 1.5, "bias": True}],
)
def test_equals_plain_torch(kind, chunk, names):
    hidden, head, labels, reference = problem(**kind)
    fast = head_quantities(hidden, head, labels, names, reference, chunk_tokens=chunk)
    slow = reference_head_quantities(hidden, head, labels, names, reference)
    assert list(fast) == list(slow) == list(names)
    for name in names:
        torch.testing.assert_close(fast[name], slow[name], rtol=1e-12, atol=1e-13)
    fast_grads, slow_grads = (gradients(out, hidden, head, names) for out in (fast, slow))
    for a, b in zip(fast_grads, slow_grads):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("chunk", [None, 7])
def test_gradient_of_some_of_the_outputs(chunk):
    """A quantity computed only to be looked at costs nothing and changes nothing in backward."""
    hidden, head, labels, reference = problem(softcap=2.0, bias=True)
    fast = head_quantities(hidden, head, labels, WANT, reference, chunk_tokens=chunk)
    slow = reference_head_quantities(hidden, head, labels, WANT, reference)
    for names in (("logps",), ("kl",), ("entropy",), ("logps", "entropy")):
        a, b = (
            torch.autograd.grad(sum(out[n].sum() for n in names), [hidden, head.weight], retain_graph=True)
            for out in (fast, slow)
        )
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-12)


def test_backward_twice_on_a_retained_graph():
    hidden, head, labels, reference = problem()
    out = head_quantities(hidden, head, labels, WANT, reference)
    total = out["logps"].sum() + 2 * out["kl"].sum()
    first = torch.autograd.grad(total, hidden, retain_graph=True)[0]
    torch.testing.assert_close(torch.autograd.grad(total, hidden)[0], first, rtol=0, atol=0)


def test_gradcheck():
    hidden, head, labels, reference = problem(scale=0.5, softcap=3.0, bias=True)

    def run(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        part = Distribution(reference.hidden[:4], reference.head)
        out = head_quantities(h, Head(w, b, 0.5, 3.0), labels[:4], WANT, part, chunk_tokens=3)
        return tuple(out.values())

    inputs = [t.detach().clone().requires_grad_() for t in (hidden[:4], head.weight, head.bias)]
    assert torch.autograd.gradcheck(run, inputs)


def test_tied_weight_collects_both_gradients():
    """The weight is the embedding too: gradients of both uses add up."""
    _, head, labels, _ = problem()
    inputs = torch.arange(N) % V

    def grad(compute) -> Tensor:
        hidden = torch.tanh(torch.nn.functional.embedding(inputs, head.weight))
        return torch.autograd.grad(compute(hidden, head, labels, ("logps",))["logps"].sum(), head.weight)[0]

    torch.testing.assert_close(grad(head_quantities), grad(reference_head_quantities))


def test_frozen_weight_and_frozen_hidden():
    hidden, head, labels, _ = problem()
    frozen = head_quantities(hidden, head.detach(), labels, ("logps",))["logps"]
    slow = reference_head_quantities(hidden, head.detach(), labels, ("logps",))["logps"]
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), hidden)[0] for x in (frozen, slow)))
    only_weight = head_quantities(hidden.detach(), head, labels, ("logps",), chunk_tokens=4)["logps"]
    slow = reference_head_quantities(hidden.detach(), head, labels, ("logps",))["logps"]
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), head.weight)[0] for x in (only_weight, slow)))


def test_no_gradient_to_the_reference():
    hidden, head, labels, reference = problem()
    live = Distribution(reference.hidden.requires_grad_(), Head(reference.head.weight.requires_grad_()))
    head_quantities(hidden, head, labels, ("kl",), live)["kl"].sum().backward()
    assert live.hidden.grad is None
    assert live.head.weight.grad is None
    assert hidden.grad is not None


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("banned", [-1e4, float("-inf")])
def test_tokens_the_reference_never_says(banned, chunk):
    """q = 0, by underflow or by a bias of -inf: the term is 0 in value and gradient."""
    hidden, head, labels, reference = problem()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[3] = banned
    reference = Distribution(reference.hidden, Head(reference.head.weight, bias))
    fast = head_quantities(hidden, head, labels, ("kl",), reference, chunk_tokens=chunk)["kl"]
    kept = [v for v in range(V) if v != 3]
    logp = torch.log_softmax(hidden @ head.weight.T, -1)
    logq = torch.log_softmax(reference.hidden @ reference.head.weight[kept].T, -1)
    expected = (logq.exp() * (logq - logp[:, kept])).sum(-1)
    torch.testing.assert_close(fast, expected)
    a, b = (torch.autograd.grad(x.sum(), [hidden, head.weight]) for x in (fast, expected))
    torch.testing.assert_close(a, b)


def test_both_ban_a_token():
    hidden, head, labels, reference = problem()
    bias = torch.zeros(V, dtype=torch.float64)
    bias[3] = float("-inf")
    labels = torch.where(labels == 3, 4, labels)
    banned = Head(head.weight, bias), Distribution(reference.hidden, Head(reference.head.weight, bias))
    out = head_quantities(hidden, banned[0], labels, WANT, banned[1])
    slow = reference_head_quantities(hidden, banned[0], labels, WANT, banned[1])
    for name in ("logps", "entropy"):
        torch.testing.assert_close(out[name], slow[name])
    assert torch.isfinite(out["kl"]).all()
    grads = torch.autograd.grad(sum(x.sum() for x in out.values()), [hidden, head.weight])
    assert all(torch.isfinite(g).all() for g in grads)


def test_bfloat16_is_summed_in_float32():
    hidden, head, labels, reference = problem(dtype=torch.bfloat16)
    out = head_quantities(hidden, head, labels, WANT, reference, chunk_tokens=5)
    exact = reference_head_quantities(
        hidden.double(),
        Head(head.weight.double()),
        labels,
        WANT,
        Distribution(reference.hidden.double(), Head(reference.head.weight.double())),
    )
    for name in WANT:
        assert out[name].dtype == torch.float32
        torch.testing.assert_close(out[name].double(), exact[name], rtol=0.02, atol=0.05)
    a, b = (torch.autograd.grad(x["logps"].sum(), [hidden, head.weight]) for x in (out, exact))
    assert a[1].dtype == torch.bfloat16
    for got, expected in zip(a, b):
        torch.testing.assert_close(got.double(), expected.double(), rtol=0.05, atol=0.1)


def test_autocast_multiplies_in_bfloat16():
    hidden, head, labels, reference = problem(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = head_quantities(hidden, head, labels, WANT, reference, chunk_tokens=6)
        slow = reference_head_quantities(hidden, head, labels, WANT, reference)
    for name in WANT:
        assert out[name].dtype == torch.float32
        torch.testing.assert_close(out[name], slow[name], rtol=0.02, atol=0.03)
    exact = reference_head_quantities(hidden, head, labels, WANT, reference)
    assert not torch.equal(out["logps"], exact["logps"])
    a, b = (torch.autograd.grad(x["logps"].sum(), [hidden, head.weight]) for x in (out, exact))
    assert a[1].dtype == torch.float32
    torch.testing.assert_close(a, b, rtol=0.05, atol=0.1)


def test_no_more_than_a_chunk_of_logits(monkeypatch):
    """Without room to keep anything, every `[., V]` buffer has at most a chunk of rows."""
    monkeypatch.setitem(fused.KEEP_BYTES, "cpu", 0)
    monkeypatch.setitem(fused.CHUNK_BYTES, "cpu", 5 * V * 8)
    monkeypatch.setattr(fused, "MIN_CHUNK_TOKENS", 1)
    rows = []
    scratch = fused.Scratch.__init__
    monkeypatch.setattr(fused.Scratch, "__init__", lambda self, n, *rest: (rows.append(n), scratch(self, n, *rest))[1])
    hidden, head, labels, reference = problem()
    out = head_quantities(hidden, head, labels, WANT, reference)
    sum(x.sum() for x in out.values()).backward()
    assert rows == [5, 5]
    slow = reference_head_quantities(hidden, head, labels, WANT, reference)
    torch.testing.assert_close(out, slow)


def test_nothing_is_kept_without_gradients(monkeypatch):
    hidden, head, labels, reference = problem()
    kept = []
    bases = fused._bases
    monkeypatch.setattr(fused, "_bases", lambda *args: (kept.append(args), bases(*args))[1])
    with torch.no_grad():
        head_quantities(hidden, head, labels, WANT, reference)
    assert not kept
    head_quantities(hidden, head, labels, WANT, reference)
    assert len(kept) == 1


def test_no_tokens():
    hidden, head, labels, reference = problem()
    none = Distribution(reference.hidden[:0], reference.head)
    out = head_quantities(hidden[:0], head, labels[:0], WANT, none)
    sum(x.sum() for x in out.values()).backward()
    assert head.weight.grad is not None
    assert not head.weight.grad.any()


def test_softmax_may_overwrite_its_input():
    """The CPU path relies on it."""
    logits = torch.randn(7, 4099) * 20
    for operation in (torch.softmax, torch.log_softmax):
        expected, inplace = operation(logits, -1), logits.clone()
        operation(inplace, -1, out=inplace)
        assert torch.equal(inplace, expected)


def test_errors_name_what_differs():
    hidden, head, labels, reference = problem()
    with pytest.raises(ModelError, match="needs the reference's distribution, got none"):
        head_quantities(hidden, head, labels, ("kl",))
    other = Distribution(reference.hidden, Head(torch.zeros(V + 1, H)))
    with pytest.raises(ModelError, match=f"got {V + 1}, expected {V}"):
        head_quantities(hidden, head, labels, ("kl",), other)
    short = Distribution(reference.hidden[1:], reference.head)
    with pytest.raises(ModelError, match=f"got {N - 1} tokens, expected {N}"):
        head_quantities(hidden, head, labels, ("kl",), short)


@pytest.mark.parametrize("kind", [{}, {"scale": 3.0, "softcap": 1.5, "bias": True}])
def test_a_temperature_divides_the_logits(kind):
    hidden, head, labels, _ = problem(**kind)
    hot = head_quantities(hidden, head.tempered(0.7), labels, ("logps", "entropy"))
    logps = torch.log_softmax(head.logits(hidden) / 0.7, -1)
    torch.testing.assert_close(hot["logps"], logps.gather(1, labels[:, None])[:, 0], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(hot["entropy"], -(logps.exp() * logps).sum(-1), rtol=1e-12, atol=1e-13)
