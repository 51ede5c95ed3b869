"""GSPO: the sequence form as slow twin, and the identities of the spec."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.rollouts import F64, Rollouts, plain_token_loss, rollouts, rows
from tokengrain.batch import Segments
from tokengrain.loss import LossOutput
from tokengrain.methods._clipped import sequence_log_ratio
from tokengrain.methods.grpo import grpo_loss
from tokengrain.methods.gspo import gspo_loss


def _loss(x: Rollouts, **settings: Any) -> LossOutput:
    return gspo_loss(x.logps, x.segments, old_logps=x.old_logps, advantages=x.advantages, **settings)


def _ratios(x: Rollouts) -> Tensor:
    return rows(x, x.logps - x.old_logps, torch.mean).exp()


@pytest.mark.parametrize("bounds", [(3e-4, 4e-4), (0.1, 0.2), (1.0, 9.0)])
def test_one_advantage_per_completion_is_the_sequence_form(bounds: tuple[float, float]) -> None:
    x = rollouts((4, 2, 1, 5, 3, 6))
    A = torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0], dtype=F64)
    x.advantages = x.segments.broadcast(A)
    s, (low, high) = _ratios(x), bounds
    sequence = -torch.minimum(s * A, s.clamp(1 - low, 1 + high) * A)  # equation 5
    output = _loss(x, epsilon=low, epsilon_high=high)
    torch.testing.assert_close(output.losses, sequence, rtol=1e-12, atol=1e-12)
    grad = x.gradient(x.normalised(output))
    torch.testing.assert_close(grad, x.gradient(sequence.mean()), rtol=1e-12, atol=1e-12)


def test_token_advantages_are_clipped_by_their_own_sign() -> None:
    x = rollouts((4, 5))
    s = x.segments.broadcast(_ratios(x).detach())
    tokens = plain_token_loss(x, 0.97, 1.03, ratio=s * torch.exp(x.logps - x.logps.detach()))  # equation 13
    output = _loss(x, epsilon=0.03, epsilon_high=0.03)
    expected = rows(x, tokens, torch.mean).mean()
    torch.testing.assert_close(x.normalised(output), expected)
    torch.testing.assert_close(x.gradient(x.normalised(output)), x.gradient(expected))
    assert len(set(output.tokens["clipped"][:4].tolist())) > 1  # one ratio, signs of A decide


def test_completions_of_one_token_are_grpo() -> None:
    x = rollouts((1, 1, 1, 1))
    grpo = grpo_loss(x.logps, x.segments, old_logps=x.old_logps, advantages=x.advantages)
    gspo = _loss(x, epsilon=0.2, epsilon_high=0.2)
    torch.testing.assert_close(gspo.losses, grpo.losses)
    torch.testing.assert_close(x.gradient(gspo.losses.sum()), x.gradient(grpo.losses.sum()))


def test_the_ratio_is_a_mean_of_logs() -> None:
    x = rollouts((4, 2, 1, 5))
    log_s = rows(x, sequence_log_ratio(x.logps, x.old_logps, x.segments), torch.mean)
    assert (log_s.abs() <= x.segments.max((x.logps - x.old_logps).abs())).all()
    order = torch.cat([torch.randperm(n) + start for n, start in zip((4, 2, 1, 5), (0, 4, 6, 7), strict=True)])
    permuted = rows(x, sequence_log_ratio(x.logps[order], x.old_logps[order], x.segments), torch.mean)
    torch.testing.assert_close(permuted, log_s)
    twice = Segments.from_lengths([8, 4, 2, 10])
    again = sequence_log_ratio(x.logps.repeat_interleave(2), x.old_logps.repeat_interleave(2), twice)
    torch.testing.assert_close(twice.mean(again), log_s)


def test_opposite_log_ratios_cancel() -> None:
    zero = torch.zeros(2, dtype=F64)
    logps = torch.tensor([50.0, -50.0], dtype=F64, requires_grad=True)
    output = gspo_loss(logps, Segments.from_lengths([2]), old_logps=zero, advantages=zero + 1)
    assert output.losses.tolist() == [-1.0]
    (grad,) = torch.autograd.grad(output.losses.sum(), logps)
    assert grad.tolist() == [-0.5, -0.5]


def test_one_stale_token_drops_the_completion_where_grpo_drops_the_token() -> None:
    old = torch.full((50,), -2.0, dtype=F64)
    logps = old.clone()
    logps[7] += 3
    logps.requires_grad_()
    segments, A = Segments.from_lengths([50]), torch.ones(50, dtype=F64)
    grpo = grpo_loss(logps, segments, old_logps=old, advantages=A)
    gspo = gspo_loss(logps, segments, old_logps=old, advantages=A)
    grads = [torch.autograd.grad(o.losses.sum(), logps)[0] for o in (grpo, gspo)]
    assert (grads[0] == 0).nonzero().tolist() == [[7]]
    assert (grads[1] == 0).all()
    assert float(gspo.metrics["clip/high"]) == 1


def test_kl_and_empty_completions() -> None:
    x = rollouts((3, 0, 2))
    output = _loss(x, ref_logps=x.ref_logps, beta=0.2)
    d = x.ref_logps - x.logps
    expected = _loss(x).losses + 0.2 * x.segments.mean(d.exp() - d - 1)
    torch.testing.assert_close(output.losses, expected)
    assert output.losses[1] == 0
