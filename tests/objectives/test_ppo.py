"""The clipped value loss, and PPO's policy gradient where it is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.objectives.rollouts import F64, Rollouts, rollouts
from tokengrain.batch import Segments
from tokengrain.methods.ppo import ppo_policy_loss, value_loss


def _critic(x: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    old, returns, step = (torch.randn(x.segments.total, dtype=F64, generator=generator) for _ in range(3))
    return (old + 0.4 * step).requires_grad_(), old, returns


def test_clipped_value_loss_is_the_larger_error() -> None:
    x = rollouts((6, 3, 1, 8))
    V, old, R = _critic(x)
    output = value_loss(V, x.segments, returns=R, old_values=old, clip_range=0.2, weight=0.5, reduction="mean")
    clipped = old + torch.clamp(V - old, -0.2, 0.2)
    larger = torch.maximum((V - R) ** 2, (clipped - R) ** 2)
    torch.testing.assert_close(output.losses, torch.stack([0.5 * part.mean() for part in x.segments.split(larger)]))
    wins = ((V - old).abs() > 0.2) & ((clipped - R) ** 2 > (V - R) ** 2)
    assert 0 < int(wins.sum()) < len(V)
    gradient = torch.autograd.grad(output.losses.sum(), V)[0]
    assert (gradient[wins] == 0).all()
    plain = torch.autograd.grad(value_loss(V, x.segments, returns=R, weight=0.5, reduction="mean").losses.sum(), V)[0]
    torch.testing.assert_close(gradient[~wins], plain[~wins])
    torch.testing.assert_close(output.metrics["values/clipped"], x.segments.mean(wins.to(F64)))


def test_without_a_range_old_values_do_not_matter() -> None:
    x = rollouts()
    V, old, R = _critic(x)
    a, b = (value_loss(V, x.segments, returns=R, old_values=o).losses for o in (None, old))
    assert torch.equal(a, b)
    assert torch.equal(value_loss(V, x.segments, returns=R, old_values=V, clip_range=0.2).losses, a)
    with pytest.raises(ValueError, match="old_values"):
        value_loss(V, x.segments, returns=R, clip_range=0.2)


def test_on_policy_gradient_is_the_advantage_over_length_and_completions() -> None:
    x = rollouts()
    output = ppo_policy_loss(x.old_logps.requires_grad_(), x.segments, old_logps=x.old_logps.detach(),
                             advantages=x.advantages, reduction="mean")  # fmt: skip
    gradient = torch.autograd.grad(x.normalised(output), x.old_logps)[0]
    lengths = x.segments.broadcast(x.segments.lengths)
    torch.testing.assert_close(gradient, -x.advantages / lengths / len(x.segments))


def test_gradient_is_exactly_zero_where_the_clip_acts() -> None:
    segments = Segments.from_lengths([4])
    logps = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=F64, requires_grad=True)
    A = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=F64)
    output = ppo_policy_loss(logps, segments, old_logps=torch.zeros(4, dtype=F64), advantages=A, reduction="mean")
    gradient = torch.autograd.grad(output.losses.sum(), logps)[0]
    assert gradient[:2].tolist() == [0.0, 0.0]
    assert (gradient[2:] != 0).all()
