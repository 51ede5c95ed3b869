"""DCPO's smooth advantages: recursion against pooled numbers, the properties of the spec, and the state."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tokengrain.methods.dcpo import PromptHistory, SmoothAdvantages, Visits
from tokengrain.methods.grpo import group_advantages

F64 = torch.float64


def _visit(history: PromptHistory, *rewards: float, prompt: Any = "a") -> SmoothAdvantages:
    group = torch.zeros(len(rewards), dtype=torch.long)
    result = history.smooth(torch.tensor(rewards, dtype=F64), group, [prompt])
    history.record(result.visits)
    return result


def _random_visits(count: int, size: int = 5) -> Tensor:
    return torch.randn(count, size, dtype=F64, generator=torch.Generator().manual_seed(4))


def test_statistics_are_those_of_all_rewards_pooled() -> None:
    history, seen = PromptHistory(ddof=0), []
    for rewards in _random_visits(6).tolist():
        _visit(history, *rewards)
        seen += rewards
        assert history["a"].mean == pytest.approx(np.mean(seen))
        assert history["a"].std == pytest.approx(np.std(seen))


def test_first_visit_is_plain_standardisation() -> None:
    for ddof in (0, 1):
        s = _visit(PromptHistory(ddof=ddof), 1.0, 0.0, 0.5, 0.0)
        plain = group_advantages(torch.tensor([1.0, 0.0, 0.5, 0.0], dtype=F64), torch.zeros(4).long(), eps=0, ddof=ddof)
        for values in (s.advantages, s.current, s.cumulative):
            torch.testing.assert_close(values, plain)


def test_equals_the_formulas_written_out() -> None:
    history = PromptHistory()
    for i, rewards in enumerate(_random_visits(5), start=1):
        n = history["a"].count
        mean, std = rewards.mean(), rewards.std()
        old_mean, old_std = history["a"].mean, history["a"].std
        total = (n * old_mean + mean) / i
        var = (n * old_std**2 + std**2 + n / i * (old_mean - mean) ** 2) / i
        a_new, a_tot = (rewards - mean) / std, (rewards - total) / var.sqrt()
        s_new, s_tot = (i - 1) / i * a_new + a_tot / i, a_new / i + (i - 1) / i * a_tot
        expected = [float(a if abs(a) < abs(b) else b) for a, b in zip(s_new, s_tot, strict=True)]
        result = _visit(history, *rewards.tolist())
        torch.testing.assert_close(result.advantages, torch.tensor(expected, dtype=F64))
        assert n == i - 1


def test_identical_rewards_learn_from_the_past_only() -> None:
    history = PromptHistory()
    _visit(history, 1.0, 0.0, 0.0, 0.0)
    s = _visit(history, 1.0, 1.0, 1.0, 1.0)
    torch.testing.assert_close(s.advantages, s.cumulative / 2)
    assert (s.advantages > 0).all()
    assert (s.current == 0).all()


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1.0])
def test_a_prompt_that_never_varies_has_no_advantage(value: float) -> None:
    history = PromptHistory()
    for size in (3, 5, 7, 4, 6):
        s = _visit(history, *[value] * size)
        assert s.advantages.tolist() == [0.0] * size
    assert history["a"] == Visits(5, value, 0.0)


def test_shift_and_scale_change_nothing() -> None:
    histories, factors = [PromptHistory(), PromptHistory()], [(1.0, 0.0), (3.0, -2.0)]
    for rewards in _random_visits(4):
        results = [
            _visit(h, *(scale * rewards + shift).tolist()) for h, (scale, shift) in zip(histories, factors, strict=True)
        ]
        torch.testing.assert_close(results[0].advantages, results[1].advantages)


def test_differences_only() -> None:
    history = PromptHistory(normalize_by_std=False)
    _visit(history, 1.0, 0.0)
    s = _visit(history, 1.0, 1.0)
    torch.testing.assert_close(s.cumulative, torch.tensor([0.25, 0.25], dtype=F64))
    torch.testing.assert_close(s.advantages, torch.tensor([0.125, 0.125], dtype=F64))


def test_groups_are_independent_of_each_other_and_of_the_order_of_rows() -> None:
    rewards, group = _random_visits(3).flatten(), torch.arange(3).repeat_interleave(5)
    together = PromptHistory()
    alone = [_visit(PromptHistory(), *rewards[group == g].tolist()).advantages for g in range(3)]
    order = torch.randperm(15, generator=torch.Generator().manual_seed(1))
    result = together.smooth(rewards[order], group[order], ["a", "b", "c"])
    torch.testing.assert_close(result.advantages, torch.cat(alone)[order])


def test_the_same_prompt_twice_in_a_step_is_one_visit() -> None:
    twice, once = PromptHistory(), PromptHistory()
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=F64)
    a = twice.smooth(rewards, torch.tensor([0, 0, 1, 1]), [7, 7])
    b = once.smooth(rewards, torch.zeros(4, dtype=torch.long), [7])
    assert a.visits == b.visits
    assert a.visits["7"].count == 1
    assert torch.equal(a.advantages, b.advantages)


def test_smoothing_alone_changes_no_state_and_unseen_prompts_keep_theirs() -> None:
    history = PromptHistory()
    _visit(history, 1.0, 0.0, prompt="a")
    _visit(history, 0.0, 0.0, prompt="b")
    before = dict(history.visits)
    s = history.smooth(torch.tensor([1.0, 1.0]), torch.zeros(2, dtype=torch.long), ["a"])
    assert history.visits == before
    assert s.advantages.dtype == torch.float32
    history.record(s.visits)
    assert history["a"].count == 2
    assert history["b"] == before["b"]


def test_rewards_that_are_missing() -> None:
    history, other = PromptHistory(), PromptHistory()
    s = _visit(history, 1.0, math.nan, 0.0, 0.0)
    full = _visit(other, 1.0, 0.0, 0.0)
    assert s.advantages[1] == 0
    torch.testing.assert_close(s.advantages[[0, 2, 3]], full.advantages)
    assert history.visits == other.visits
    assert _visit(history, math.nan, math.nan).advantages.tolist() == [0.0, 0.0]
    assert history["a"].count == 1  # nothing was seen


def test_state_round_trips_through_json_to_the_bit() -> None:
    history = PromptHistory()
    for k, rewards in enumerate(_random_visits(6).tolist()):
        _visit(history, *rewards, prompt=k % 3)
    resumed = PromptHistory()
    resumed.load_state_dict(json.loads(json.dumps(history.state_dict())))
    assert resumed.visits == history.visits
    a, b = (_visit(h, 0.3, 1.0, prompt=2) for h in (history, resumed))
    assert torch.equal(a.advantages, b.advantages)


def test_a_window_lets_the_past_fade() -> None:
    drifting = [[0.0, 1.0]] * 20 + [[5.0, 6.0]] * 10
    whole, short = PromptHistory(), PromptHistory(window=3)
    for rewards in drifting:
        _visit(whole, *rewards)
        _visit(short, *rewards)
    assert whole["a"].mean < 2.5
    assert short["a"].mean == pytest.approx(5.5, abs=0.4)
    assert short["a"].count == 30
    same, windowed = PromptHistory(), PromptHistory(window=10)
    for rewards in _random_visits(5).tolist():
        assert torch.equal(_visit(same, *rewards).advantages, _visit(windowed, *rewards).advantages)


def test_too_few_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="2 groups need as many prompt ids, got 1"):
        PromptHistory().smooth(torch.zeros(2), torch.tensor([0, 1]), ["a"])
