"""Group-relative advantages, DAPO's filter and its length penalty."""

from __future__ import annotations

import math
import statistics
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from tokengrain.methods.grpo import GroupStatistics, group_advantages, informative_groups, overlong_penalty

F64 = torch.float64
GROUP = torch.tensor([0, 1, 0, 2, 1, 0, 2, 0, 1])
REWARDS = torch.tensor([1.0, 0.3, 0.0, 0.1, 0.3, 0.5, 2.0, -1.0, 0.3], dtype=F64)


def _by_group(values: Tensor, group: Tensor) -> list[list[float]]:
    return [values[group == g].tolist() for g in range(int(group.max()) + 1)]


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("scale", ["group", "none", "batch"])
def test_equals_a_loop_over_groups(scale: Any, ddof: int) -> None:
    std = statistics.stdev if ddof else statistics.pstdev
    expected = torch.zeros_like(REWARDS)
    for i, g in enumerate(GROUP.tolist()):
        own = [r for r, h in zip(REWARDS.tolist(), GROUP.tolist(), strict=True) if h == g]
        divisor = {"group": std(own) + 1e-4, "none": 1.0, "batch": std(REWARDS.tolist()) + 1e-4}[scale]
        expected[i] = (float(REWARDS[i]) - statistics.mean(own)) / divisor
    torch.testing.assert_close(group_advantages(REWARDS, GROUP, scale=scale, eps=1e-4, ddof=ddof), expected)


def test_sums_and_squares() -> None:
    A = group_advantages(REWARDS, GROUP, eps=0.1)
    std = GroupStatistics(REWARDS, GROUP).std
    for g, own in enumerate(_by_group(A, GROUP)):
        assert sum(own) == pytest.approx(0, abs=1e-12)
        assert sum(a * a for a in own) == pytest.approx((len(own) - 1) * float(std[g] / (std[g] + 0.1)) ** 2)


def test_shift_scale_and_order() -> None:
    A = group_advantages(REWARDS, GROUP)
    torch.testing.assert_close(group_advantages(REWARDS + 5, GROUP), A)
    torch.testing.assert_close(group_advantages(REWARDS * 3, GROUP), A, rtol=1e-5, atol=1e-5)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(group_advantages(REWARDS[order], GROUP[order]), A[order])


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e6, -7.7])
@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_equal_rewards_give_exactly_0(value: float, baseline: Any) -> None:
    for size in (2, 3, 7):
        rewards = torch.full((size,), value)
        A = group_advantages(rewards, torch.zeros(size, dtype=torch.long), baseline=baseline, eps=1e-30)
        assert A.tolist() == [0.0] * size


def test_binary_rewards() -> None:
    rewards = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0], dtype=F64)
    A, q = group_advantages(rewards, torch.zeros(8, dtype=torch.long), eps=0.0), 3 / 8
    shrink = math.sqrt(7 / 8)
    assert float(A[0]) == pytest.approx(shrink * math.sqrt((1 - q) / q))
    assert float(A[-1]) == pytest.approx(-shrink * math.sqrt(q / (1 - q)))


def test_leave_one_out() -> None:
    A = group_advantages(REWARDS, GROUP, baseline="leave_one_out", scale="none")
    for i, g in enumerate(GROUP.tolist()):
        others = [float(REWARDS[j]) for j in range(9) if j != i and int(GROUP[j]) == g]
        assert float(A[i]) == pytest.approx(float(REWARDS[i]) - statistics.mean(others))


def test_completions_that_could_not_be_scored() -> None:
    rewards = REWARDS.clone()
    rewards[5] = math.nan
    with_nan = group_advantages(rewards, GROUP)
    keep = torch.arange(9) != 5
    torch.testing.assert_close(with_nan[keep], group_advantages(REWARDS[keep], GROUP[keep]))
    assert with_nan[5] == 0
    assert group_advantages(torch.full((9,), math.nan), GROUP).tolist() == [0.0] * 9


def test_a_group_of_one_has_no_advantage_and_says_so() -> None:
    with pytest.warns(UserWarning, match="group of one"):
        A = group_advantages(torch.tensor([3.0, 1.0, 0.0]), torch.tensor([0, 1, 1]))
    assert A[0] == 0
    assert A[1] > 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        group_advantages(REWARDS, GROUP)


def test_dynamic_sampling_keeps_groups_that_vary() -> None:
    metric = torch.tensor([1, 1, 0, 1, 0, 0, 1])
    group = torch.tensor([0, 0, 1, 1, 2, 2, 3])
    keep = informative_groups(metric, group)
    assert keep.tolist() == [False, True, False, True]  # a group of one is kept
    rows = keep[group] & (group < 3)
    A = group_advantages(metric[rows].double(), group[rows])
    assert (A != 0).all()
    third = torch.full((3,), 1 / 3)
    assert informative_groups(third, torch.zeros(3, dtype=torch.long)).tolist() == [False]


def test_overlong_penalty() -> None:
    lengths = torch.arange(0, 200)
    penalty = overlong_penalty(lengths, max_length=100, buffer=20, factor=0.5)
    assert penalty[:81].tolist() == [0.0] * 81
    assert penalty[90] == -0.25
    assert (penalty[100:] == -0.5).all()
    steps = penalty.diff()
    assert (steps <= 0).all()
    assert float(steps.min()) == pytest.approx(-0.5 / 20, rel=1e-5)
    for buffer in (0, -1, 101):
        with pytest.raises(ValueError, match="buffer must lie in"):
            overlong_penalty(lengths, max_length=100, buffer=buffer)
