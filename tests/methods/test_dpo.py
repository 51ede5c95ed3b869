"""DPO, its variants, and supervised fine-tuning."""

from __future__ import annotations

import math

import pytest
import torch

from tests.methods.examples import F64, example, gradient, mean_loss
from tokengrain.batch import Segments
from tokengrain.methods.dpo import dpo_loss
from tokengrain.methods.tgdpo import tgdpo_loss
from tokengrain.methods.treg import treg_loss

LN2 = math.log(2)


def test_policy_equal_to_reference_is_ln_2_with_a_uniform_gradient() -> None:
    x = example()
    ref = x.logps.detach()

    def loss(logps: torch.Tensor) -> torch.Tensor:
        return mean_loss(dpo_loss(logps, x.segments, ref_logps=ref, beta=0.3), x.segments)

    output = dpo_loss(x.logps, x.segments, ref_logps=ref, beta=0.3)
    torch.testing.assert_close(output.losses, torch.full((3,), LN2, dtype=F64))
    assert torch.equal(output.metrics["rewards/chosen"], torch.zeros(3, dtype=F64))
    assert torch.equal(output.metrics["rewards/accuracies"], torch.full((3,), 0.5, dtype=F64)), "equals count half"
    sign = torch.where(x.segments.is_chosen, -1.0, 1.0).to(F64)
    torch.testing.assert_close(gradient(loss, x.logps), sign * 0.3 / (2 * x.pairs))


def test_closed_form_gradient() -> None:
    x, beta = example(), 0.7
    h = x.segments.sum(x.logps - x.ref_logps)
    c = beta * torch.sigmoid(-beta * (h[0::2] - h[1::2])) / x.pairs
    expected = x.segments.broadcast(torch.stack([-c, c], 1).flatten()).detach()
    loss = lambda p: mean_loss(dpo_loss(p, x.segments, ref_logps=x.ref_logps, beta=beta), x.segments)  # noqa: E731
    torch.testing.assert_close(gradient(loss, x.logps), expected)


def test_a_constant_on_both_reference_sums_changes_nothing() -> None:
    x = example((3, 3, 2, 2))
    shifted = dpo_loss(x.logps, x.segments, ref_logps=x.ref_logps + 0.7)  # equal lengths: equal sums
    torch.testing.assert_close(
        shifted.losses, dpo_loss(x.logps, x.segments, ref_logps=x.ref_logps).losses, rtol=1e-12, atol=1e-12
    )


def test_swapping_the_sides_negates_the_margin() -> None:
    x = example((4, 2))
    swap = torch.cat([torch.arange(4, 6), torch.arange(4)])
    swapped = dpo_loss(x.logps[swap], Segments.from_lengths([2, 4]), ref_logps=x.ref_logps[swap])
    output = dpo_loss(x.logps, x.segments, ref_logps=x.ref_logps)
    torch.testing.assert_close(swapped.metrics["rewards/margins"], -output.metrics["rewards/margins"])


def test_loss_tends_to_ln_2_with_beta() -> None:
    x = example()
    output = dpo_loss(x.logps, x.segments, ref_logps=x.ref_logps, beta=1e-9)
    torch.testing.assert_close(output.losses, torch.full((3,), LN2, dtype=F64), rtol=1e-7, atol=0)


def test_smoothing_of_zero_is_plain_and_smoothing_is_the_mixture_of_both_labels() -> None:
    x = example()
    kwargs = {"ref_logps": x.ref_logps, "beta": 0.4}
    plain = dpo_loss(x.logps, x.segments, **kwargs).losses
    assert torch.equal(dpo_loss(x.logps, x.segments, label_smoothing=0.0, **kwargs).losses, plain)
    m = dpo_loss(x.logps, x.segments, **kwargs).metrics["rewards/margins"]
    other = torch.nn.functional.softplus(m)
    smooth = dpo_loss(x.logps, x.segments, label_smoothing=0.2, **kwargs).losses
    torch.testing.assert_close(smooth, 0.8 * plain + 0.2 * other)
    robust = dpo_loss(x.logps, x.segments, loss_type="robust", label_smoothing=0.2, **kwargs).losses
    torch.testing.assert_close(robust, (0.8 * plain - 0.2 * other) / 0.6)


def test_hinge_and_sigmoid_agree_in_the_sign_of_the_gradient() -> None:
    x = example()

    def loss(kind: str) -> torch.Tensor:
        return gradient(
            lambda p: mean_loss(dpo_loss(p, x.segments, ref_logps=x.ref_logps, beta=0.1, loss_type=kind), x.segments),
            x.logps,
        )

    hinge = loss("hinge")
    active = hinge != 0
    assert active.any()
    assert torch.equal(hinge[active].sign(), loss("sigmoid")[active].sign())


def test_ipo_by_hand() -> None:
    # log-ratios: chosen 2 tokens of 0.5 and 1.0, rejected 1 token of -0.25; beta 0.5, so 1/(2 beta) = 1
    segments = Segments.from_lengths([2, 1])
    d = torch.tensor([0.5, 1.0, -0.25], dtype=F64)
    zeros = torch.zeros_like(d)
    summed = dpo_loss(d, segments, ref_logps=zeros, beta=0.5, loss_type="ipo_sum")
    assert summed.losses.item() == pytest.approx((1.75 - 1) ** 2)
    normalised = dpo_loss(d, segments, ref_logps=zeros, beta=0.5, loss_type="ipo")
    assert normalised.losses.item() == pytest.approx((0.75 + 0.25 - 1) ** 2)
    sigmoid_norm = dpo_loss(d, segments, ref_logps=zeros, beta=0.5, loss_type="sigmoid_norm")
    assert sigmoid_norm.losses.item() == pytest.approx(math.log(1 + math.exp(-0.5)))
    assert sigmoid_norm.metrics["rewards/chosen"].item() == pytest.approx(0.75)  # logged: the sum


def test_length_desensitised_by_hand() -> None:
    segments = Segments.from_lengths([3, 1, 1, 2])
    d = torch.tensor([1.0, 2.0, 4.0, 0.5, 1.0, 3.0, 5.0], dtype=F64)
    output = dpo_loss(d, segments, ref_logps=torch.zeros_like(d), beta=1.0, ld_alpha=0.5)
    margins = torch.tensor([1 + 0.5 * 6 - 0.5, 1 - (3 + 0.5 * 5)], dtype=F64)
    torch.testing.assert_close(output.losses, torch.nn.functional.softplus(-margins))
    assert torch.equal(
        dpo_loss(d, segments, ref_logps=d * 0, ld_alpha=1.0).losses,
        dpo_loss(d, segments, ref_logps=d * 0).losses,
    )


def test_reference_free_ignores_the_reference_but_logs_it() -> None:
    x = example()
    free = dpo_loss(x.logps, x.segments, reference_free=True)
    with_reference = dpo_loss(x.logps, x.segments, ref_logps=x.ref_logps, reference_free=True)
    assert torch.equal(free.losses, with_reference.losses)
    torch.testing.assert_close(
        with_reference.metrics["rewards/chosen"],
        dpo_loss(x.logps, x.segments, ref_logps=x.ref_logps).metrics["rewards/chosen"],
    )
    with pytest.raises(ValueError, match="reference_free"):
        dpo_loss(x.logps, x.segments)


def test_large_margins_and_empty_completions_are_finite() -> None:
    segments = Segments.from_lengths([1, 1, 0, 0, 2, 0])
    logps = torch.tensor([-3000.0, 0.0, -1.0, -2.0], requires_grad=True)
    for kind in ("sigmoid", "sigmoid_norm", "robust", "hinge", "ipo", "ipo_sum"):
        output = dpo_loss(logps, segments, ref_logps=torch.zeros(4), loss_type=kind)
        (grad,) = torch.autograd.grad(output.losses.sum(), logps)
        assert torch.isfinite(output.losses).all()
        assert torch.isfinite(grad).all()
    empty = dpo_loss(logps, segments, ref_logps=torch.zeros(4)).losses[1]
    assert empty.item() == pytest.approx(LN2)


def test_no_gradient_reaches_the_reference_and_metrics_have_none() -> None:
    x = example()
    ref = x.ref_logps.clone().requires_grad_()
    output = dpo_loss(x.logps, x.segments, ref_logps=ref, sft_weight=0.1)
    assert torch.autograd.grad(mean_loss(output, x.segments), ref, allow_unused=True) == (None,)
    assert not any(m.requires_grad for m in output.metrics.values())


def test_tgdpo_and_treg_without_credit_are_dpo_bit_for_bit() -> None:
    x = example()
    plain = dpo_loss(x.logps, x.segments, ref_logps=x.ref_logps, beta=0.3).losses
    for loss in (tgdpo_loss, treg_loss):
        given = {"ref_logps": x.ref_logps, "token_rewards": torch.zeros_like(x.logps), "beta": 0.3}
        assert torch.equal(loss(x.logps, x.segments, **given).losses, plain)


def test_smoothing_needs_a_sigmoid() -> None:
    x = example()
    for kind in ("hinge", "ipo", "ipo_sum"):
        with pytest.raises(ValueError, match="no label smoothing"):
            dpo_loss(x.logps, x.segments, ref_logps=x.ref_logps, loss_type=kind, label_smoothing=0.1)
    with pytest.raises(ValueError, match="label_smoothing must lie in"):
        dpo_loss(x.logps, x.segments, ref_logps=x.ref_logps, label_smoothing=0.5)
