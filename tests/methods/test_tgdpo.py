"""TGDPO."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import Tensor

from tests.methods.examples import F64, Example, example, gradient, mean_loss
from tokengrain.batch import Segments
from tokengrain.loss import token_weights
from tokengrain.methods.dpo import dpo_loss
from tokengrain.methods.tgdpo import guide_rewards, tgdpo_loss


def _gradient(x: Example, **kwargs: object) -> Tensor:
    kwargs = {**x.guided, **kwargs}
    return gradient(lambda p: mean_loss(tgdpo_loss(p, x.segments, **kwargs), x.segments), x.logps)


def _dpo_gradient(x: Example, beta: float) -> Tensor:
    return gradient(lambda p: mean_loss(dpo_loss(p, x.segments, ref_logps=x.ref_logps, beta=beta), x.segments), x.logps)


@pytest.mark.parametrize("case", ["alpha 0", "guide equals reference"])
def test_no_guidance_is_dpo_exactly(case: str) -> None:
    x = example()
    alpha = 0.0 if case == "alpha 0" else 0.5
    r = x.token_rewards if case == "alpha 0" else guide_rewards(x.ref_logps, x.ref_logps, 0.1)
    output = tgdpo_loss(x.logps, x.segments, ref_logps=x.ref_logps, token_rewards=r, beta=0.3, alpha=alpha)
    plain = dpo_loss(x.logps, x.segments, ref_logps=x.ref_logps, beta=0.3)
    assert torch.equal(output.losses, plain.losses)
    assert torch.equal(_gradient(x, token_rewards=r, beta=0.3, alpha=alpha), _dpo_gradient(x, 0.3))
    for key, value in plain.metrics.items():
        assert torch.equal(output.metrics[key], value), key


def test_constant_rewards_give_constant_weights() -> None:
    x = example()
    f = token_weights(torch.full_like(x.token_rewards, 0.3), x.segments, alpha=0.5)
    torch.testing.assert_close(f, torch.where(x.segments.is_chosen, 1.15, 0.85).to(F64))


def test_scaling_rewards_and_alpha_against_each_other_changes_nothing() -> None:
    x = example()
    a = _gradient(x, alpha=0.5)
    torch.testing.assert_close(_gradient(x, token_rewards=x.token_rewards * 4, alpha=0.125), a)


def test_gradient_decomposes_into_dpo_and_a_part_that_does_not_know_the_label() -> None:
    x, beta, alpha = example(), 0.6, 0.4
    output = tgdpo_loss(x.logps, x.segments, **x.guided, beta=beta, alpha=alpha)
    c = x.segments.broadcast((torch.sigmoid(-output.metrics["weighted/margins"]) / x.pairs).repeat_interleave(2))
    sign = torch.where(x.segments.is_chosen, 1.0, -1.0).to(F64)
    expected = -beta * c * sign - beta * c * alpha * x.token_rewards
    torch.testing.assert_close(_gradient(x, beta=beta, alpha=alpha), expected)


def test_swapping_sides_and_rewards_negates_the_margin() -> None:
    x = example((4, 2))
    swap = torch.cat([torch.arange(4, 6), torch.arange(4)])
    a = tgdpo_loss(x.logps, x.segments, **x.guided)
    b = tgdpo_loss(
        x.logps[swap],
        Segments.from_lengths([2, 4]),
        ref_logps=x.ref_logps[swap],
        token_rewards=-x.token_rewards[swap],
    )
    torch.testing.assert_close(b.metrics["weighted/margins"], -a.metrics["weighted/margins"])


def test_a_pair_is_the_same_alone_and_in_a_batch() -> None:
    x = example((4, 2, 1, 5, 3, 3))
    whole = tgdpo_loss(x.logps, x.segments, **x.guided).losses
    alone = [
        tgdpo_loss(
            x.logps[a:b],
            Segments.from_lengths(lengths),
            ref_logps=x.ref_logps[a:b],
            token_rewards=x.token_rewards[a:b],
        ).losses
        for a, b, lengths in ((0, 6, [4, 2]), (6, 12, [1, 5]), (12, 18, [3, 3]))
    ]
    torch.testing.assert_close(whole, torch.cat(alone), rtol=1e-12, atol=1e-12)


def test_a_larger_reward_on_a_chosen_token_moves_it_further() -> None:
    x = example((4, 2))
    base, token = _gradient(x, alpha=0.5), 1
    more = x.token_rewards.clone()
    more[token] += 1.0
    share = lambda g: g[token] / g[0]  # noqa: E731  (the common factor c also changes)
    assert share(_gradient(x, token_rewards=more, alpha=0.5)) > share(base)


def test_sign_flips_below_minus_one_over_alpha_unless_clamped() -> None:
    x = example((3, 2))
    r = x.token_rewards.clone()
    r[0] = -3.0  # weight 1 - 0.5 * 3 = -0.5
    with pytest.warns(UserWarning, match=r"not positive \(the log has weights/min\)"):
        flipped = _gradient(x, token_rewards=r, alpha=0.5)
    assert flipped[0] > 0 > flipped[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clamped = _gradient(x, token_rewards=r, alpha=0.5, weight_clamp_min=0.1)
    assert clamped[0] < 0
    f = token_weights(r, x.segments, alpha=0.5, clamp_min=0.1)
    assert f[0] == 0.1
    torch.testing.assert_close(clamped[0] / clamped[1], f[0] / f[1])


@pytest.mark.filterwarnings("ignore:tgdpo")
def test_weights_are_logged_per_pair() -> None:
    segments = Segments.from_lengths([2, 2, 1, 0, 0, 0])
    r = torch.tensor([-3.0, 0.2, 0.0, 4.0, 0.5], dtype=F64)
    zeros = torch.zeros(5, dtype=F64)
    m = tgdpo_loss(zeros, segments, ref_logps=zeros, token_rewards=r, alpha=0.5).metrics
    # Weights: chosen -0.5, 1.1; rejected 1, -1; then 1.25; then none.
    assert m["weights/min"].tolist() == [-1.0, 1.25, 1.0]
    assert m["weights/nonpositive"].tolist() == [0.5, 0.0, 0.0]


def test_normalised_weights_average_one_in_every_completion() -> None:
    x = example()
    f = token_weights(x.token_rewards, x.segments, alpha=0.5, normalise=True)
    torch.testing.assert_close(x.segments.mean(f), torch.ones(6, dtype=F64))
    # With them a common shift of all log-probabilities of equally long sides cancels again.
    y = example((3, 3, 2, 2))
    kwargs = {**y.guided, "normalise_weights": True}
    a, b = (tgdpo_loss(y.logps + shift, y.segments, **kwargs).losses for shift in (0.0, -2.0))
    torch.testing.assert_close(a, b)


def test_credit_and_reference_get_no_gradient() -> None:
    x = example()
    r, ref = x.token_rewards.requires_grad_(), x.ref_logps.requires_grad_()
    loss = mean_loss(tgdpo_loss(x.logps, x.segments, ref_logps=ref, token_rewards=r), x.segments)
    assert torch.autograd.grad(loss, (r, ref), allow_unused=True) == (None, None)
