"""TDPO: the losses on whole vocabularies, and on a toy whose optimum is known."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.methods.examples import F64, PairLogits, example, gradient, mean_loss, pair_logits
from tokengrain.batch import Segments
from tokengrain.loss import Counts, LossOutput, make_normaliser
from tokengrain.method import make_objective
from tokengrain.methods.dpo import dpo_loss
from tokengrain.methods.tdpo import tdpo_loss, tdpo_token_rewards

LENGTHS = (4, 2, 1, 3)
VOCAB = 6


class Logits(PairLogits):
    def apply(self, logps: Tensor, **given: Any) -> LossOutput:
        return tdpo_loss(logps, self.segments, **given)


@pytest.fixture
def x() -> Logits:
    return Logits(*pair_logits(LENGTHS, VOCAB, seed=1))


def test_alpha_0_is_dpo_in_value_and_gradient(x: Logits) -> None:
    def dpo(policy: Tensor) -> Tensor:
        output = dpo_loss(x.scores(policy)["logps"], x.segments, ref_logps=x.scores(x.reference)["logps"], beta=0.3)
        return mean_loss(output, x.segments)

    assert mean_loss(x.loss(x.policy, beta=0.3, alpha=0.0), x.segments).item() == dpo(x.policy).item()
    torch.testing.assert_close(x.gradient(beta=0.3, alpha=0.0), gradient(dpo, x.policy), rtol=1e-12, atol=1e-12)


def test_alpha_1_has_the_value_of_tdpo1_and_another_gradient(x: Logits) -> None:
    two, one = x.loss(x.policy, alpha=1.0), x.loss(x.policy, variant="tdpo1")
    torch.testing.assert_close(two.losses, one.losses)
    assert (x.gradient(alpha=1.0) - x.gradient(variant="tdpo1")).abs().max() > 1e-3


def test_tdpo1_ignores_alpha(x: Logits) -> None:
    a, b = (x.loss(x.policy, variant="tdpo1", alpha=alpha).losses for alpha in (0.1, 5.0))
    assert torch.equal(a, b)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_policy_equal_to_reference(x: Logits, variant: str) -> None:
    x.reference = x.policy.detach()
    output = x.loss(x.policy, beta=0.2, variant=variant)
    torch.testing.assert_close(output.losses, torch.full((2,), math.log(2), dtype=F64))
    assert output.metrics["kl/chosen"].abs().max() < 1e-12

    def dpo(policy: Tensor) -> Tensor:
        logps = x.scores(policy)["logps"]
        return mean_loss(dpo_loss(logps, x.segments, ref_logps=logps.detach(), beta=0.2), x.segments)

    torch.testing.assert_close(x.gradient(beta=0.2, variant=variant), gradient(dpo, x.policy), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("variant", ["tdpo1", "tdpo2"])
def test_closed_form_gradient_of_the_logits(x: Logits, variant: str) -> None:
    beta, alpha = 0.4, 0.7
    output = x.loss(x.policy, beta=beta, alpha=alpha, variant=variant)
    z = torch.log(torch.expm1(output.losses.detach())).neg() / beta  # losses = softplus(-beta z)
    g = -beta * torch.sigmoid(-beta * z) / 2
    e = torch.nn.functional.one_hot(x.labels, VOCAB).to(F64)
    p, q = torch.softmax(x.policy, -1).detach(), torch.softmax(x.reference, -1)
    if variant == "tdpo1":
        chosen, rejected = e - q, -(e - q)
    else:
        chosen, rejected = e - p, -((e - p) + alpha * (p - q))
    per_token = x.segments.broadcast(g.repeat_interleave(2))[:, None]
    expected = per_token * torch.where(x.segments.is_chosen[:, None], chosen, rejected)
    torch.testing.assert_close(x.gradient(beta=beta, alpha=alpha, variant=variant), expected, rtol=1e-10, atol=1e-12)


def test_shifting_logits_and_permuting_the_vocabulary_change_nothing(x: Logits) -> None:
    base = x.loss(x.policy).losses
    shift = torch.randn(len(x.labels), 1, dtype=F64)
    torch.testing.assert_close(x.loss(x.policy + shift, x.reference - shift).losses, base)
    order = torch.randperm(VOCAB)
    permuted = Logits(x.segments, x.policy[:, order], x.reference[:, order], order.argsort()[x.labels])
    torch.testing.assert_close(permuted.loss(permuted.policy).losses, base)


def test_token_rewards_average_zero_under_the_reference_in_every_state(x: Logits) -> None:
    logp, logq = torch.log_softmax(x.policy, -1).detach(), torch.log_softmax(x.reference, -1)
    kl = x.scores(x.policy)["kl"].detach()
    assert (kl >= 0).all()
    rewards = torch.stack([tdpo_token_rewards(logp[:, v], logq[:, v], kl, beta=0.3) for v in range(VOCAB)], dim=1)
    torch.testing.assert_close((logq.exp() * rewards).sum(1), torch.zeros(len(kl), dtype=F64))


def test_token_rewards_sum_to_the_logged_rewards(x: Logits) -> None:
    scores, ref_logps = x.scores(x.policy), x.scores(x.reference)["logps"]
    rewards = tdpo_token_rewards(scores["logps"], ref_logps, scores["kl"], beta=0.3)
    assert not rewards.requires_grad
    chosen, _ = x.segments.pairs(x.segments.sum(rewards))
    torch.testing.assert_close(chosen, x.loss(x.policy, beta=0.3).metrics["rewards/chosen"])


def test_chunks_change_nothing(x: Logits) -> None:
    whole, chunked = x.scores(x.policy), x.scores(x.policy, chunk=3)
    torch.testing.assert_close(whole, chunked)


def test_a_reference_probability_of_zero_is_no_nan(x: Logits) -> None:
    x.reference = x.reference.clone()
    x.reference[:, 0] = -2000.0  # underflows to 0, as padded vocabulary entries do
    output = x.loss(x.policy)
    assert torch.isfinite(output.losses).all()
    assert torch.isfinite(x.scores(x.policy)["kl"]).all()
    assert torch.isfinite(x.gradient()).all()


def test_where_the_gradient_flows() -> None:
    x = example()
    kwargs = {"ref_logps": x.ref_logps.requires_grad_(), "kl": x.kl}
    for variant in ("tdpo1", "tdpo2"):
        loss = mean_loss(tdpo_loss(x.logps, x.segments, variant=variant, **kwargs), x.segments)
        grad_kl, grad_ref = torch.autograd.grad(loss, (x.kl, x.ref_logps), allow_unused=True)
        chosen = x.segments.is_chosen
        assert (grad_kl[~chosen] > 0).all()  # drift of the rejected side is punished
        assert (grad_kl[chosen] < 0).all() if variant == "tdpo1" else (grad_kl[chosen] == 0).all()
        assert grad_ref is None


def test_averaging_divides_by_the_length_and_empty_completions_stay_finite() -> None:
    x = example((3, 3, 3, 3))
    mean = tdpo_loss(x.logps, x.segments, ref_logps=x.ref_logps, kl=x.kl, beta=0.3, average_log_prob=True)
    summed = tdpo_loss(x.logps, x.segments, ref_logps=x.ref_logps, kl=x.kl, beta=0.1)
    torch.testing.assert_close(mean.losses, summed.losses)
    empty = Segments.from_lengths([0, 0])
    none = torch.zeros(0, dtype=F64, requires_grad=True)
    for average in (False, True):
        output = tdpo_loss(none, empty, ref_logps=none, kl=none, average_log_prob=average)
        assert output.losses.item() == pytest.approx(math.log(2))


VOCAB_TDPO_TOY, LENGTH, PAIRS, STEPS = 4, 6, 512, 400
ALL = torch.tensor(list(itertools.product(range(VOCAB_TDPO_TOY), repeat=LENGTH)))


class Policy(nn.Module):
    """A GRU over words 0..3, started by word 4: sequences `[B, T]` to log-probabilities `[B, T, V]`."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB_TDPO_TOY + 1, 16)
        self.gru = nn.GRU(16, 48, batch_first=True)
        self.head = nn.Linear(48, VOCAB_TDPO_TOY)

    def forward(self, sequences: Tensor) -> Tensor:
        start = torch.full_like(sequences[:, :1], VOCAB_TDPO_TOY)
        states, _ = self.gru(self.embedding(torch.cat([start, sequences[:, :-1]], 1)))
        return torch.log_softmax(self.head(states), -1)


@dataclass
class World:
    """A reference policy and pairs sampled from it: chosen, rejected, chosen, ... `[2P, T]`."""

    reference: Policy
    sequences: Tensor

    @classmethod
    def make(cls, seed: int) -> World:
        torch.manual_seed(seed)
        chain = torch.softmax(torch.randn(VOCAB_TDPO_TOY + 1, VOCAB_TDPO_TOY), -1)
        reference = Policy()
        optimiser = torch.optim.Adam(reference.parameters(), 1e-2)
        previous = torch.cat([torch.full_like(ALL[:, :1], VOCAB_TDPO_TOY), ALL[:, :-1]], 1)
        weight = torch.exp(torch.log(chain[previous, ALL]).sum(1))  # probability of each sequence
        for _ in range(150):
            loss = -(weight[:, None, None] * chain[previous] * reference(ALL)).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        reference.requires_grad_(False)
        probability = sequence_logps(reference(ALL), ALL).exp()
        pairs = ALL[torch.multinomial(probability, 2 * PAIRS, replacement=True)].view(PAIRS, 2, LENGTH)
        bigrams = ((pairs[..., :-1] == 2) & (pairs[..., 1:] == 3)).sum(-1)
        reward = bigrams - 0.25 * (pairs == 0).sum(-1)
        first_wins = torch.rand(PAIRS) < torch.sigmoid(2.0 * (reward[:, 0] - reward[:, 1]))
        ordered = torch.where(first_wins[:, None, None], pairs, pairs.flip(1))
        return cls(reference, ordered.reshape(2 * PAIRS, LENGTH))

    def train(self, name: str, **hyper: float) -> dict[str, float]:
        """Mean sequential KL of either side and the policy's entropy after training."""
        policy = Policy()
        policy.load_state_dict(self.reference.state_dict())
        objective, normalise = make_objective(name, beta=0.1, **hyper), make_normaliser("mean")
        segments = Segments.from_lengths([LENGTH] * 2 * PAIRS)
        counts = Counts.of(segments, pairs=True)
        optimiser = torch.optim.Adam(policy.parameters(), 2e-3)
        logq = self.reference(self.sequences)
        for _ in range(STEPS):
            logp = policy(self.sequences)
            output = objective(
                segments=segments,
                logps=taken(logp, self.sequences).flatten(),
                ref_logps=taken(logq, self.sequences).flatten(),
                kl=(logq.exp() * (logq - logp)).sum(-1).flatten(),
            )
            optimiser.zero_grad()
            normalise(output, counts).backward()
            optimiser.step()
        with torch.no_grad():
            logps = sequence_logps(policy(ALL), ALL)
        means = {side: float(output.metrics[f"kl/{side}"].mean()) for side in ("chosen", "rejected")}
        return {**means, "entropy": float(-(logps.exp() * logps).sum())}


def taken(logps: Tensor, sequences: Tensor) -> Tensor:
    return logps.gather(-1, sequences[..., None])[..., 0]


def sequence_logps(logps: Tensor, sequences: Tensor) -> Tensor:
    return taken(logps, sequences).sum(1)


@pytest.mark.slow
def test_alpha_holds_the_policy_near_the_reference() -> None:
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(3):
        world = World.make(seed)
        for alpha in (0.0, 0.1, 0.5, 1.0):
            runs.setdefault(f"tdpo2 {alpha}", []).append(world.train("tdpo2", alpha=alpha))
        runs.setdefault("tdpo1", []).append(world.train("tdpo1"))

    def mean(run: str, key: str) -> float:
        return sum(r[key] for r in runs[run]) / len(runs[run])

    ordered = [f"tdpo2 {alpha}" for alpha in (0.0, 0.1, 0.5, 1.0)]  # alpha 0 is DPO
    for weaker, stronger in itertools.pairwise(ordered):
        assert mean(weaker, "chosen") > mean(stronger, "chosen")
        assert mean(weaker, "rejected") > mean(stronger, "rejected")
        assert mean(weaker, "entropy") < mean(stronger, "entropy")
    for run in ordered:
        assert mean(run, "rejected") > mean(run, "chosen")
    for run in ordered:  # a small effect against DPO: a margin of 12 % on means
        assert mean("tdpo1", "chosen") > 0.88 * mean(run, "chosen")
