"""RTO's token reward: its parts, the totals of its variants, and what it is for an optimal DPO policy."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tokengrain.batch import Segments
from tokengrain.methods.aepo import AdaptiveKL
from tokengrain.methods.rto import rto_rewards, sentence_ids

F64 = torch.float64


@dataclass
class Rollout:
    segments: Segments
    policy: Tensor
    ref: Tensor
    dpo: Tensor
    sentence: Tensor
    sentences: Tensor

    def __call__(self, **settings: Any) -> Any:
        quantities = {
            "ref_logps": self.ref,
            "dpo_logps": self.dpo,
            "sentence_rewards": self.sentence,
            "sentences": self.sentences,
        }
        return rto_rewards(self.policy, self.segments, **{**quantities, **settings})


@pytest.fixture
def x() -> Rollout:
    generator = torch.Generator().manual_seed(0)
    segments = Segments.from_lengths([6, 1, 4])
    policy, ref, dpo = (-2 * torch.rand(11, dtype=F64, generator=generator) for _ in range(3))
    delimiter = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0]).bool()
    sentence = torch.tensor([1.0, -0.5, 0.3], dtype=F64)
    return Rollout(segments, policy, ref, dpo, sentence, sentence_ids(delimiter, segments))


def test_equals_the_formula_token_by_token(x: Rollout) -> None:
    expected = []
    rows = zip(*(x.segments.split(v) for v in (x.policy, x.ref, x.dpo)), x.sentence.tolist(), strict=True)
    for lp, lq, ld, s in rows:
        for t in range(len(lp)):
            d = min(max(0.3 * float(ld[t] - lq[t]), -0.1), 0.1)
            last = s * 2.0 if t == len(lp) - 1 else 0.0
            expected.append(d - 0.05 * float(lp[t] - lq[t]) + last)
    found = x(beta1=0.3, beta2=0.05, beta3=2.0, clip=0.1)
    torch.testing.assert_close(found.rewards, torch.tensor(expected, dtype=F64))
    assert 0 < found.metrics["rto/clipped"].sum() < 3


def test_without_a_dense_part_it_is_ppo(x: Rollout) -> None:
    ppo = x(variant="ppo", dpo_logps=None).rewards
    assert torch.equal(x(beta1=0.0).rewards, ppo)
    assert torch.equal(x(dpo_logps=x.ref).rewards, ppo)
    k = x.policy - x.ref
    torch.testing.assert_close(ppo, -0.01 * k + torch.where(x.segments.is_last, x.segments.broadcast(x.sentence), 0.0))


@pytest.mark.parametrize("clip", ["beta1", 0.07, None])
def test_totals_of_the_variants(x: Rollout, clip: Any) -> None:
    settings = {"beta1": 0.3, "beta2": 0.05, "clip": clip}
    totals = {v: x.segments.sum(x(variant=v, **settings).rewards) for v in ("rto", "semi", "delayed", "shaping", "ppo")}
    torch.testing.assert_close(totals["semi"], totals["rto"])
    torch.testing.assert_close(totals["delayed"], totals["rto"])
    torch.testing.assert_close(totals["shaping"], totals["ppo"])
    assert not torch.allclose(totals["rto"], totals["ppo"])
    found = x(**settings)
    expected = x.segments.sum(found.dense) - 0.05 * x.segments.sum(x.policy - x.ref) + x.sentence
    torch.testing.assert_close(totals["rto"], expected)


def test_where_the_variants_put_it(x: Rollout) -> None:
    def dense(variant: str) -> Tensor:
        return x(variant=variant, beta2=0.0, beta3=0.0).rewards

    places = {
        "semi": [1, 4, 5, 6, 8, 10],  # ends of sentences, and of completions
        "delayed": [5, 6, 10],
    }
    for variant, expected in places.items():
        assert dense(variant).nonzero().flatten().tolist() == expected
    d = dense("rto")
    torch.testing.assert_close(dense("semi")[4], d[2:5].sum())
    others = ~x.segments.is_last
    assert torch.equal(dense("shaping")[others], d[others])


def test_sentences_end_with_their_delimiter_and_with_the_completion() -> None:
    segments = Segments.from_lengths([4, 3])
    ids = sentence_ids(torch.tensor([0, 1, 0, 0, 0, 1, 1]), segments)
    assert ids.tolist() == [0, 0, 1, 1, 2, 2, 3]


def test_clipping_bounds_the_log_ratio_at_one_nat_by_default(x: Rollout) -> None:
    found = x(dpo_logps=x.ref + torch.linspace(-3, 3, 11, dtype=F64))
    torch.testing.assert_close(found.dense, 0.05 * torch.linspace(-3, 3, 11, dtype=F64).clamp(-1, 1))
    big = x(sentence_rewards=torch.tensor([30.0, -30.0, 1.0], dtype=F64), beta3=0.5)
    assert big.sentence.tolist() == [5.0, -5.0, 0.5]
    assert x(sentence_rewards=torch.tensor([30.0, 0.0, 0.0]), sentence_clip=None).sentence[0] == 30


def test_metrics_warn_when_the_dense_part_dominates(x: Rollout) -> None:
    assert x(beta1=10.0, clip=None).metrics["rto/dominates"].tolist() == [1.0, 1.0, 1.0]
    assert x(beta1=1e-3).metrics["rto/dominates"].tolist() == [0.0, 0.0, 0.0]


def test_refusals(x: Rollout) -> None:
    with pytest.raises(ValueError, match=r"completions \[1\] have no sentence reward"):
        x(sentence_rewards=torch.tensor([1.0, math.nan, 0.0]))
    with pytest.raises(ValueError, match="needs sentences"):
        x(variant="semi", sentences=None)
    with pytest.raises(ValueError, match="needs dpo_logps"):
        x(dpo_logps=None)
    with pytest.raises(ValueError, match="variant must be"):
        x(variant="other")


def test_no_gradient(x: Rollout) -> None:
    for name in ("policy", "ref", "dpo", "sentence"):
        setattr(x, name, getattr(x, name).requires_grad_())
    found = x()
    assert not any(v.requires_grad for v in (found.rewards, found.dense, found.kl, found.sentence))


# A world small enough to list: V symbols, T steps, every sequence.
V, T = 3, 3
SEQUENCES = list(itertools.product(range(V), repeat=T))


def _token_logps(log_weights: Tensor) -> Tensor:
    """Log-probabilities of every token of every sequence, for sequences drawn with exp(log_weights): `[V^T * T]`."""
    grid = log_weights.view((V,) * T)
    prefixes = [torch.logsumexp(grid.reshape(V**t, -1), dim=1) for t in range(T + 1)]
    out = []
    for y in SEQUENCES:
        index = 0
        for t, token in enumerate(y):
            parent, index = index, index * V + token
            out.append(prefixes[t + 1][index] - prefixes[t][parent])
    return torch.stack(out)


def _world() -> tuple[Segments, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    ref, reward = (torch.randn(V**T, dtype=F64, generator=generator) for _ in range(2))
    return Segments.from_lengths([T] * V**T), ref.log_softmax(0), reward


def test_an_optimal_dpo_policy_gives_the_reward_up_to_potentials() -> None:
    """beta log(pi*/ref) at t is V*(after) - V*(before), V* the soft value, and the reward itself at the end."""
    segments, log_ref, reward = _world()
    beta = 0.7
    lq, ld = _token_logps(log_ref), _token_logps(log_ref + reward / beta)
    none = torch.zeros(V**T, dtype=F64)
    r = rto_rewards(lq, segments, ref_logps=lq, dpo_logps=ld, sentence_rewards=none, beta1=beta, clip=None).rewards
    grid_q, grid_r = log_ref.view((V,) * T), reward.view((V,) * T)
    for i, y in enumerate(SEQUENCES):
        for t in range(T):
            after = beta * torch.logsumexp((grid_q[y[: t + 1]] + grid_r[y[: t + 1]] / beta).flatten(), 0)
            after = after - beta * torch.logsumexp(grid_q[y[: t + 1]].flatten(), 0)
            before = beta * torch.logsumexp((grid_q[y[:t]] + grid_r[y[:t]] / beta).flatten(), 0)
            before = before - beta * torch.logsumexp(grid_q[y[:t]].flatten(), 0)
            torch.testing.assert_close(r[i * T + t], after - before)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.05, 0.01), (0.3, 0.3)])
def test_the_optimum_without_a_sentence_reward(beta1: float, beta2: float) -> None:
    """For pi* ~ ref^(1-b) dpo^b, b = beta1 / beta2, every sequence has the same total, as at an optimum with KL."""
    segments, log_ref, reward = _world()
    log_dpo = (log_ref + reward).log_softmax(0)
    b = beta1 / beta2
    optimal = ((1 - b) * log_ref + b * log_dpo).log_softmax(0)
    none = torch.zeros(V**T, dtype=F64)

    def totals(log_policy: Tensor) -> Tensor:
        found = rto_rewards(
            _token_logps(log_policy),
            segments,
            ref_logps=_token_logps(log_ref),
            dpo_logps=_token_logps(log_dpo),
            sentence_rewards=none,
            beta1=beta1,
            beta2=beta2,
            clip=None,
        )
        return segments.sum(found.rewards)

    best = totals(optimal)
    torch.testing.assert_close(best, best[:1].expand_as(best))
    for other in (log_ref, log_dpo, (optimal + 0.3 * reward.flip(0)).log_softmax(0)):
        value = (other.exp() * totals(other)).sum()
        assert value <= best[0] + 1e-12
    if b == 1:
        torch.testing.assert_close(optimal, log_dpo)


def test_adaptive_kl() -> None:
    controller = AdaptiveKL(0.2, target=6.0)
    assert controller.update(6.0, 512) == 0.2
    assert controller.update(60.0, 1000) == pytest.approx(0.2 * 1.02)  # the error is bounded
    resumed = AdaptiveKL(9.0, target=6.0)
    resumed.load_state_dict(controller.state_dict())
    assert resumed.update(1.0, 10) == controller.update(1.0, 10) < 0.2 * 1.02
