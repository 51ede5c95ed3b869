"""gae, reinforce, normalize, kl_penalty and rto: against plain loops; ranks, state, refusals."""

from __future__ import annotations

import math

import pytest
import torch

from tests.training.online.made import close, made_batch, made_step, on_two_ranks, part, reloaded
from tokengrain.errors import RecipeError, RunError
from tokengrain.method import make_rollout_credit
from tokengrain.scoring.reference import ReferenceScores


def plain_gae(step, gamma, lam):
    """Advantages and returns of every token, by the recursion, one completion after the other."""
    advantages, returns = [], []
    tokens = torch.zeros(step.segments.total) if step.token_rewards is None else step.token_rewards
    for c, (r, v) in enumerate(zip(step.segments.split(tokens), step.segments.split(step.quantity("values")))):
        r, v, a, found = r.tolist(), v.tolist(), 0.0, []
        r[-1] += float(step.rewards[c])
        for t in reversed(range(len(r))):
            following = v[t + 1] if t + 1 < len(r) else 0.0
            a = r[t] + gamma * following - v[t] + gamma * lam * a
            found.insert(0, a)
        advantages += found
        returns += [x + y for x, y in zip(found, v)]
    return torch.tensor(advantages), torch.tensor(returns)


def test_gae_is_the_recursion_on_token_rewards_and_outcome():
    batch = made_batch()
    step = made_step(batch, token_rewards=torch.randn(batch.segments.total))
    make_rollout_credit("gae", gamma=0.9, lam=0.7, whiten=False)(step)
    advantages, returns = plain_gae(step, 0.9, 0.7)
    close(step.advantages, advantages)
    close(step.quantities["returns"], returns)
    error = (returns - step.quantity("values")).var() / returns.var()
    assert step.metrics["gae/explained_variance"] == pytest.approx(1 - float(error), rel=1e-5)


def test_gae_whitens_over_what_is_scored_and_leaves_out_the_rest():
    step = made_step()
    step.rewards[2] = math.nan
    make_rollout_credit("gae")(step)
    out = step.segments.ids == 2
    assert not step.advantages[out].any()
    assert torch.equal(step.quantities["returns"][out], step.quantity("values")[out])
    known = step.advantages[~out]
    assert abs(float(known.mean())) < 1e-6
    assert float(known.var(unbiased=False)) == pytest.approx(1, abs=1e-5)
    # Targets are not whitened.
    close(step.quantities["returns"][~out], plain_gae(step, 1.0, 0.95)[1][~out])


def test_gae_without_a_critic_is_the_reward_to_come():
    step = made_step(token_rewards=None)
    make_rollout_credit("gae", lam=1, use_values=False, whiten=False)(step)
    assert torch.equal(step.advantages, step.broadcast(step.rewards))
    assert torch.equal(step.quantities["returns"], step.advantages)


def test_gae_on_two_ranks_is_that_of_one():
    step = made_step()
    shares, _ = on_two_ranks(step, lambda: make_rollout_credit("gae"))
    make_rollout_credit("gae")(step)
    for rank, share in enumerate(shares):
        own = part(step, range(rank, 4, 2))
        close(share.advantages, own.advantages)
        assert share.metrics["gae/explained_variance"] == pytest.approx(step.metrics["gae/explained_variance"])


def test_gae_refusals():
    with pytest.raises(RecipeError, match=r"lam is 0\.95, which needs a critic"):
        make_rollout_credit("gae", use_values=False)
    with pytest.raises(RecipeError, match=r"lam = 1\.5"):
        make_rollout_credit("gae", lam=1.5)
    step = made_step()
    del step.quantities["values"]
    with pytest.raises(RunError, match="has no 'values'"):
        make_rollout_credit("gae")(step)
    assert make_rollout_credit("gae").needs == {"values"}
    assert make_rollout_credit("gae", lam=1, use_values=False).needs == frozenset()


def test_reinforce_with_a_q_function():
    """Q-RM: scores over their deviation, the last token the mean of its completion; with a critic A = r - c V / s."""
    batch = made_batch()
    z = torch.randn(batch.segments.total) * 20 + 3
    step = made_step(batch, token_rewards=z, rewards=torch.zeros(batch.n_completions))
    make_rollout_credit("reinforce", scaling="std", rescore_last=True)(step)
    for got, scores in zip(step.segments.split(step.advantages), step.segments.split(z / z.std(unbiased=False))):
        close(got[:-1], scores[:-1])
        close(got[-1], scores.mean())
    step = made_step(batch, token_rewards=z, rewards=torch.zeros(batch.n_completions))
    credit = make_rollout_credit("reinforce", scaling="zscore", value_coef=0.01)
    credit(step)
    expected, v = (z - z.mean()) / z.std(unbiased=False), step.quantity("values")
    close(step.quantities["returns"], expected)
    close(step.advantages, expected - 0.01 * v / v.std(unbiased=False))
    assert credit.needs == {"values"}
    assert credit.provides == {"returns"}


def test_reinforce_with_outcomes():
    step = made_step()
    step.rewards[0] = math.nan
    make_rollout_credit("reinforce")(step)
    expected = torch.where(torch.isnan(step.rewards), 0.0, step.rewards)
    assert torch.equal(step.advantages, step.broadcast(expected))
    make_rollout_credit("reinforce", outcome="last")(step)
    assert torch.equal(step.segments.sum(step.advantages), expected)
    assert torch.equal(step.advantages != 0, step.segments.is_last & (step.broadcast(expected) != 0))
    tokens = torch.randn(step.segments.total)
    step.token_rewards = tokens
    make_rollout_credit("reinforce")(step)
    known = step.segments.ids != 0
    close(step.advantages[known], (tokens + step.broadcast(expected))[known])
    assert not step.advantages[~known].any()
    step.token_rewards = None
    with pytest.raises(RunError, match="no reward was given per token"):
        make_rollout_credit("reinforce", outcome="ignore")(step)


def test_reinforce_on_two_ranks_is_that_of_one():
    batch = made_batch()
    step = made_step(batch, token_rewards=torch.randn(batch.segments.total))
    shares, _ = on_two_ranks(step, lambda: make_rollout_credit("reinforce", scaling="zscore", value_coef=0.5))
    make_rollout_credit("reinforce", scaling="zscore", value_coef=0.5)(step)
    for rank, share in enumerate(shares):
        close(share.advantages, part(step, range(rank, 4, 2)).advantages)


def test_normalize_remembers_what_it_has_seen():
    make = lambda: make_rollout_credit("normalize")  # noqa: E731
    credit = make()
    first, second = (torch.randn(12) * 3 + 1 for _ in range(2))
    credit(made_step(rewards=first))
    credit = reloaded(credit, make)
    step = made_step(rewards=torch.cat([second[:-1], torch.tensor([math.nan])]))
    credit(step)
    seen = torch.cat([first, second[:-1]])
    close(step.rewards[:-1], (second[:-1] - seen.mean()) / seen.std(unbiased=False))
    assert math.isnan(step.rewards[-1])


def test_normalize_by_rollout_by_constants_and_of_tokens():
    batch = made_batch()
    tokens = torch.randn(batch.segments.total) + 2
    step = made_step(batch, token_rewards=tokens)
    make_rollout_credit("normalize", of="tokens", over="rollout", scaling="std")(step)
    close(step.token_rewards, tokens / tokens.std(unbiased=False))
    step = made_step(rewards=torch.arange(12.0))
    make_rollout_credit("normalize", mean=2, std=4, clip=1.5)(step)
    close(step.rewards, ((torch.arange(12.0) - 2) / 4).clamp(-1.5, 1.5))
    with pytest.raises(RecipeError, match="expected both or neither"):
        make_rollout_credit("normalize", mean=2)
    with pytest.raises(RunError, match="no reward was given per token"):
        make_rollout_credit("normalize", of="tokens")(made_step())


def test_kl_penalty_adapts_and_its_state_is_equal_on_all_ranks():
    make = lambda: make_rollout_credit("kl_penalty", coef=0.2, target=0.05, horizon=50)  # noqa: E731
    step = made_step()
    shares, credits = on_two_ranks(step, make)
    alone = make()
    alone(step)
    k1 = step.quantity("old_logps") - step.quantity("ref_logps")
    close(step.token_rewards, -0.2 * k1)
    error = min(max(float(k1.mean()) / 0.05 - 1, -0.2), 0.2)
    assert alone.state_dict()["coef"] == pytest.approx(0.2 * (1 + error * 12 / 50))
    assert credits[0].state_dict() == credits[1].state_dict()
    assert credits[0].state_dict()["coef"] == pytest.approx(alone.state_dict()["coef"])
    close(shares[1].token_rewards, part(step, [1, 3]).token_rewards)
    again = made_step(token_rewards=torch.ones(step.segments.total))
    reloaded(alone, make)(again)
    close(again.token_rewards, 1 - alone.state_dict()["coef"] * k1)
    fixed = make_rollout_credit("kl_penalty", form="abs", coef=0.5)
    step = made_step()
    fixed(step)
    close(step.token_rewards, -0.5 * k1.abs())
    assert fixed.state_dict() == {"coef": 0.5}


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


def test_rto_refusals_and_state():
    with pytest.raises(RecipeError, match="needs a guide"):
        make_rollout_credit("rto")
    with pytest.raises(RecipeError, match="needs a tokenizer"):
        make_rollout_credit("rto", model=Columns(0.1), variant="semi")
    make_rollout_credit("rto", variant="ppo")(made_step())
    make = lambda: make_rollout_credit("rto", model=Columns(0.03), beta2=0.1, kl_target=0.5, kl_horizon=20)  # noqa: E731
    credit = make()
    credit(made_step())
    assert credit.state_dict()["coef"] != 0.1
    assert reloaded(credit, make).state_dict() == credit.state_dict()


def test_prompts_that_a_filter_dropped_take_no_part():
    step, without = made_step(), part(made_step(), [0, 1, 3])
    step.drop(torch.tensor([True, True, False, True]))
    make_rollout_credit("gae")(step)
    make_rollout_credit("gae")(without)
    dropped = step.group[step.segments.ids] == 2
    close(step.advantages[~dropped], without.advantages)
    assert not step.advantages[dropped].any()
