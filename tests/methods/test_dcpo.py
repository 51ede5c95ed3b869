"""DCPO: bounds and loss against the plain form; smooth advantages over visits, orders, ranks and resumes."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.methods.rollouts import F64, Rollouts, plain_token_loss, rollouts, rows
from tests.training.online.made import close, made_batch, made_step, on_two_ranks, part, reloaded
from tokengrain.batch import Segments
from tokengrain.errors import RecipeError
from tokengrain.loss import LossOutput
from tokengrain.method import ROLLOUT_CREDIT, make_rollout_credit
from tokengrain.methods.dcpo import DCPO, SmoothAdvantages, Visits, dcpo_bounds, dcpo_loss
from tokengrain.methods.grpo import group_advantages, grpo_loss

Q = torch.linspace(1e-3, 1, 2000, dtype=F64)


def _loss(x: Rollouts, **settings: Any) -> LossOutput:
    return dcpo_loss(x.logps, x.segments, old_logps=x.old_logps, advantages=x.advantages, **settings)


def test_bounds_solve_their_equation() -> None:
    low, high = dcpo_bounds(Q.log(), 0.16, 0.2, 10.0)
    real = Q > 4 * 0.16
    torch.testing.assert_close(((low - 1) * low * Q)[real], torch.full_like(Q[real], -0.16))
    assert (low[~real] == 0.5).all()
    free = high < 10
    torch.testing.assert_close(((high - 1) * high * Q)[free], torch.full_like(Q[free], 0.2))
    assert torch.equal(free, Q > 0.8 / 360)  # where the cap of 10 starts
    assert (low.diff() >= 0).all()
    assert (high.diff() <= 0).all()


def test_bounds_at_the_ends() -> None:
    low, high = dcpo_bounds(torch.zeros(1, dtype=F64), 0.16, 0.2, 10.0)
    assert float(low) == pytest.approx(0.8)
    assert float(high) == pytest.approx(0.5 + 0.5 * 1.8**0.5)
    low, high = dcpo_bounds(Q.log(), 0.0, 0.0, 10.0)
    assert (low == 1).all()
    assert (high == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, F64])
def test_improbable_tokens_have_the_limits(dtype: torch.dtype) -> None:
    low, high = dcpo_bounds(torch.tensor([-85.0, -200.0, -1e4, float("-inf")], dtype=dtype), 0.16, 0.2, 10.0)
    assert low.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert low.tolist() == [0.5] * 4
    assert high.tolist() == [10.0] * 4


def test_every_token_it_clips_is_clipped_by_grpo_too() -> None:
    low, high = dcpo_bounds(Q.log(), 0.16, 0.2, 10.0)
    assert (low <= 0.8 + 1e-12).all()
    assert (high >= torch.minimum(torch.tensor(1.2), 1 / Q) - 1e-12).all()
    x = rollouts((60, 40), spread=0.5)
    # A probability above 1 cannot be reached by an update.
    x.logps = x.logps.detach().clamp(max=0).requires_grad_()
    grpo = grpo_loss(x.logps, x.segments, old_logps=x.old_logps, advantages=x.advantages).tokens["clipped"]
    dcpo = _loss(x).tokens["clipped"]
    assert (grpo[dcpo != 0] == dcpo[dcpo != 0]).all()
    assert 0 < int((dcpo != 0).sum()) < int((grpo != 0).sum())


def test_equals_the_plain_form_in_value_and_gradient() -> None:
    x = rollouts((6, 3, 1, 8), spread=1.0)
    # One ratio beyond the cap with a negative advantage, one far below.
    with torch.no_grad():
        x.logps[:2] = x.old_logps[:2] + torch.tensor([3.0, -3.0], dtype=F64)
        x.advantages[:2] = -1.0
    q = x.old_logps.exp()
    low = 0.5 + 0.5 * torch.sqrt((1 - 4 * 0.16 / q).clamp(min=0))
    high = torch.minimum(0.5 + 0.5 * torch.sqrt(1 + 4 * 0.2 / q), torch.tensor(10.0, dtype=F64))
    tokens = plain_token_loss(x, low, high, cap=10.0)
    output = _loss(x)
    torch.testing.assert_close(output.tokens["loss"], tokens.detach())
    expected = rows(x, tokens, torch.mean).sum() / 2  # equation 8, mean over the two prompts
    loss = x.normalised(output, "prompt_mean")
    torch.testing.assert_close(loss, expected)
    grad = x.gradient(loss)
    torch.testing.assert_close(grad, x.gradient(expected))
    r, A = torch.exp(x.logps - x.old_logps).detach(), x.advantages
    outside = ((A > 0) & (r > high)) | ((A < 0) & ((r < low) | (r > 10)))
    assert torch.equal(grad == 0, outside)
    assert 2 <= int(outside.sum()) < len(A)


def test_on_policy() -> None:
    x = rollouts(spread=0.0)
    loss = x.normalised(_loss(x), "prompt_mean")
    torch.testing.assert_close(loss, -x.segments.mean(x.advantages).sum() / 2)
    lengths = x.segments.broadcast(x.segments.lengths)
    torch.testing.assert_close(x.gradient(loss), -x.advantages / lengths / 2)


def test_extremes_are_finite() -> None:
    old = torch.tensor([-100.0, -1e-9, -100.0, -1e-9])
    logps = torch.tensor([-1e-9, -100.0, -1e-9, -100.0], requires_grad=True)
    A = torch.tensor([1.0, 1.0, -1.0, -1.0])
    output = dcpo_loss(logps, Segments.from_lengths([4]), old_logps=old, advantages=A)
    torch.testing.assert_close(output.tokens["loss"], torch.tensor([-10.0, 0.0, 10.0, 0.8]))
    (grad,) = torch.autograd.grad(output.losses.sum(), logps)
    assert torch.isfinite(grad).all()
    with pytest.raises(ValueError, match="ratio_max must be above 1"):
        dcpo_loss(logps, Segments.from_lengths([4]), old_logps=old, advantages=A, ratio_max=1.0)


F64 = torch.float64


def _visit(history: DCPO, *rewards: float, prompt: Any = "a") -> SmoothAdvantages:
    group = torch.zeros(len(rewards), dtype=torch.long)
    result = history.smooth(torch.tensor(rewards, dtype=F64), group, [prompt])
    history.visits |= result.visits
    return result


def _random_visits(count: int, size: int = 5) -> Tensor:
    return torch.randn(count, size, dtype=F64, generator=torch.Generator().manual_seed(4))


def test_statistics_are_those_of_all_rewards_pooled() -> None:
    history, seen = DCPO(ddof=0), []
    for rewards in _random_visits(6).tolist():
        _visit(history, *rewards)
        seen += rewards
        assert history.visits["a"].mean == pytest.approx(np.mean(seen))
        assert history.visits["a"].std == pytest.approx(np.std(seen))


def test_first_visit_is_plain_standardisation() -> None:
    for ddof in (0, 1):
        s = _visit(DCPO(ddof=ddof), 1.0, 0.0, 0.5, 0.0)
        plain = group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=F64), torch.zeros(4).long(), eps=0, ddof=ddof)
        for values in (s.advantages, s.current, s.cumulative):
            torch.testing.assert_close(values, plain)


def test_equals_the_formulas_written_out() -> None:
    history = DCPO()
    for i, rewards in enumerate(_random_visits(5), start=1):
        n = history.visits.get("a", Visits()).count
        mean, std = rewards.mean(), rewards.std()
        old = history.visits.get("a", Visits())
        old_mean, old_std = old.mean, old.std
        total = (n * old_mean + mean) / i
        var = (n * old_std**2 + std**2 + n / i * (old_mean - mean) ** 2) / i
        a_new, a_tot = (rewards - mean) / std, (rewards - total) / var.sqrt()
        s_new, s_tot = (i - 1) / i * a_new + a_tot / i, a_new / i + (i - 1) / i * a_tot
        expected = [float(a if abs(a) < abs(b) else b) for a, b in zip(s_new, s_tot, strict=True)]
        result = _visit(history, *rewards.tolist())
        torch.testing.assert_close(result.advantages, torch.tensor(expected, dtype=F64))
        assert n == i - 1


def test_identical_rewards_learn_from_the_past_only() -> None:
    history = DCPO()
    _visit(history, 1.0, 0.0, 0.0, 0.0)
    s = _visit(history, 1.0, 1.0, 1.0, 1.0)
    torch.testing.assert_close(s.advantages, s.cumulative / 2)
    assert (s.advantages > 0).all()
    assert (s.current == 0).all()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.0])
def test_a_prompt_that_never_varies_has_no_advantage(value: float) -> None:
    history = DCPO()
    for size in (3, 5, 7, 4, 6):
        s = _visit(history, *[value] * size)
        assert s.advantages.tolist() == [0.0] * size
    assert history.visits["a"] == Visits(5, value, 0.0)


def test_shift_and_scale_change_nothing() -> None:
    histories, factors = [DCPO(), DCPO()], [(1.0, 0.0), (3.0, -2.0)]
    for rewards in _random_visits(4):
        results = [
            _visit(h, *(scale * rewards + shift).tolist()) for h, (scale, shift) in zip(histories, factors, strict=True)
        ]
        torch.testing.assert_close(results[0].advantages, results[1].advantages)


def test_differences_only() -> None:
    history = DCPO(normalize_by_std=False)
    _visit(history, 1.0, 0.0)
    s = _visit(history, 1.0, 1.0)
    torch.testing.assert_close(s.cumulative, torch.tensor([0.25, 0.25], dtype=F64))
    torch.testing.assert_close(s.advantages, torch.tensor([0.125, 0.125], dtype=F64))


def test_groups_are_independent_of_each_other_and_of_the_order_of_rows() -> None:
    rewards, group = _random_visits(3).flatten(), torch.arange(3).repeat_interleave(5)
    together = DCPO()
    alone = [_visit(DCPO(), *rewards[group == g].tolist()).advantages for g in range(3)]
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    result = together.smooth(rewards[order], group[order], ["a", "b", "c"])
    torch.testing.assert_close(result.advantages, torch.cat(alone)[order])


def test_the_same_prompt_twice_in_a_step_is_one_visit() -> None:
    twice, once = DCPO(), DCPO()
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=F64)
    a = twice.smooth(rewards, torch.tensor([0, 0, 1, 1]), [7, 7])
    b = once.smooth(rewards, torch.zeros(4, dtype=torch.long), [7])
    assert a.visits == b.visits
    assert a.visits["7"].count == 1
    assert torch.equal(a.advantages, b.advantages)


def test_smoothing_alone_changes_no_state_and_unseen_prompts_keep_theirs() -> None:
    history = DCPO()
    _visit(history, 1.0, 0.0, prompt="a")
    _visit(history, 0.0, 0.0, prompt="b")
    before = dict(history.visits)
    s = history.smooth(torch.tensor([1.0, 1.0]), torch.zeros(2, dtype=torch.long), ["a"])
    assert history.visits == before
    assert s.advantages.dtype == torch.float32
    history.visits |= s.visits
    assert history.visits["a"].count == 2
    assert history.visits["b"] == before["b"]


def test_rewards_that_are_missing() -> None:
    history, other = DCPO(), DCPO()
    s = _visit(history, 1.0, math.nan, 0.0, 0.0)
    full = _visit(other, 1.0, 0.0, 0.0)
    assert s.advantages[1] == 0
    torch.testing.assert_close(s.advantages[[0, 2, 3]], full.advantages)
    assert history.visits == other.visits
    assert _visit(history, math.nan, math.nan).advantages.tolist() == [0.0, 0.0]
    assert history.visits["a"].count == 1  # nothing was seen


def test_state_round_trips_through_json_to_the_bit() -> None:
    history = DCPO()
    for k, rewards in enumerate(_random_visits(6).tolist()):
        _visit(history, *rewards, prompt=k % 3)
    resumed = DCPO()
    resumed.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert resumed.visits == history.visits
    a, b = (_visit(h, 0.3, 1.0, prompt=2) for h in (history, resumed))
    assert torch.equal(a.advantages, b.advantages)


def test_a_window_lets_the_past_fade() -> None:
    drifting = [[0.0, 1.0]] * 20 + [[5.0, 6.0]] * 10
    whole, short = DCPO(), DCPO(window=3)
    for rewards in drifting:
        _visit(whole, *rewards)
        _visit(short, *rewards)
    assert whole.visits["a"].mean < 2.5
    assert short.visits["a"].mean == pytest.approx(5.5, abs=0.4)
    assert short.visits["a"].count == 30
    same, windowed = DCPO(), DCPO(window=10)
    for rewards in _random_visits(5).tolist():
        assert torch.equal(_visit(same, *rewards).advantages, _visit(windowed, *rewards).advantages)


MAKE = {"plain": lambda: make_rollout_credit("dcpo"), "paper": lambda: make_rollout_credit("dcpo", ddof=0)}


def outcomes(seed: int) -> torch.Tensor:
    return torch.randint(0, 3, (12,), generator=torch.Generator().manual_seed(seed)).float()


def plain(history: list[torch.Tensor]) -> torch.Tensor:
    """The paper's advantages of the last of some visits of one prompt (population statistics)."""

    def standardised(values, of):
        deviation = of.std(unbiased=False)
        return (values - of.mean()) / deviation if deviation > 0 else torch.zeros_like(values)

    i, now, everything = len(history), history[-1], torch.cat(history)
    new, total = standardised(now, now), standardised(now, everything)
    s_new, s_total = (i - 1) / i * new + total / i, new / i + (i - 1) / i * total
    return torch.where(s_new.abs() < s_total.abs(), s_new, s_total)


def test_advantages_are_the_papers_over_three_visits_in_any_order():
    make = MAKE["paper"]
    credit = make()
    history: dict[str, list[torch.Tensor]] = {f"row {p}": [] for p in range(4)}
    for visit, order in enumerate(([0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0])):
        step = part(made_step(rewards=outcomes(visit)), order)
        credit = reloaded(credit, make)  # as after a resume, with the prompts in another order
        credit(step)
        firsts = step.segments.offsets[:-1]
        for place, prompt in enumerate(step.prompt_ids):
            members = step.group == place
            history[prompt].append(step.rewards[members])
            got = step.advantages[firsts[members]]
            close(got, plain(history[prompt]))
        assert torch.equal(step.advantages, step.broadcast(step.advantages[firsts]))
        assert step.metrics["dcpo/visits"] == visit + 1


def test_a_group_without_spread_learns_from_its_past():
    credit = MAKE["plain"]()
    credit(made_step(rewards=torch.tensor([0.0, 1, 0] * 4)))
    step = made_step(rewards=torch.ones(12))
    credit(step)
    assert (step.advantages > 0).all()
    assert step.metrics["dcpo/utilisation"] == 1
    fresh = made_step(rewards=torch.ones(12))
    MAKE["plain"]()(fresh)
    assert not fresh.advantages.any()
    assert fresh.metrics["dcpo/utilisation"] == 0


def test_two_ranks_are_one():
    one, make = MAKE["plain"](), MAKE["plain"]
    credits = [make(), make()]
    for visit in range(2):
        step = made_step(rewards=outcomes(visit))
        step.rewards[4] = math.nan
        left = iter(credits)
        shares, credits = on_two_ranks(step, lambda: reloaded(next(left), make))  # noqa: B023
        one(step)
        for rank, share in enumerate(shares):
            assert torch.equal(share.advantages, part(step, range(rank, 4, 2)).advantages)
        states = [c.state_dict() for c in credits]
        assert states[0] == states[1]
        order = [states[0]["prompts"].index(p) for p in one.state_dict()["prompts"]]
        for name in ("count", "mean", "std"):
            assert [states[0][name][i] for i in order] == one.state_dict()[name]


def test_a_prompt_on_both_ranks_is_one_visit():
    step = made_step(prompt_ids=("a", "a", "b", "c"), rewards=outcomes(3))
    shares, credits = on_two_ranks(step, MAKE["paper"])
    close(
        torch.cat([s.advantages[s.segments.offsets[:-1][s.group == 0]] for s in shares]),
        plain([step.rewards[:6]]),
    )
    assert credits[1].visits["a"].count == 1
    assert credits[1].visits["a"].mean == pytest.approx(float(step.rewards[:6].mean()))


def test_solved_prompts_can_be_left_alone():
    batch = made_batch()
    rewards = torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 0])
    credit = make_rollout_credit("dcpo", solved="zero", max_reward=1)
    credit.visits["row 0"] = Visits(3, 1.0, 0.2)  # a deviation left from shaping
    step = made_step(batch, rewards=rewards)
    credit(step)
    assert not step.advantages[step.segments.ids < 3].any()
    assert step.advantages[step.segments.ids >= 3].any()


def test_rewards_that_floats_hold_approximately_are_solved_too():
    credit = make_rollout_credit("dcpo", solved="zero", max_reward=0.7, normalize_by_std=False)
    credit.visits["row 0"] = Visits(3, 0.7 - 1e-7, 0.2)
    step = made_step(made_batch(), rewards=torch.full((12,), 0.7))
    credit(step)
    assert credit.visits["row 0"].mean < 0.7
    assert not step.advantages.any()


def test_refusals():
    with pytest.raises(RecipeError, match="needs max_reward"):
        make_rollout_credit("dcpo", solved="zero")
    with pytest.raises(RecipeError, match="window = 0"):
        make_rollout_credit("dcpo", window=0)
    with pytest.raises(RecipeError, match="window = 0"):  # when a recipe is read
        ROLLOUT_CREDIT["dcpo"].settings({"window": 0})
    with pytest.raises(RecipeError, match="did you mean 'window'"):
        make_rollout_credit("dcpo", windows=2)
