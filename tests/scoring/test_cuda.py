"""What only a CUDA device can show; `bash benchmarks/gpu.sh` runs it. The CPU case keeps the helper honest."""

import pytest
import torch

from tests.scoring.models import batch_of, reference_head_quantities, standard_batch, tiny
from tokengrain.scoring.fused import head_quantities
from tokengrain.scoring.head import Distribution, Head, Teacher
from tokengrain.scoring.prepare import prepare
from tokengrain.scoring.score import distribution_of, score

WANT = ("logps", "entropy", "kl")
# FlexAttention wants heads of at least 16.
WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 32}


def outcome(model, ref, batch, layout):
    """Values, and gradients of a fixed combination of them, on the CPU in float64."""
    model.zero_grad()
    prepare(model, layout=layout)
    scores = score(model, batch, WANT, reference=distribution_of(ref, batch))
    weights = torch.linspace(-1.0, 1.0, batch.segments.total, device=batch.device)
    (sum(getattr(scores, name) for name in WANT) * weights).sum().backward()
    values = {name: getattr(scores, name).detach().cpu().double() for name in WANT}
    return values, {n: p.grad.cpu().double() for n, p in model.named_parameters() if p.grad is not None}


def check_device(name, device, attention, batch, tolerance):
    """Packed or shared rows on `device` in float32 against separate rows on the CPU in float64."""
    model, ref = tiny(name, **WIDE).eval(), tiny(name, **WIDE, initializer_range=0.2).eval()
    expected, expected_grads = outcome(model, ref, batch, "separate")
    for each in (model, ref):
        each.to(device, torch.float32).set_attn_implementation(attention)
    values, grads = outcome(model, ref, batch.to(device), "shared")
    for key in WANT:
        torch.testing.assert_close(values[key], expected[key], rtol=0, atol=tolerance)
    scale = max(float(g.abs().max()) for g in expected_grads.values())
    for key, grad in expected_grads.items():
        assert float((grads[key] - grad).abs().max()) <= 5 * tolerance * scale, key


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_the_comparison_itself_on_cpu(name):
    check_device(name, "cpu", "sdpa", standard_batch(), 1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral", "gemma3_text"])
def test_rows_on_cuda_equal_separate_rows_on_cpu(name, attention):
    torch.backends.cuda.matmul.allow_tf32 = False
    check_device(name, "cuda", attention, standard_batch(), 1e-4)


@pytest.mark.cuda
def test_packed_rows_of_many_prompts():
    batch = batch_of(*[(7 + i % 5, (3 + i % 4, 6)) for i in range(40)])
    torch.backends.cuda.matmul.allow_tf32 = False
    check_device("llama", "cuda", "flex_attention", batch, 1e-4)


@pytest.mark.cuda
def test_bf16_stays_near_float32():
    batch = standard_batch().to("cuda")
    model = tiny("llama", dtype=torch.float32, **WIDE).cuda().eval()
    exact = score(model, batch).logps
    with torch.autocast("cuda", torch.bfloat16):
        rough = score(model, batch).logps
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.05, atol=0.1)


@pytest.mark.cuda
def test_the_fused_head_never_holds_all_logits():
    tokens, vocabulary, hidden = 4096, 128_256, 512
    h = torch.randn(tokens, hidden, device="cuda", requires_grad=True)
    weight = torch.randn(vocabulary, hidden, device="cuda", requires_grad=True)
    reference = Distribution(torch.randn_like(h).detach(), Head(weight.detach().clone()))
    labels = torch.randint(vocabulary, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = head_quantities(h, Head(weight), labels, ("logps", "kl"), reference)
    (out["logps"] + out["kl"]).sum().backward()
    gradients = h.numel() * 4 + weight.numel() * 4
    peak = torch.cuda.max_memory_allocated() - before - gradients
    assert peak < tokens * vocabulary * 4, f"{peak / 2**20:.0f} MiB"


@pytest.mark.cuda
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_the_kl_to_a_teacher_never_holds_all_logits(weights):
    """Student, target and contrast in chunks: a quarter of the ten `[N, V]` tensors a plain version holds."""
    tokens, vocabulary, hidden = 4096, 128_256, 512
    torch.backends.cuda.matmul.allow_tf32 = False
    h = torch.randn(tokens, hidden, device="cuda", dtype=weights, requires_grad=True)
    weight = (torch.randn(vocabulary, hidden, device="cuda", dtype=weights) / 20).requires_grad_()
    near = [weight.detach() + torch.randn_like(weight) / 200 for _ in range(2)]
    teacher = Teacher(*(Distribution(h.detach(), Head(w)) for w in near), slope=20.0, offset=1e-3)
    labels = torch.randint(vocabulary, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = head_quantities(h, Head(weight), labels, ("logps", "teacher_kl"), None, teacher)
    out["teacher_kl"].sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 2.5 * tokens * vocabulary * 4, f"{peak / 2**20:.0f} MiB"
    few = slice(64)
    slow = reference_head_quantities(
        h[few].double(), Head(weight.double()), labels[few], ("teacher_kl",), None,
        teacher.map(lambda d: Distribution(d.hidden[few].double(), Head(d.head.weight.double()))),
    )  # fmt: skip
    for name in ("tvd", "teacher_alpha", "teacher_reward"):
        torch.testing.assert_close(out[name][few].double(), slow[name], rtol=1e-4, atol=1e-4)
