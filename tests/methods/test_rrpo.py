"""RRPO: the loss, and spans as credit."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.methods.examples import F64, PairLogits, example, gradient, mean_loss, pair_logits
from tests.scoring.models import batch_of, tiny
from tokengrain.batch import Completion, Sample, Segments, TokenBatch
from tokengrain.errors import DataError, ModelError
from tokengrain.loss import LossOutput
from tokengrain.method import CreditSource, make_credit, make_objective
from tokengrain.methods.dpo import dpo_loss
from tokengrain.methods.rrpo import rrpo_loss, rrpo_reads, span_rewards
from tokengrain.scoring.reference import ColumnReference
from tokengrain.training.step import PreferenceLoss

LENGTHS = (4, 5, 3, 2)
SPANS = (0, 1, 1, 0, 0, 1, 0, 2, 2, 1, 0, 2, 0, 1)
VOCAB = 6


@dataclass
class Logits(PairLogits):
    """With spans `[N]`."""

    spans: Tensor

    def apply(self, logps: Tensor, **given: Any) -> LossOutput:
        return rrpo_loss(logps, self.segments, spans=self.spans, **given)

    def dpo(self, policy: Tensor, beta: float) -> LossOutput:
        logps = self.scores(policy)["logps"]
        return dpo_loss(logps, self.segments, ref_logps=self.scores(self.reference)["logps"], beta=beta)


@pytest.fixture
def x() -> Logits:
    return Logits(*pair_logits(LENGTHS, VOCAB, seed=2), torch.tensor(SPANS, dtype=F64))


def test_alpha_0_and_every_token_in_a_span_is_dpo(x: Logits) -> None:
    x.spans = torch.ones_like(x.spans)
    loss = x.loss(x.policy, beta=0.3, alpha=0.0)
    assert torch.equal(loss.losses, x.dpo(x.policy, 0.3).losses)
    expected = gradient(lambda p: mean_loss(x.dpo(p, 0.3), x.segments), x.policy)
    assert torch.equal(x.gradient(beta=0.3, alpha=0.0), expected)


def test_every_token_in_a_span_is_dpo_plus_the_chosen_kl(x: Logits) -> None:
    x.spans = torch.ones_like(x.spans)
    kl = x.segments.pairs(x.segments.sum(x.scores(x.policy)["kl"]))[0]
    loss = x.loss(x.policy, beta=0.3, alpha=0.2)
    torch.testing.assert_close(loss.losses, x.dpo(x.policy, 0.3).losses + 0.2 * kl)


def test_policy_equal_to_reference(x: Logits) -> None:
    x.reference = x.policy.detach()
    output = x.loss(x.policy, alpha=0.3)
    torch.testing.assert_close(output.losses, torch.full((2,), math.log(2), dtype=F64))
    assert output.metrics["kl/chosen"].abs().max() < 1e-12
    torch.testing.assert_close(x.gradient(alpha=0.3), x.gradient(alpha=0.0), rtol=0, atol=1e-12)


def test_no_span(x: Logits) -> None:
    x.spans = torch.zeros_like(x.spans)
    output = x.loss(x.policy, alpha=0.2)
    torch.testing.assert_close(output.losses.detach(), math.log(2) + 0.2 * output.metrics["kl/chosen"])
    assert bool((x.gradient(alpha=0.2)[~x.segments.is_chosen] == 0).all())
    assert bool((x.gradient(alpha=0.0) == 0).all())
    logps, ref_logps = x.scores(x.policy)["logps"], x.scores(x.reference)["logps"]
    assert span_rewards(logps, x.segments, ref_logps=ref_logps, spans=x.spans).shape == (4, 0)


@pytest.mark.parametrize("alpha", [0.0, 0.07])
def test_closed_form_gradient_and_exact_zeros(x: Logits, alpha: float) -> None:
    beta, pairs = 0.4, 2
    output = x.loss(x.policy, beta=beta, alpha=0.0)
    u = output.metrics["rewards/margins"]
    g = x.segments.broadcast((beta * torch.sigmoid(-u) / pairs).repeat_interleave(2))[:, None]
    e = torch.nn.functional.one_hot(x.labels, VOCAB).to(F64)
    p, q = torch.softmax(x.policy, -1).detach(), torch.softmax(x.reference, -1)
    inside, chosen = (x.spans > 0)[:, None], x.segments.is_chosen[:, None]
    rank = torch.where(inside, torch.where(chosen, -g * (e - p), g * (e - p)), 0.0)
    expected = rank + torch.where(chosen, alpha / pairs * (p - q), 0.0)
    found = x.gradient(beta=beta, alpha=alpha)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    unread = ~rrpo_reads(x.segments, spans=x.spans, alpha=alpha)
    assert bool(unread.any())
    assert bool((found[unread] == 0).all())


def test_names_of_spans_do_not_matter(x: Logits) -> None:
    renamed = replace(x, spans=torch.where(x.spans > 0, 8 - x.spans, 0.0))
    merged = replace(x, spans=(x.spans > 0).to(F64))
    for other in (renamed, merged):
        assert torch.equal(other.loss(x.policy).losses, x.loss(x.policy).losses)
        assert torch.equal(other.gradient(), x.gradient())


def test_constants_added_to_the_logits_do_not_matter(x: Logits) -> None:
    shift = torch.randn(len(x.labels), 1, dtype=F64)
    torch.testing.assert_close(x.loss(x.policy + shift, x.reference - shift).losses, x.loss(x.policy).losses)


def test_order_of_pairs_and_their_number_do_not_matter(x: Logits) -> None:
    """The second pair alone, and the pairs in reverse order."""
    order, alone = [2, 3, 0, 1], [2, 3]
    losses = x.loss(x.policy).losses
    for completions, expected in ((order, losses.flip(0)), (alone, losses[1:])):
        pick = torch.cat([torch.arange(x.segments.total).split(list(LENGTHS))[c] for c in completions])
        other = Logits(
            Segments.from_lengths([LENGTHS[c] for c in completions]),
            x.policy[pick],
            x.reference[pick],
            x.labels[pick],
            x.spans[pick],
        )
        torch.testing.assert_close(other.loss(other.policy).losses, expected)


def test_kl_is_that_of_every_chosen_token_and_never_negative(x: Logits) -> None:
    logp, logq = torch.log_softmax(x.policy, -1).detach(), torch.log_softmax(x.reference, -1)
    kl = torch.nn.functional.kl_div(logp, logq, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(x.loss(x.policy).metrics["kl/chosen"], x.segments.pairs(x.segments.sum(kl))[0])
    previous = x.loss(x.policy, alpha=0.0).losses
    for alpha in (0.01, 0.1, 1.0):
        losses = x.loss(x.policy, alpha=alpha).losses
        assert bool((losses > previous).all())
        previous = losses


@pytest.mark.parametrize("alpha", [0.0, 0.05])
def test_only_the_tokens_that_it_reads_matter(alpha: float) -> None:
    """Scored on those tokens alone, loss, gradient and metrics are the same; and garbage elsewhere is not seen."""
    x = example(LENGTHS)
    spans = torch.tensor(SPANS, dtype=F64)
    read = rrpo_reads(x.segments, spans=spans, alpha=alpha)

    def loss(logps: Tensor, kl: Tensor, *, narrow: bool) -> LossOutput:
        keep = read if narrow else torch.ones_like(read)
        return rrpo_loss(
            logps[keep],
            x.segments.narrow(keep),
            ref_logps=x.ref_logps[keep],
            kl=kl[keep],
            spans=spans[keep],
            alpha=alpha,
        )

    whole, narrow = loss(x.logps, x.kl, narrow=False), loss(x.logps, x.kl, narrow=True)
    torch.testing.assert_close(whole.losses, narrow.losses)
    torch.testing.assert_close(whole.metrics, narrow.metrics)
    grads = [torch.autograd.grad(o.losses.sum(), (x.logps, x.kl), allow_unused=True) for o in (whole, narrow)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b)
    garbage = [torch.where(read, v, float("nan")) for v in (x.logps, x.kl)]
    torch.testing.assert_close(loss(*garbage, narrow=False).losses, whole.losses)


def test_average_kl_divides_by_the_chosen_length() -> None:
    x = example((3, 3, 3, 3))
    arguments = {"ref_logps": x.ref_logps, "kl": x.kl, "spans": torch.ones(12)}
    mean = rrpo_loss(x.logps, x.segments, alpha=0.3, average_kl=True, **arguments)
    summed = rrpo_loss(x.logps, x.segments, alpha=0.1, **arguments)
    torch.testing.assert_close(mean.losses, summed.losses)


def test_rewards_of_spans_add_up(x: Logits) -> None:
    logps, ref_logps = x.scores(x.policy)["logps"], x.scores(x.reference)["logps"]
    rewards = span_rewards(logps, x.segments, ref_logps=ref_logps, spans=x.spans, beta=0.5)
    assert rewards.shape == (4, 2)
    assert not rewards.requires_grad
    first, second = ((logps - ref_logps)[x.spans.long() == k] for k in (1, 2))
    torch.testing.assert_close(rewards[0, 0], 0.5 * first[:2].sum().detach())
    torch.testing.assert_close(rewards[1, 1], 0.5 * second[:2].sum().detach())
    assert rewards[0, 1] == 0
    chosen, rejected = x.segments.pairs(rewards.sum(1))
    metrics = x.loss(x.policy).metrics
    torch.testing.assert_close(metrics["rewards/chosen"], chosen)
    torch.testing.assert_close(metrics["rewards/rejected"], rejected)


def test_metrics(x: Logits) -> None:
    metrics = x.loss(x.policy).metrics
    assert metrics["spans/chosen"].tolist() == [1, 2]
    assert metrics["spans/rejected"].tolist() == [2, 1]
    d = x.scores(x.policy)["logps"] - x.scores(x.reference)["logps"]
    moved = x.segments.pairs(x.segments.sum(d.detach()))[0]
    torch.testing.assert_close(metrics["logratios/chosen"], moved)
    assert metrics["displacement"].tolist() == [float(v < 0) for v in moved]
    assert all(not v.requires_grad and v.shape == (2,) for v in metrics.values())


def test_empty_completions_stay_finite() -> None:
    x = example((0, 2, 0, 0))
    for average in (False, True):
        output = rrpo_loss(
            x.logps, x.segments, ref_logps=x.ref_logps, kl=x.kl, spans=torch.tensor([0.0, 1.0]), average_kl=average
        )
        assert torch.isfinite(output.losses).all()
        assert output.losses[1].item() == pytest.approx(math.log(2))


def test_without_a_kl_term_no_kl_is_needed(x: Logits) -> None:
    given = {"ref_logps": x.scores(x.reference)["logps"], "spans": x.spans}
    bare = rrpo_loss(x.scores(x.policy)["logps"], x.segments, alpha=0.0, **given)
    whole = x.loss(x.policy, alpha=0.0)
    assert torch.equal(bare.losses, whole.losses)
    assert whole.metrics.keys() - bare.metrics.keys() == {"kl/chosen", "kl/rejected"}
    with pytest.raises(ValueError, match=r"alpha = 0\.1 needs kl"):
        rrpo_loss(x.scores(x.policy)["logps"], x.segments, alpha=0.1, **given)
    assert make_objective("rrpo").needs == {"ref_logps", "kl", "spans"}
    assert make_objective("rrpo", alpha=0).needs == {"ref_logps", "spans"}


def test_without_a_kl_term_stored_log_probabilities_are_enough() -> None:
    batch = batch_of((6, (4, 5)), (3, (3, 2)))
    batch = batch.with_columns(
        spans=(torch.arange(batch.segments.total) % 3 == 0).float(), ref_logps=torch.full((batch.segments.total,), -2.0)
    )
    model = tiny("llama")
    judged = PreferenceLoss(make_objective("rrpo", alpha=0), ColumnReference(), None)(model, batch)
    assert judged.output.losses.shape == (2,)
    assert bool(torch.isfinite(judged.output.losses).all())
    with pytest.raises(ModelError, match="needs a live reference"):
        PreferenceLoss(make_objective("rrpo"), ColumnReference(), None)(model, batch)


def batch(*spans: list[float], completions: int = 2) -> TokenBatch:
    made = [Completion(list(range(len(s))), None, {"spans": s}) for s in spans]
    samples = [
        Sample([1], made[i : i + completions], row=f"r{i // completions}") for i in range(0, len(made), completions)
    ]
    return TokenBatch.from_samples(samples)


def test_chosen_spans_gain_and_rejected_ones_lose() -> None:
    found = batch([0.0, 1.0, 2.0], [1.0, 0.0], [0.0], [0.0, 0.0, 7.0])
    credit = make_credit("spans")(found)
    assert credit.tolist() == [0, 1, 1, -1, 0, 0, 0, 0, -1]
    assert credit.is_floating_point()
    assert not credit.requires_grad
    # Renaming or merging spans changes nothing.
    torch.testing.assert_close(
        make_credit("spans")(found.with_columns(spans=found.columns["spans"].clamp(max=1))), credit
    )


def test_uncounted_tokens_are_left_out() -> None:
    chosen = Completion([1, 2, 3], [True, False, True], {"spans": [0.0, 3.0]})
    sample = Sample([1], [chosen, Completion([4], None, {"spans": [0.0]})])
    assert make_credit("spans")(TokenBatch.from_samples([sample])).tolist() == [0, 1, 0]


def test_what_it_needs() -> None:
    plain = TokenBatch.from_samples([Sample([1], [Completion([2]), Completion([3])], row="r0")])
    with pytest.raises(DataError, match=r"row r0: the data have no spans; got \[\]; expected data.spans"):
        make_credit("spans")(plain)
    with pytest.raises(DataError, match="need pairs; got '2 completions of 2 prompts'"):
        make_credit("spans")(batch([1.0], [0.0], completions=1))


def test_it_is_a_source() -> None:
    assert isinstance(make_credit("spans"), CreditSource)
    assert make_credit("spans").fingerprint() == make_credit("spans").fingerprint()
    assert make_credit("spans").name == "spans"
