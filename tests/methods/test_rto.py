"""RTO's token reward: its parts, the totals of its variants, and what it is for an optimal DPO policy."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.online.made import close, made_step, reloaded
from tokengrain.batch import Segments
from tokengrain.errors import RecipeError
from tokengrain.method import make_rollout_credit
from tokengrain.methods.ppo import adapted
from tokengrain.methods.rto import RTO, RTORewards
from tokengrain.scoring.reference import ReferenceScores

F64 = torch.float64


@dataclass
class Rollout:
    segments: Segments
    policy: Tensor
    ref: Tensor
    dpo: Tensor
    sentence: Tensor
    ends: Tensor

    def __call__(self, **settings: Any) -> Any:
        quantities = {
            "ref_logps": self.ref,
            "dpo_logps": self.dpo,
            "sentence_rewards": self.sentence,
            "ends": self.ends,
        }
        quantities |= {name: settings.pop(name) for name in list(settings) if name in quantities}
        return rto_rewards(self.policy, self.segments, quantities, **settings)


def rto_rewards(logps: Tensor, segments: Segments, quantities: dict[str, Tensor], **settings: Any) -> RTORewards:
    """The guide's log-probabilities are given, so no model is asked."""
    return RTO(model="given", tokenizer="given", **settings).rewards(logps, segments, **quantities)


@pytest.fixture
def x() -> Rollout:
    generator = torch.Generator().manual_seed(0)
    segments = Segments.from_lengths([6, 1, 4])
    policy, ref, dpo = (-2 * torch.rand(11, dtype=F64, generator=generator) for _ in range(3))
    delimiter = torch.tensor([0, 1, 0, 0, 1, 0, 0, 0, 1, 0, 0]).bool()
    sentence = torch.tensor([1.0, -0.5, 0.3], dtype=F64)
    return Rollout(segments, policy, ref, dpo, sentence, delimiter)


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
    ppo = x(variant="ppo", dpo_logps=x.dpo).rewards
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


def test_clipping_bounds_the_log_ratio_at_one_nat_by_default(x: Rollout) -> None:
    found = x(dpo_logps=x.ref + torch.linspace(-3, 3, 11, dtype=F64))
    torch.testing.assert_close(found.dense, 0.05 * torch.linspace(-3, 3, 11, dtype=F64).clamp(-1, 1))
    big = x(sentence_rewards=torch.tensor([30.0, -30.0, 1.0], dtype=F64), beta3=0.5)
    assert big.sentence.tolist() == [5.0, -5.0, 0.5]
    assert x(sentence_rewards=torch.tensor([30.0, 0.0, 0.0]), sentence_clip=None).sentence[0] == 30


def test_metrics_warn_when_the_dense_part_dominates(x: Rollout) -> None:
    assert x(beta1=10.0, clip=None).metrics["rto/dominates"].tolist() == [1.0, 1.0, 1.0]
    assert x(beta1=1e-3).metrics["rto/dominates"].tolist() == [0.0, 0.0, 0.0]


def test_bad_settings() -> None:
    with pytest.raises(RecipeError, match="credit 'rto' needs a guide"):
        make_rollout_credit("rto")
    with pytest.raises(RecipeError, match="credit 'rto': variant 'semi' needs a tokenizer"):
        make_rollout_credit("rto", model=Columns(0.1), variant="semi")
    with pytest.raises(RecipeError, match="credit 'rto': variant = 'other'"):
        make_rollout_credit("rto", model=Columns(0.1), variant="other")


def test_no_gradient(x: Rollout) -> None:
    for name in ("policy", "ref", "dpo", "sentence"):
        setattr(x, name, getattr(x, name).requires_grad_())
    found = x()
    assert not any(v.requires_grad for v in (found.rewards, found.dense, found.kl, found.sentence))


class Columns:
    """A `Reference` whose log-probabilities are a function of the token ids."""

    def __init__(self, slope: float) -> None:
        self.slope, self.calls = slope, 0

    def __call__(self, batch, want):
        self.calls += 1
        return ReferenceScores(logps=-self.slope * batch.labels.float())


def test_rto_is_equation_4_7():
    step = made_step()
    step.rewards = torch.arange(12.0) - 3
    step.rewards[5] = math.nan
    guide, base = Columns(0.03), Columns(0.01)
    before = torch.randn(step.segments.total)
    step.token_rewards = before
    outcome = step.rewards.clone()
    make_rollout_credit("rto", model=guide, reference=base, beta1=0.3, beta2=0.02, beta3=2, clip=0.2, sentence_clip=4)(
        step
    )
    d = (0.3 * -0.02 * step.batch.labels.float()).clamp(-0.2, 0.2)
    assert 0 < float((d.abs() == 0.2).float().mean()) < 1
    k = step.quantity("old_logps") - step.quantity("ref_logps")
    close(step.token_rewards, before + d - 0.02 * k)
    known = ~outcome.isnan()
    close(step.rewards[known], 2 * outcome[known].clamp(-4, 4))
    assert math.isnan(step.rewards[5])


def test_rto_variants_keep_their_totals():
    totals = {}
    for variant in ("rto", "delayed", "shaping", "ppo"):
        step = made_step()
        make_rollout_credit("rto", model=Columns(0.03), variant=variant, clip=None)(step)
        totals[variant] = step.total
    close(totals["rto"], totals["delayed"])
    close(totals["shaping"], totals["ppo"])
    assert not torch.allclose(totals["rto"], totals["ppo"], atol=1e-3)


def test_rto_semi_stands_at_the_ends_of_sentences():
    class Dots:
        def batch_decode(self, ids, **_):
            return ["." if i[0] % 3 == 0 else "x" for i in ids]

    step = made_step()
    make_rollout_credit("rto", model=Columns(0.03), variant="semi", clip=None, beta2=0, tokenizer=Dots())(step)
    ends = (step.batch.labels % 3 == 0) | step.segments.is_last
    assert torch.equal(step.token_rewards != 0, ends)
    whole = made_step()
    make_rollout_credit("rto", model=Columns(0.03), clip=None, beta2=0)(whole)
    close(step.total, whole.total)


def test_rto_asks_models_within_the_token_budget():
    whole, parts = made_step(), made_step(max_tokens=20)
    guide = Columns(0.03)
    make_rollout_credit("rto", model=guide)(whole)
    assert guide.calls == 1
    make_rollout_credit("rto", model=guide)(parts)
    assert guide.calls > 2
    assert torch.equal(whole.token_rewards, parts.token_rewards)


def test_the_adapted_coefficient_is_its_state():
    make_rollout_credit("rto", variant="ppo")(made_step())
    make = lambda: make_rollout_credit("rto", model=Columns(0.03), beta2=0.1, kl_target=0.5, kl_horizon=20)  # noqa: E731
    credit = make()
    credit(made_step())
    assert credit.state_dict()["coef"] != 0.1
    assert reloaded(credit, make).state_dict() == credit.state_dict()


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
    quantities = {"ref_logps": lq, "dpo_logps": ld, "sentence_rewards": none}
    r = rto_rewards(lq, segments, quantities, beta1=beta, clip=None).rewards
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
        quantities = {"ref_logps": _token_logps(log_ref), "dpo_logps": _token_logps(log_dpo), "sentence_rewards": none}
        found = rto_rewards(_token_logps(log_policy), segments, quantities, beta1=beta1, beta2=beta2, clip=None)
        return segments.sum(found.rewards)

    best = totals(optimal)
    torch.testing.assert_close(best, best[:1].expand_as(best))
    for other in (log_ref, log_dpo, (optimal + 0.3 * reward.flip(0)).log_softmax(0)):
        value = (other.exp() * totals(other)).sum()
        assert value <= best[0] + 1e-12
    if b == 1:
        torch.testing.assert_close(optimal, log_dpo)


def test_adaptive_kl() -> None:
    assert adapted(0.2, 6.0, 512, target=6.0, horizon=10000.0) == 0.2
    assert adapted(0.2, 60.0, 1000, target=6.0, horizon=10000.0) == pytest.approx(0.2 * 1.02)  # the error is bounded
