"""dcpo: against statistics of the pooled rewards of a prompt; order, ranks, state."""

from __future__ import annotations

import math

import pytest
import torch

from tests.training.online.made import close, made_batch, made_step, on_two_ranks, part, reloaded
from tokengrain.errors import RecipeError
from tokengrain.method import ROLLOUT_CREDIT, make_rollout_credit

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
    assert credits[1].history["a"].count == 1
    assert credits[1].history["a"].mean == pytest.approx(float(step.rewards[:6].mean()))


def test_solved_prompts_can_be_left_alone():
    batch = made_batch()
    rewards = torch.tensor([1.0, 1, 1, 0, 1, 1, 0, 0, 0, 1, 1, 0])
    credit = make_rollout_credit("dcpo", solved="zero", max_reward=1)
    credit.history.record({"row 0": type(credit.history["x"])(3, 1.0, 0.2)})  # a deviation left from shaping
    step = made_step(batch, rewards=rewards)
    credit(step)
    assert not step.advantages[step.segments.ids < 3].any()
    assert step.advantages[step.segments.ids >= 3].any()


def test_rewards_that_floats_hold_approximately_are_solved_too():
    credit = make_rollout_credit("dcpo", solved="zero", max_reward=0.7, normalize_by_std=False)
    credit.history.record({"row 0": type(credit.history["x"])(3, 0.7 - 1e-7, 0.2)})
    step = made_step(made_batch(), rewards=torch.full((12,), 0.7))
    credit(step)
    assert credit.history["row 0"].mean < 0.7
    assert not step.advantages.any()


def test_refusals():
    with pytest.raises(RecipeError, match="needs max_reward"):
        make_rollout_credit("dcpo", solved="zero")
    with pytest.raises(RecipeError, match="window is 0"):
        make_rollout_credit("dcpo", window=0)
    with pytest.raises(RecipeError, match="window is 0"):  # when a recipe is read
        ROLLOUT_CREDIT["dcpo"].settings({"window": 0})
    with pytest.raises(RecipeError, match="did you mean 'window'"):
        make_rollout_credit("dcpo", windows=2)
