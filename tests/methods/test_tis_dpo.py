"""TIS-DPO against numbers worked out by hand from the formula, float64; its limits; its recipe's credit in nats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import tokengrain
from tokengrain import Segments
from tokengrain.errors import RecipeError
from tokengrain.methods.dpo import dpo_loss
from tokengrain.methods.tis_dpo import tis_dpo_loss

SEGMENTS = Segments.from_lengths([4, 3])
LOGPS = [-1.2, -0.5, -2.0, -0.3, -0.9, -1.6, -0.4]
REFERENCE = [-1.0, -0.8, -2.5, -0.35, -0.7, -1.1, -0.6]
GOOD = [-0.9, -0.4, -1.0, -0.5, -1.4, -2.6, -0.2]
BAD = [-1.1, -1.3, -3.0, -0.2, -0.6, -0.5, -1.9]
# r = 0.2 0.9 2.0 -0.3 | -0.8 -2.1 1.7: two tokens above the upper bound, two below the lower one
WEIGHTS = [math.exp(x) for x in (0.2, 0.9, 1.5, -0.3, 0.5, 0.5, -1.5)]


def double(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def run(**settings: float) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Loss, gradient and metrics of the one pair."""
    logps = double(LOGPS).requires_grad_()
    found = tis_dpo_loss(
        logps, SEGMENTS, ref_logps=double(REFERENCE), token_rewards=double(GOOD) - double(BAD), **settings
    )
    (gradient,) = torch.autograd.grad(found.losses.sum(), logps)
    return found.losses.detach(), gradient, found.metrics


def test_loss_and_gradient_by_hand() -> None:
    losses, gradient, metrics = run()
    ratios = [p - q for p, q in zip(LOGPS, REFERENCE, strict=True)]
    margin = 0.1 * sum(w * d * s for w, d, s in zip(WEIGHTS, ratios, [1] * 4 + [-1] * 3, strict=True))
    assert margin == pytest.approx(0.3880964685378573, abs=1e-15)
    assert losses.item() == pytest.approx(0.5178093214661041, abs=1e-15)
    assert metrics["weighted/margins"].item() == pytest.approx(margin, abs=1e-15)
    slope = 0.1 / (1 + math.exp(margin))
    expected = double([-slope * w for w in WEIGHTS[:4]] + [slope * w for w in WEIGHTS[4:]])
    torch.testing.assert_close(gradient, expected, atol=1e-15, rtol=0)
    assert gradient[0].item() == pytest.approx(-0.04936612182845788, abs=1e-15)
    assert metrics["weights/clamped"].item() == pytest.approx((1 / 4 + 1) / 2)


def test_k_is_a_factor_of_beta() -> None:
    assert run(k=2.0)[0].item() == pytest.approx(0.3785422644084726, abs=1e-15)
    torch.testing.assert_close(run(k=2.0)[1], run(beta=0.2)[1], atol=1e-16, rtol=0)


@pytest.mark.parametrize("settings", [{"mu": 0.0}, {"lower": 0.0, "upper": 0.0}], ids=str)
def test_without_weights_it_is_dpo(settings: dict[str, float]) -> None:
    losses, gradient, _ = run(**settings)
    logps = double(LOGPS).requires_grad_()
    plain = dpo_loss(logps, SEGMENTS, ref_logps=double(REFERENCE), beta=0.1).losses
    assert losses.item() == plain.item() == pytest.approx(0.6372993954215309, abs=1e-15)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), logps)[0])


def test_gradients_are_those_of_finite_differences() -> None:
    def loss(logps: Tensor) -> Tensor:
        rewards = double(GOOD) - double(BAD)
        return tis_dpo_loss(logps, SEGMENTS, ref_logps=double(REFERENCE), token_rewards=rewards).losses.sum()

    assert torch.autograd.gradcheck(loss, (double(LOGPS).requires_grad_(),))


def test_no_gradient_reaches_the_credit() -> None:
    rewards = (double(GOOD) - double(BAD)).requires_grad_()
    found = tis_dpo_loss(double(LOGPS), SEGMENTS, ref_logps=double(REFERENCE), token_rewards=rewards)
    assert not found.losses.requires_grad


def test_bounds_in_the_wrong_order_are_an_error() -> None:
    with pytest.raises(RecipeError, match="lower must not be above upper, got lower"):
        tokengrain.make_objective("tis_dpo", lower=2.0)


def test_the_recipe_gives_credit_in_nats() -> None:
    stages = tokengrain.load_recipe("tis_dpo").stages
    assert stages["credit"].credit["beta"] == 1.0
