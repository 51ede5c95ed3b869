"""DCPO's dynamic bounds and loss: the plain form as slow twin, and the properties of the spec."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.objectives.rollouts import F64, Rollouts, plain_token_loss, rollouts, rows
from tokengrain.batch import Segments
from tokengrain.loss import LossOutput
from tokengrain.methods.dcpo import dcpo_bounds, dcpo_loss
from tokengrain.methods.grpo import grpo_loss

Q = torch.linspace(1e-3, 1, 2000, dtype=F64)


def _loss(x: Rollouts, **settings: Any) -> LossOutput:
    return dcpo_loss(x.logps, x.segments, old_logps=x.old_logps, advantages=x.advantages, **settings)


def test_bounds_solve_their_equation() -> None:
    low, high = dcpo_bounds(Q.log(), 0.16, 0.2)
    real = Q > 4 * 0.16
    torch.testing.assert_close(((low - 1) * low * Q)[real], torch.full_like(Q[real], -0.16))
    assert (low[~real] == 0.5).all()
    free = high < 10
    torch.testing.assert_close(((high - 1) * high * Q)[free], torch.full_like(Q[free], 0.2))
    assert torch.equal(free, Q > 0.8 / 360)  # where the cap of 10 starts
    assert (low.diff() >= 0).all()
    assert (high.diff() <= 0).all()


def test_bounds_at_the_ends() -> None:
    low, high = dcpo_bounds(torch.zeros(1, dtype=F64))
    assert float(low) == pytest.approx(0.8)
    assert float(high) == pytest.approx(0.5 + 0.5 * 1.8**0.5)
    low, high = dcpo_bounds(Q.log(), 0.0, 0.0)
    assert (low == 1).all()
    assert (high == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_improbable_tokens_have_the_limits(dtype: torch.dtype) -> None:
    low, high = dcpo_bounds(torch.tensor([-85.0, -200.0, -1e4, float("-inf")], dtype=dtype))
    assert low.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert low.tolist() == [0.5] * 4
    assert high.tolist() == [10.0] * 4


def test_every_token_it_clips_is_clipped_by_grpo_too() -> None:
    low, high = dcpo_bounds(Q.log(), 0.16, 0.2)
    assert (low <= 0.8 + 1e-12).all()
    assert (high >= torch.minimum(torch.tensor(1.2), 1 / Q) - 1e-12).all()
    x = rollouts((60, 40), spread=0.5)
    # A probability above 1 cannot be reached by an update.
    x.logps = x.logps.detach().clamp(max=0).requires_grad_()
    grpo = grpo_loss(x.logps, x.segments, old_logps=x.old_logps, advantages=x.advantages).tokens["clipped"]
    dcpo = _loss(x).tokens["clipped"]
    assert (grpo[dcpo != 0] == dcpo[dcpo != 0]).all()
    assert 0 < int((dcpo != 0).sum()) < int((grpo != 0).sum())


def test_equals_the_plain_form_in_value_and_gradient() -> None:
    x = rollouts((6, 3, 1, 8), spread=1.0)
    # One ratio beyond the cap with a negative advantage, one far below.
    with torch.no_grad():
        x.logps[:2] = x.old_logps[:2] + torch.tensor([3.0, -3.0], dtype=F64)
        x.advantages[:2] = -1.0
    q = x.old_logps.exp()
    low = 0.5 + 0.5 * torch.sqrt((1 - 4 * 0.16 / q).clamp(min=0))
    high = torch.minimum(0.5 + 0.5 * torch.sqrt(1 + 4 * 0.2 / q), torch.tensor(10.0, dtype=F64))
    tokens = plain_token_loss(x, low, high, cap=10.0)
    output = _loss(x)
    torch.testing.assert_close(output.tokens["loss"], tokens.detach())
    expected = rows(x, tokens, torch.mean).sum() / 2  # equation 8, mean over the two prompts
    loss = x.normalised(output, "prompt_mean")
    torch.testing.assert_close(loss, expected)
    grad = x.gradient(loss)
    torch.testing.assert_close(grad, x.gradient(expected))
    r, A = torch.exp(x.logps - x.old_logps).detach(), x.advantages
    outside = ((A > 0) & (r > high)) | ((A < 0) & ((r < low) | (r > 10)))
    assert torch.equal(grad == 0, outside)
    assert 2 <= int(outside.sum()) < len(A)


def test_on_policy() -> None:
    x = rollouts(spread=0.0)
    loss = x.normalised(_loss(x), "prompt_mean")
    torch.testing.assert_close(loss, -x.segments.mean(x.advantages).sum() / 2)
    lengths = x.segments.broadcast(x.segments.lengths)
    torch.testing.assert_close(x.gradient(loss), -x.advantages / lengths / 2)


def test_extremes_are_finite() -> None:
    old = torch.tensor([-100.0, -1e-9, -100.0, -1e-9])
    logps = torch.tensor([-1e-9, -100.0, -1e-9, -100.0], requires_grad=True)
    A = torch.tensor([1.0, 1.0, -1.0, -1.0])
    output = dcpo_loss(logps, Segments.from_lengths([4]), old_logps=old, advantages=A)
    torch.testing.assert_close(output.tokens["loss"], torch.tensor([-10.0, 0.0, 10.0, 0.8]))
    (grad,) = torch.autograd.grad(output.losses.sum(), logps)
    assert torch.isfinite(grad).all()
    with pytest.raises(ValueError, match="ratio_max must be above 1"):
        dcpo_loss(logps, Segments.from_lengths([4]), old_logps=old, advantages=A, ratio_max=1.0)
