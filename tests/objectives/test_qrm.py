"""Identities of the Q-RM spec, section 7, float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.objectives.examples import F64, example, finite_difference, gradient, mean_loss
from tokengrain.batch import Segments
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.methods._clipped import value_loss
from tokengrain.methods.ppo import ppo_policy_loss, reinforce_loss
from tokengrain.methods.qrm import qrm_loss
from tokengrain.scoring.token_scores import pooled_scores

LENGTHS = (4, 2, 1, 5, 3, 3)


@pytest.fixture
def segments() -> Segments:
    return Segments.from_lengths(LENGTHS)


@pytest.fixture
def scores(segments: Segments) -> Tensor:
    generator = torch.Generator().manual_seed(4)
    return (3 * torch.randn(segments.total, dtype=F64, generator=generator)).requires_grad_()


def test_beta_0_is_softplus_of_gamma_without_gradient(scores: Tensor, segments: Segments) -> None:
    output = qrm_loss(scores, segments, beta=0.0, gamma=1.3)
    torch.testing.assert_close(output.losses, torch.full((3,), math.log1p(math.exp(1.3)), dtype=F64))
    assert bool((torch.autograd.grad(output.losses.sum(), scores)[0] == 0).all())
    almost = qrm_loss(scores, segments, beta=1e-12, gamma=0.0)
    torch.testing.assert_close(almost.losses, torch.full((3,), math.log(2), dtype=F64))


@pytest.mark.parametrize("pooling", ["mean", "last"])
def test_a_constant_on_all_scores_changes_nothing(scores: Tensor, segments: Segments, pooling: str) -> None:
    base = qrm_loss(scores, segments, pooling=pooling).losses
    torch.testing.assert_close(qrm_loss(scores + 7.5, segments, pooling=pooling).losses, base)


def test_doubling_every_token_changes_nothing(scores: Tensor, segments: Segments) -> None:
    doubled = Segments.from_lengths([2 * n for n in LENGTHS])
    torch.testing.assert_close(qrm_loss(scores.repeat_interleave(2), doubled).losses, qrm_loss(scores, segments).losses)


def test_single_tokens_are_bradley_terry_with_a_margin() -> None:
    scores, segments = torch.tensor([1.5, -0.5, 0.2, 0.9], dtype=F64), Segments.from_lengths([1, 1, 1, 1])
    gap = torch.tensor([2.0, -0.7], dtype=F64)
    for pooling in ("mean", "last"):
        losses = qrm_loss(scores, segments, beta=0.4, gamma=0.6, pooling=pooling).losses
        torch.testing.assert_close(losses, torch.log1p(torch.exp(0.6 - 0.4 * gap)))


def test_gradient_is_the_same_on_all_tokens_of_a_completion(scores: Tensor, segments: Segments) -> None:
    beta, gamma = 0.3, 1.1
    found = gradient(lambda z: mean_loss(qrm_loss(z, segments, beta=beta, gamma=gamma), segments), scores)
    gap = qrm_loss(scores, segments).metrics["rewards/margins"]
    total = beta * torch.sigmoid(gamma - beta * gap) / 3
    signed = torch.stack([-total, total], dim=1).flatten()
    torch.testing.assert_close(found, segments.broadcast(signed / segments.lengths), rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(segments.sum(found), signed)


def test_last_token_pooling_trains_last_tokens_alone(scores: Tensor, segments: Segments) -> None:
    output = qrm_loss(scores, segments, pooling="last")
    ends = segments.offsets[1:] - 1
    torch.testing.assert_close(output.metrics["rewards/chosen"], scores.detach()[ends][0::2])
    grad = torch.autograd.grad(output.losses.sum(), scores)[0]
    assert grad.nonzero().flatten().tolist() == ends.tolist()


def test_pairs_with_an_empty_side_are_not_valid() -> None:
    segments = Segments.from_lengths([2, 0, 0, 1, 1, 1])
    scores = torch.tensor([3.0, 1.0, -2.0, 1.0, 0.0], dtype=F64, requires_grad=True)
    for pooling in ("mean", "last"):
        output = qrm_loss(scores, segments, pooling=pooling)
        assert output.metrics["valid"].tolist() == [0, 0, 1]
        assert output.losses[:2].tolist() == [0, 0]
        grad = torch.autograd.grad(output.losses.sum(), scores)[0]
        assert grad[:3].tolist() == [0, 0, 0]


def test_half_precision_scores_are_averaged_in_float32() -> None:
    scores, segments = torch.full((4097,), 1.0).to(torch.bfloat16), Segments.from_lengths([4096, 1])
    pooled = pooled_scores(scores, segments)
    assert pooled.dtype == torch.float32
    assert pooled.tolist() == [1, 1]


def test_metrics_and_order(scores: Tensor, segments: Segments) -> None:
    metrics = qrm_loss(scores, segments).metrics
    assert metrics["rewards/accuracies"].tolist() == [float(v > 0) for v in metrics["rewards/margins"]]
    assert all(not v.requires_grad and v.shape == (3,) for v in metrics.values())
    pieces = scores.split(LENGTHS)
    order = [4, 5, 0, 1, 2, 3]
    other = qrm_loss(torch.cat([pieces[c] for c in order]), Segments.from_lengths([LENGTHS[c] for c in order]))
    torch.testing.assert_close(other.losses, qrm_loss(scores, segments).losses[[2, 0, 1]])


class TestPolicyLosses:
    """What trains a policy on token scores."""

    def _mean(self, output: LossOutput, segments: Segments) -> Tensor:
        return make_normaliser("token_mean")(output, Counts.of(segments, pairs=False))

    def test_on_policy_ppo_without_clip_is_reinforce(self) -> None:
        x = example()
        A = x.token_rewards
        for clip in (None, 0.2):
            ppo = gradient(
                lambda p, clip=clip: self._mean(
                    ppo_policy_loss(p, x.segments, old_logps=x.logps, advantages=A, clip_range=clip), x.segments
                ),
                x.logps,
            )
            reinforce = gradient(lambda p: self._mean(reinforce_loss(p, x.segments, advantages=A), x.segments), x.logps)
            torch.testing.assert_close(ppo, reinforce)
            torch.testing.assert_close(ppo, -A / x.segments.total)

    def test_clipping_stops_the_gradient_where_it_should(self) -> None:
        segments = Segments.from_lengths([5])
        old = torch.zeros(5, dtype=F64)
        logps = torch.tensor([0.5, 0.5, -0.5, -0.5, 0.1], dtype=F64).requires_grad_()
        A = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0], dtype=F64)
        output = ppo_policy_loss(logps, segments, old_logps=old, advantages=A, clip_range=0.2)
        grad = torch.autograd.grad(output.losses.sum(), logps)[0]
        assert grad[[0, 3]].tolist() == [0, 0]  # already moved far enough the way A asks
        torch.testing.assert_close(grad[[1, 2, 4]], (-A * logps.exp())[[1, 2, 4]].detach())
        assert output.metrics["ratio/outside"].item() == pytest.approx(0.8)

    def test_no_gradient_to_advantages_old_log_probabilities_or_returns(self) -> None:
        x = example()
        old, A = (v.clone().requires_grad_() for v in (x.ref_logps, x.token_rewards))
        losses = [
            ppo_policy_loss(x.logps, x.segments, old_logps=old, advantages=A).losses,
            reinforce_loss(x.logps, x.segments, advantages=A).losses,
            value_loss(x.logps, x.segments, returns=A).losses,
        ]
        for loss in losses:
            grads = torch.autograd.grad(loss.sum(), (x.logps, old, A), allow_unused=True, retain_graph=True)
            assert grads[0].abs().max() > 0
            assert grads[1] is None
            assert grads[2] is None

    def test_gradients_by_finite_differences(self) -> None:
        x = example()
        near = (x.logps + 0.3 * x.token_rewards).detach()

        def ppo(p: Tensor) -> Tensor:
            return ppo_policy_loss(p, x.segments, old_logps=near, advantages=x.ref_logps + 1).losses.sum()

        def value(v: Tensor) -> Tensor:
            return value_loss(v, x.segments, returns=near, weight=0.5, reduction="mean").losses.sum()

        for loss in (ppo, value):
            torch.testing.assert_close(gradient(loss, x.logps), finite_difference(loss, x.logps), rtol=1e-6, atol=1e-8)

    def test_length_normalised_losses_are_means(self) -> None:
        x = example((3, 3, 3, 3))
        A = x.token_rewards
        for summed, mean in (
            [reinforce_loss(x.logps, x.segments, advantages=A, reduction=r) for r in ("sum", "mean")],
            [value_loss(x.logps, x.segments, returns=A, reduction=r) for r in ("sum", "mean")],
        ):
            torch.testing.assert_close(summed.losses, 3 * mean.losses)
            assert summed.unit == mean.unit == "completions"

    def test_empty_completions_count_as_zero(self) -> None:
        segments, none = Segments.from_lengths([0, 0]), torch.zeros(0, dtype=F64, requires_grad=True)
        for reduction in ("sum", "mean"):
            for output in (
                ppo_policy_loss(none, segments, old_logps=none, advantages=none, reduction=reduction),
                reinforce_loss(none, segments, advantages=none, reduction=reduction),
                value_loss(none, segments, returns=none, reduction=reduction),
            ):
                assert output.losses.tolist() == [0, 0]
                assert all(torch.isfinite(v).all() for v in output.metrics.values())
