"""GAE against the recursion written out, its limits, and whitening."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.methods._shaping import Moments
from tokengrain.methods.ppo import gae, whiten

F64 = torch.float64
LENGTHS = [5, 0, 1, 17, 2, 8]


def _random(n: int, seed: int) -> Tensor:
    return torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def segments() -> Segments:
    return Segments.from_lengths(LENGTHS)


def _slow(rewards: Tensor, values: Tensor, segments: Segments, gamma: float, lam: float) -> Tensor:
    out = []
    for r, v in zip(segments.split(rewards), segments.split(values), strict=True):
        running, row = 0.0, []
        for t in reversed(range(len(r))):
            following = v[t + 1] if t + 1 < len(r) else 0.0
            running = r[t] + gamma * following - v[t] + gamma * lam * running
            row.append(running)
        out += row[::-1]
    return torch.stack(out)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 0.5)])
def test_equals_the_recursion(segments: Segments, gamma: float, lam: float) -> None:
    r, v = _random(segments.total, 0), _random(segments.total, 1)
    found = gae(r, segments, values=v, gamma=gamma, lam=lam)
    torch.testing.assert_close(found.advantages, _slow(r, v, segments, gamma, lam), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.returns, found.advantages + v)


def test_lambda_1_forgets_the_critic_and_lambda_0_is_the_one_step_error(segments: Segments) -> None:
    r, v = _random(segments.total, 0), _random(segments.total, 1)
    to_go = torch.cat([part.flip(0).cumsum(0).flip(0) for part in segments.split(r)])
    torch.testing.assert_close(gae(r, segments, values=v, lam=1.0).returns, to_go)
    torch.testing.assert_close(gae(r, segments, lam=1.0).advantages, to_go)
    following = torch.cat([torch.cat([part[1:], part.new_zeros(min(len(part), 1))]) for part in segments.split(v)])
    torch.testing.assert_close(gae(r, segments, values=v, lam=0.0).advantages, r + following - v)


def test_completions_do_not_see_each_other() -> None:
    both, one = Segments.from_lengths([3, 4]), Segments.from_lengths([3])
    r, v = _random(7, 0), _random(7, 1)
    r[3:] = torch.nan
    torch.testing.assert_close(
        gae(r, both, values=v).advantages[:3], gae(r[:3], one, values=v[:3]).advantages, rtol=0, atol=0
    )


def test_long_completions_lose_no_digits() -> None:
    from scipy.signal import lfilter

    n = 3001
    r, segments = _random(n, 2), Segments.from_lengths([n])
    expected = lfilter([1], [1, -0.999], r.flip(0).numpy())[::-1].copy()
    torch.testing.assert_close(
        gae(r, segments, lam=0.999).advantages, torch.from_numpy(expected), rtol=1e-11, atol=1e-9
    )


def test_types_and_gradients() -> None:
    segments = Segments.from_lengths([4])
    r = _random(4, 0).float().requires_grad_()
    found = gae(r, segments, values=_random(4, 1).bfloat16().requires_grad_())
    assert found.advantages.dtype == found.returns.dtype == torch.float32
    assert not found.advantages.requires_grad
    assert not found.returns.requires_grad
    assert gae(r[:0], Segments.from_lengths([0, 0])).advantages.shape == (0,)


@pytest.mark.parametrize("wrong", [{"gamma": 1.1}, {"lam": -0.1}, {"values": torch.zeros(3)}])
def test_refusals(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        gae(torch.zeros(4), Segments.from_lengths([4]), **wrong)


def test_whitening() -> None:
    a = 3 * _random(40, 3) + 7
    white = whiten(a)
    assert white.mean().item() == pytest.approx(0, abs=1e-12)
    assert white.var(correction=0).item() == pytest.approx(1)
    torch.testing.assert_close(whiten(2 * a - 5), white)
    torch.testing.assert_close(
        torch.cat([whiten(p, Moments.of(p1) + Moments.of(p2)) for p, p1, p2 in _ranks(a)]), white
    )
    assert torch.equal(whiten(torch.full((5,), 0.3)), torch.zeros(5))
    assert not whiten(a.requires_grad_()).requires_grad


def _ranks(a: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    first, second = a[:13], a[13:]
    return [(first, first, second), (second, first, second)]


def test_nearly_constant_advantages_are_not_blown_up() -> None:
    a = 1e-6 * _random(10, 4)
    torch.testing.assert_close(whiten(a), (a - a.mean()) / 1e-4)
