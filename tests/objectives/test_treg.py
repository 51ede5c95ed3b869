"""Identities of the T-REG spec, section 7, float64; T-REG and TGDPO as one token-weighted core."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.objectives.examples import F64, Example, example, finite_difference, gradient, mean_loss
from tokengrain.loss import LossOutput, token_weights
from tokengrain.methods.dpo import dpo_loss
from tokengrain.methods.simpo import simpo_loss
from tokengrain.methods.tgdpo import tgdpo_loss
from tokengrain.methods.treg import contrastive_token_rewards, treg_loss, treg_simpo_loss

BASES = ("dpo", "simpo")


def _treg(base: str, x: Example, logps: Tensor, rewards: Tensor | None = None, **hyper: object) -> LossOutput:
    r = x.token_rewards if rewards is None else rewards
    if base == "dpo":
        return treg_loss(logps, x.segments, ref_logps=x.ref_logps, token_rewards=r, beta=0.3, **hyper)  # type: ignore[arg-type]
    return treg_simpo_loss(logps, x.segments, token_rewards=r, beta=2.0, gamma=0.6, **hyper)  # type: ignore[arg-type]


def _base(base: str, x: Example, logps: Tensor) -> LossOutput:
    if base == "dpo":
        return dpo_loss(logps, x.segments, ref_logps=x.ref_logps, beta=0.3)
    return simpo_loss(logps, x.segments, beta=2.0, gamma=0.6)


def _scale(base: str, x: Example) -> Tensor:
    """Implicit reward per nat, `[C]`."""
    return torch.full((6,), 0.3, dtype=F64) if base == "dpo" else 2.0 / x.segments.lengths.to(F64)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("case", ["alpha 0", "better equals worse"])
def test_no_credit_is_the_base_method_exactly(base: str, case: str) -> None:
    x = example()
    alpha = 0.0 if case == "alpha 0" else 0.5
    r = x.token_rewards if alpha == 0 else contrastive_token_rewards(x.ref_logps, x.ref_logps)
    treg, plain = _treg(base, x, x.logps, r, alpha=alpha), _base(base, x, x.logps)
    assert torch.equal(treg.losses, plain.losses)
    for key, value in plain.metrics.items():
        assert torch.equal(treg.metrics[key], value), key
    a = gradient(lambda p: mean_loss(_treg(base, x, p, r, alpha=alpha), x.segments), x.logps)
    b = gradient(lambda p: mean_loss(_base(base, x, p), x.segments), x.logps)
    torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("base", BASES)
def test_loss_by_the_formula(base: str) -> None:
    x, alpha = example(), 0.4
    output, plain = _treg(base, x, x.logps, alpha=alpha), _base(base, x, x.logps)
    R = -_scale(base, x) * x.segments.sum(x.token_rewards * x.logps)
    gamma = 0.0 if base == "dpo" else 0.6
    w = torch.sigmoid(gamma - plain.metrics["rewards/margins"])
    torch.testing.assert_close(output.losses, plain.losses + alpha * w * (R[0::2] + R[1::2]))
    torch.testing.assert_close(output.metrics["sequence_weights"], w)
    torch.testing.assert_close(output.metrics["loss/base"], plain.losses)
    torch.testing.assert_close(output.metrics["loss/regulariser"], output.losses - plain.losses)
    torch.testing.assert_close(output.metrics["regulariser/chosen"], R[0::2])


@pytest.mark.parametrize("base", BASES)
def test_gradient_is_the_base_gradient_with_token_weights(base: str) -> None:
    x, alpha = example(), 0.4
    output = _treg(base, x, x.logps, alpha=alpha)
    sign = torch.where(x.segments.is_chosen, 1.0, -1.0).to(F64)
    w = x.segments.broadcast(output.metrics["sequence_weights"].repeat_interleave(2))
    c = x.segments.broadcast(_scale(base, x)) * w / x.pairs
    expected = -c * sign * (1 + alpha * sign * x.token_rewards)
    grad = gradient(lambda p: mean_loss(_treg(base, x, p, alpha=alpha), x.segments), x.logps)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("base", BASES)
def test_sequence_weight_is_detached(base: str) -> None:
    """Finite differences with w frozen match the gradient, with w moving they must not."""
    x = example()

    def loss(logps: Tensor, w: Tensor | None = None) -> Tensor:
        if w is None:
            return mean_loss(_treg(base, x, logps, alpha=0.5), x.segments)
        # The base with w frozen: base + w * alpha (R_w + R_l), by linearity from static weights of 0 and 1.
        zero, one = (_treg(base, x, logps, alpha=0.5, sequence_weight=s).losses for s in (0.0, 1.0))
        return (zero + w * (one - zero)).mean()

    w = _treg(base, x, x.logps, alpha=0.5).metrics["sequence_weights"]
    grad, at = gradient(loss, x.logps), x.logps.detach()
    torch.testing.assert_close(finite_difference(lambda p: loss(p, w), at), grad, rtol=1e-6, atol=1e-8)
    assert (finite_difference(loss, at) - grad).abs().max() > 1e-3


def test_static_weight() -> None:
    x = example()
    output = _treg("dpo", x, x.logps, alpha=0.5, sequence_weight=0.25)
    assert torch.equal(output.metrics["sequence_weights"], torch.full((3,), 0.25, dtype=F64))
    # At a margin of 0 the dynamic weight is 1/2.
    x.ref_logps = x.logps.detach()
    dynamic = _treg("dpo", x, x.logps)
    assert torch.equal(dynamic.metrics["sequence_weights"], torch.full((3,), 0.5, dtype=F64))
    assert torch.equal(dynamic.losses, _treg("dpo", x, x.logps, sequence_weight=0.5).losses)


def test_gamma_may_be_left_out_of_the_sequence_weight() -> None:
    x = example()
    with_gamma, without = (_treg("simpo", x, x.logps, margin_in_sequence_weight=flag).metrics for flag in (True, False))
    margins = with_gamma["rewards/margins"]
    torch.testing.assert_close(with_gamma["sequence_weights"], torch.sigmoid(0.6 - margins))
    torch.testing.assert_close(without["sequence_weights"], torch.sigmoid(-margins))


def test_extreme_credit_scales_the_gradient_of_dpo() -> None:
    x, alpha = example(), 0.5
    r = torch.where(x.segments.is_chosen, 0.5, -0.5).to(F64)
    grad = gradient(lambda p: mean_loss(_treg("dpo", x, p, r, alpha=alpha), x.segments), x.logps)
    plain = gradient(lambda p: mean_loss(_base("dpo", x, p), x.segments), x.logps)
    torch.testing.assert_close(grad, (1 + alpha / 2) * plain)


def test_treg_and_tgdpo_have_the_same_gradient_but_for_the_margin_in_the_sigmoid() -> None:
    x, alpha, beta = example(), 0.4, 0.3
    treg = gradient(lambda p: mean_loss(_treg("dpo", x, p, alpha=alpha), x.segments), x.logps)
    tgdpo = gradient(
        lambda p: mean_loss(tgdpo_loss(p, x.segments, **x.guided, beta=beta, alpha=alpha), x.segments),
        x.logps,
    )
    f = token_weights(x.token_rewards, x.segments, alpha=alpha)
    # Without their weights both are constant in a completion: only c differs.
    for grad in (treg, tgdpo):
        for part in x.segments.split(grad / f):
            torch.testing.assert_close(part, part[:1].expand_as(part))
    assert (treg - tgdpo).abs().max() > 1e-3


def test_contrastive_rewards_are_odd_bounded_and_shift_invariant() -> None:
    better, worse = torch.randn(2, 1000) * 5
    r = contrastive_token_rewards(better, worse)
    assert torch.equal(contrastive_token_rewards(worse, better), -r)  # float equality
    assert torch.equal(contrastive_token_rewards(better, better), torch.zeros(1000))
    assert (r.abs() <= 0.5).all()
    shift = torch.randn(1000, dtype=F64)
    shifted = contrastive_token_rewards(better.double() + shift, worse.double() + shift)
    torch.testing.assert_close(shifted, contrastive_token_rewards(better.double(), worse.double()))
    torch.testing.assert_close(r, torch.sigmoid(better - worse) - 0.5)
    extreme = contrastive_token_rewards(torch.tensor([0.0, -50.0, 0.0]), torch.tensor([-50.0, 0.0, -1e4]))
    assert extreme.tolist() == [0.5, -0.5, 0.5]


def test_credit_metrics() -> None:
    x = example((2, 1, 1, 2))
    r = torch.tensor([0.4, -0.2, 0.1, 0.0, 0.3, -0.1], dtype=F64)
    m = treg_loss(x.logps, x.segments, ref_logps=x.ref_logps, token_rewards=r).metrics
    torch.testing.assert_close(m["credit/abs_chosen"], torch.tensor([0.3, 0.0], dtype=F64))
    torch.testing.assert_close(m["credit/positive_rejected"], torch.tensor([1.0, 0.5], dtype=F64))
