"""SimPO."""

from __future__ import annotations

import math

import pytest
import torch

from tests.methods.examples import F64, example, gradient, mean_loss
from tokengrain.batch import Segments
from tokengrain.loss import Counts, make_normaliser
from tokengrain.methods.dpo import dpo_loss, sft_loss
from tokengrain.methods.simpo import simpo_loss


def test_equal_means_give_softplus_of_gamma() -> None:
    logps = torch.tensor([-1.0, -1.0, -1.0], dtype=F64)
    output = simpo_loss(logps, Segments.from_lengths([2, 1]), beta=2.0, gamma=0.7)
    assert output.losses.item() == pytest.approx(math.log(1 + math.exp(0.7)))
    assert output.metrics["rewards/margins"].item() == 0  # logged without gamma


def test_without_gamma_and_with_equal_lengths_it_is_reference_free_dpo() -> None:
    x = example((5, 5, 5, 5))
    simpo = simpo_loss(x.logps, x.segments, beta=2.0, gamma=0.0)
    dpo = dpo_loss(x.logps, x.segments, reference_free=True, beta=2.0 / 5)
    torch.testing.assert_close(simpo.losses, dpo.losses)


def test_duplicating_every_token_of_a_completion_changes_nothing() -> None:
    x = example((2, 3))
    doubled = torch.cat([x.logps[:2].repeat_interleave(2), x.logps[2:]])
    a = simpo_loss(doubled, Segments.from_lengths([4, 3])).losses
    torch.testing.assert_close(a, simpo_loss(x.logps, x.segments).losses)


def test_gradient_of_a_side_sums_to_the_same_whatever_its_length() -> None:
    x, beta, gamma = example((1, 9, 4, 4)), 2.5, 1.0
    m = simpo_loss(x.logps, x.segments, beta=beta, gamma=gamma).metrics["rewards/margins"] - gamma
    expected = beta * torch.sigmoid(-m) / x.pairs
    loss = lambda p: mean_loss(simpo_loss(p, x.segments, beta=beta, gamma=gamma), x.segments)  # noqa: E731
    chosen, rejected = x.segments.pairs(x.segments.sum(gradient(loss, x.logps)))
    torch.testing.assert_close(chosen, -expected)
    torch.testing.assert_close(rejected, expected)


def test_gamma_and_its_ratio_are_two_names_of_one_thing() -> None:
    x = example()
    a = simpo_loss(x.logps, x.segments, beta=2.5, gamma=2.5 * 0.55).losses
    assert torch.equal(a, simpo_loss(x.logps, x.segments, beta=2.5, gamma_beta_ratio=0.55).losses)
    default = simpo_loss(x.logps, x.segments, beta=2.0).losses
    assert torch.equal(default, simpo_loss(x.logps, x.segments, beta=2.0, gamma=0.5).losses)
    with pytest.raises(ValueError, match="not both"):
        simpo_loss(x.logps, x.segments, gamma=1.0, gamma_beta_ratio=0.5)


def test_hinge_is_inactive_exactly_from_a_margin_of_one() -> None:
    segments = Segments.from_lengths([1, 1] * 3)
    logps = torch.tensor([-1.0, -2.0, -1.0, -1.5, -1.0, -1.75], dtype=F64, requires_grad=True)
    output = simpo_loss(logps, segments, beta=2.0, gamma=0.5, loss_type="hinge")  # margins 1.5, 0.5, 1.0
    assert output.losses.tolist() == [0.0, 0.5, 0.0]


def test_sft_term_is_a_token_mean_over_the_chosen_tokens_of_the_step() -> None:
    x = example((4, 2, 1, 5))
    counts = Counts.of(x.segments, pairs=True)
    assert counts.chosen_tokens == 5
    plain = mean_loss(simpo_loss(x.logps, x.segments), x.segments)
    with_sft = mean_loss(simpo_loss(x.logps, x.segments, sft_weight=0.3), x.segments)
    chosen = x.logps[x.segments.is_chosen]
    torch.testing.assert_close(with_sft, plain - 0.3 * chosen.mean())
    assert simpo_loss(x.logps, x.segments, sft_weight=0.0).token_losses is None


def test_empty_completion_is_finite() -> None:
    logps = torch.tensor([-1.0, -2.0], requires_grad=True)
    output = simpo_loss(logps, Segments.from_lengths([2, 0]))
    assert torch.isfinite(output.losses).all()
    assert torch.isfinite(torch.autograd.grad(output.losses.sum(), logps)[0]).all()


class TestSFT:
    def test_per_token_is_the_mean_over_tokens(self) -> None:
        x = example((4, 2, 1))
        output = sft_loss(x.logps, x.segments)
        loss = make_normaliser("mean")(output, Counts.of(x.segments, pairs=False))
        torch.testing.assert_close(loss, -x.logps.mean())
        assert output.metrics["nll/token"].shape == (3,)

    def test_per_sequence_is_the_mean_of_sums(self) -> None:
        x = example((4, 2, 1))
        output = sft_loss(x.logps, x.segments, per="sequence")
        loss = make_normaliser("mean")(output, Counts.of(x.segments, pairs=False))
        torch.testing.assert_close(loss, -x.logps.sum() / 3)


@pytest.mark.parametrize(("lengths", "empty"), [((2, 0, 1, 2), 2), ((0, 2, 1, 2), 2), ((0, 0, 1, 2), 0)])
def test_a_pair_with_an_empty_side_trains_nothing_and_stays_in_the_count(lengths: tuple[int, ...], empty: int) -> None:
    """A selection may leave nothing of one side; the mean over no tokens, 0, would beat every text."""
    x = example(lengths)
    losses = simpo_loss(x.logps, x.segments).losses
    assert losses[0] == 0
    (grad,) = torch.autograd.grad(losses.sum(), x.logps)
    assert bool((grad[:empty] == 0).all())
    assert bool((grad[empty:] != 0).all())
    other = simpo_loss(x.logps[empty:], Segments.from_lengths(lengths[2:])).losses
    torch.testing.assert_close(mean_loss(simpo_loss(x.logps, x.segments), x.segments), other[0] / 2)
