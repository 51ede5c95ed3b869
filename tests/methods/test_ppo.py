"""PPO and REINFORCE: losses, GAE, whitening; the credits against plain loops, on ranks, resumed."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.methods.rollouts import F64, Rollouts, rollouts
from tests.training.online.made import close, made_batch, made_step, on_two_ranks, part, reloaded
from tokengrain.batch import Segments
from tokengrain.errors import RecipeError, RunError
from tokengrain.method import make_rollout_credit
from tokengrain.methods._clipped import value_loss
from tokengrain.methods._shaping import Moments
from tokengrain.methods.ppo import gae, ppo_policy_loss, whitened


def _critic(x: Rollouts) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    old, returns, step = (torch.randn(x.segments.total, dtype=F64, generator=generator) for _ in range(3))
    return (old + 0.4 * step).requires_grad_(), old, returns


def test_clipped_value_loss_is_the_larger_error() -> None:
    x = rollouts((6, 3, 1, 8))
    V, old, R = _critic(x)
    output = value_loss(V, x.segments, returns=R, old_values=old, clip_range=0.2, weight=0.5, reduction="mean")
    clipped = old + torch.clamp(V - old, -0.2, 0.2)
    larger = torch.maximum((V - R) ** 2, (clipped - R) ** 2)
    torch.testing.assert_close(output.losses, torch.stack([0.5 * part.mean() for part in x.segments.split(larger)]))
    wins = ((V - old).abs() > 0.2) & ((clipped - R) ** 2 > (V - R) ** 2)
    assert 0 < int(wins.sum()) < len(V)
    gradient = torch.autograd.grad(output.losses.sum(), V)[0]
    assert (gradient[wins] == 0).all()
    plain = torch.autograd.grad(value_loss(V, x.segments, returns=R, weight=0.5, reduction="mean").losses.sum(), V)[0]
    torch.testing.assert_close(gradient[~wins], plain[~wins])
    torch.testing.assert_close(output.metrics["values/clipped"], x.segments.mean(wins.to(F64)))


def test_without_a_range_old_values_do_not_matter() -> None:
    x = rollouts()
    V, old, R = _critic(x)
    a, b = (value_loss(V, x.segments, returns=R, old_values=o).losses for o in (None, old))
    assert torch.equal(a, b)
    assert torch.equal(value_loss(V, x.segments, returns=R, old_values=V, clip_range=0.2).losses, a)
    with pytest.raises(ValueError, match="old_values"):
        value_loss(V, x.segments, returns=R, clip_range=0.2)


def test_on_policy_gradient_is_the_advantage_over_length_and_completions() -> None:
    x = rollouts()
    output = ppo_policy_loss(x.old_logps.requires_grad_(), x.segments, old_logps=x.old_logps.detach(),
                             advantages=x.advantages, reduction="mean")  # fmt: skip
    gradient = torch.autograd.grad(x.normalised(output), x.old_logps)[0]
    lengths = x.segments.broadcast(x.segments.lengths)
    torch.testing.assert_close(gradient, -x.advantages / lengths / len(x.segments))


def test_gradient_is_exactly_zero_where_the_clip_acts() -> None:
    segments = Segments.from_lengths([4])
    logps = torch.tensor([0.5, -0.5, 0.5, -0.5], dtype=F64, requires_grad=True)
    A = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=F64)
    output = ppo_policy_loss(logps, segments, old_logps=torch.zeros(4, dtype=F64), advantages=A, reduction="mean")
    gradient = torch.autograd.grad(output.losses.sum(), logps)[0]
    assert gradient[:2].tolist() == [0.0, 0.0]
    assert (gradient[2:] != 0).all()


LENGTHS = [5, 0, 1, 17, 2, 8]


def _random(n: int, seed: int) -> Tensor:
    return torch.randn(n, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def segments() -> Segments:
    return Segments.from_lengths(LENGTHS)


def _slow(rewards: Tensor, values: Tensor, segments: Segments, gamma: float, lam: float) -> Tensor:
    out = []
    for r, v in zip(segments.split(rewards), segments.split(values), strict=True):
        running, row = 0.0, []
        for t in reversed(range(len(r))):
            following = v[t + 1] if t + 1 < len(r) else 0.0
            running = r[t] + gamma * following - v[t] + gamma * lam * running
            row.append(running)
        out += row[::-1]
    return torch.stack(out)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (1.0, 1.0), (0.9, 0.7), (1.0, 0.0), (0.0, 0.5)])
def test_equals_the_recursion(segments: Segments, gamma: float, lam: float) -> None:
    r, v = _random(segments.total, 0), _random(segments.total, 1)
    found = gae(r, segments, values=v, gamma=gamma, lam=lam)
    torch.testing.assert_close(found.advantages, _slow(r, v, segments, gamma, lam), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.returns, found.advantages + v)


def test_lambda_1_forgets_the_critic_and_lambda_0_is_the_one_step_error(segments: Segments) -> None:
    r, v = _random(segments.total, 0), _random(segments.total, 1)
    to_go = torch.cat([part.flip(0).cumsum(0).flip(0) for part in segments.split(r)])
    torch.testing.assert_close(gae(r, segments, values=v, lam=1.0).returns, to_go)
    torch.testing.assert_close(gae(r, segments, lam=1.0).advantages, to_go)
    following = torch.cat([torch.cat([part[1:], part.new_zeros(min(len(part), 1))]) for part in segments.split(v)])
    torch.testing.assert_close(gae(r, segments, values=v, lam=0.0).advantages, r + following - v)


def test_completions_do_not_see_each_other() -> None:
    both, one = Segments.from_lengths([3, 4]), Segments.from_lengths([3])
    r, v = _random(7, 0), _random(7, 1)
    r[3:] = torch.nan
    torch.testing.assert_close(
        gae(r, both, values=v).advantages[:3], gae(r[:3], one, values=v[:3]).advantages, rtol=0, atol=0
    )


def test_long_completions_lose_no_digits() -> None:
    from scipy.signal import lfilter

    n = 3001
    r, segments = _random(n, 2), Segments.from_lengths([n])
    expected = lfilter([1], [1, -0.999], r.flip(0).numpy())[::-1].copy()
    torch.testing.assert_close(
        gae(r, segments, lam=0.999).advantages, torch.from_numpy(expected), rtol=1e-11, atol=1e-9
    )


def test_types_and_gradients() -> None:
    segments = Segments.from_lengths([4])
    r = _random(4, 0).float().requires_grad_()
    found = gae(r, segments, values=_random(4, 1).bfloat16().requires_grad_())
    assert found.advantages.dtype == found.returns.dtype == torch.float32
    assert not found.advantages.requires_grad
    assert not found.returns.requires_grad
    assert gae(r[:0], Segments.from_lengths([0, 0])).advantages.shape == (0,)


def test_whitening() -> None:
    a = 3 * _random(40, 3) + 7
    white = whitened(a)
    assert white.mean().item() == pytest.approx(0, abs=1e-12)
    assert white.var(correction=0).item() == pytest.approx(1)
    torch.testing.assert_close(whitened(2 * a - 5), white)
    torch.testing.assert_close(
        torch.cat([whitened(p, Moments.of(p1) + Moments.of(p2)) for p, p1, p2 in _ranks(a)]), white
    )
    assert torch.equal(whitened(torch.full((5,), 0.3)), torch.zeros(5))
    assert not whitened(a.requires_grad_()).requires_grad


def _ranks(a: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    first, second = a[:13], a[13:]
    return [(first, first, second), (second, first, second)]


def test_nearly_constant_advantages_are_not_blown_up() -> None:
    a = 1e-6 * _random(10, 4)
    torch.testing.assert_close(whitened(a), (a - a.mean()) / 1e-4)


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
    with pytest.raises(RecipeError, match=r"gamma = 1\.1"):
        make_rollout_credit("gae", gamma=1.1)
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


def test_prompts_that_a_filter_dropped_take_no_part():
    step, without = made_step(), part(made_step(), [0, 1, 3])
    step.drop(torch.tensor([True, True, False, True]))
    make_rollout_credit("gae")(step)
    make_rollout_credit("gae")(without)
    dropped = step.group[step.segments.ids] == 2
    close(step.advantages[~dropped], without.advantages)
    assert not step.advantages[dropped].any()
