"""Scaling of token scores, KL penalties, EOS rescoring and advantages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.methods._clipped import sampled_kl
from tokengrain.methods._shaping import Moments, scale_scores
from tokengrain.methods.ppo import rescored

F64 = torch.float64


@pytest.fixture
def z() -> Tensor:
    return 20 * torch.randn(31, dtype=F64, generator=torch.Generator().manual_seed(0)) + 5


def test_std_ignores_a_factor_and_zscore_any_positive_affine_map(z: Tensor) -> None:
    torch.testing.assert_close(scale_scores(3.5 * z), scale_scores(z))
    assert not torch.allclose(scale_scores(z + 4), scale_scores(z))
    torch.testing.assert_close(scale_scores(3.5 * z - 40, "zscore"), scale_scores(z, "zscore"))


def test_what_each_scaling_is(z: Tensor) -> None:
    torch.testing.assert_close(scale_scores(z), z / z.std(correction=0))
    scaled = scale_scores(z, "zscore")
    assert scaled.mean().item() == pytest.approx(0, abs=1e-12)
    assert scaled.var(correction=0).item() == pytest.approx(1)
    torch.testing.assert_close(scale_scores(z, "centre"), z - z.mean())
    assert torch.equal(scale_scores(z, "none"), z)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [0.0, 0.1, -7.3, 1e6])
def test_scores_that_do_not_vary(value: float, dtype: torch.dtype) -> None:
    z = torch.full((7,), value, dtype=dtype)
    assert torch.equal(scale_scores(z), z)
    assert torch.equal(scale_scores(z, "zscore"), torch.zeros_like(z))
    assert scale_scores(z[:0]).numel() == scale_scores(z[:0], "zscore").numel() == 0


def test_moments_of_parts_add_up(z: Tensor) -> None:
    whole = Moments.of(z)
    assert whole.mean == pytest.approx(z.mean().item())
    assert whole.std == pytest.approx(z.std(correction=0).item())
    parts = Moments.of(z[:4]) + Moments.of(z[4:4]) + Moments.of(z[4:]) + Moments()
    assert (parts.count, parts.mean, parts.squares) == pytest.approx((31, whole.mean, whole.squares))
    assert (Moments() + Moments()).std == 0
    torch.testing.assert_close(
        torch.cat([scale_scores(p, "zscore", whole) for p in z.split(10)]), scale_scores(z, "zscore")
    )


def test_moments_far_from_zero_keep_their_digits() -> None:
    values = torch.tensor([1e8, 1e8 + 1, 1e8 + 2], dtype=F64)
    assert Moments.of(values).std == pytest.approx((2 / 3) ** 0.5, rel=1e-12)
    assert (Moments.of(values[:1]) + Moments.of(values[1:])).std == pytest.approx((2 / 3) ** 0.5, rel=1e-7)


def test_sampled_kl_forms() -> None:
    """Averaged over all tokens with the policy's probabilities, k1 and k3 are the KL divergence itself."""
    logp, logq = (torch.log_softmax(torch.randn(9, dtype=F64), 0) for _ in range(2))
    p = logp.exp()
    kl = (p * (logp - logq)).sum()
    for form in ("k1", "k3"):
        torch.testing.assert_close((p * sampled_kl(logp, logq, form)).sum(), kl)
    assert bool((sampled_kl(logp, logq, "k3") >= 0).all())
    torch.testing.assert_close(sampled_kl(logp, logq, "abs"), (logp - logq).abs())
    torch.testing.assert_close(sampled_kl(logp, logq, "k2"), (logp - logq) ** 2 / 2)


def test_last_tokens_get_the_mean() -> None:
    segments = Segments.from_lengths([3, 0, 1, 2])
    rewards = torch.tensor([1.0, 2.0, 6.0, 5.0, 4.0, 0.0])
    assert rescored(rewards, segments).tolist() == [1, 2, 3, 5, 4, 2]


def test_everything_is_data(z: Tensor) -> None:
    z = z.requires_grad_()
    segments = Segments.from_lengths([31])
    results = [
        scale_scores(z),
        scale_scores(z, "none"),
        sampled_kl(z, z),
        rescored(z, segments),
    ]
    assert not any(r.requires_grad for r in [*results])
