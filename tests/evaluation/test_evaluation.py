"""Frontier, intervals, win rate and credit recovery against hand-made and independent values."""

import math

import pytest
import scipy.stats
import torch

from tokengrain.evaluation.credit import auc, recovery, spearman
from tokengrain.evaluation.statistics import (
    Frontier,
    bootstrap,
    classification,
    mean_interval,
    mean_of_runs,
    wilson,
    win_rate,
)


def test_frontier_of_a_gaussian_reward_is_exact_between_points():
    # With R ~ N(0, 1) under the base, R*(KL) = sqrt(2 KL): straight in the root, so interpolation is exact.
    kl = [0.0, 0.1, 1.0, 4.0]
    frontier = Frontier(kl, [math.sqrt(2 * k) for k in kl])
    for k in (0.02, 0.5, 3.0):
        assert float(frontier.best_reward(k)) == pytest.approx(math.sqrt(2 * k))
    assert float(frontier.best_reward(9.0)) == pytest.approx(math.sqrt(8))
    assert float(frontier.share(0.5, 0.5)) == pytest.approx(0.5)
    assert float(frontier.share(0.3, 1e-4)) == 0
    assert frontier.curve(max_kl=1.0)["kl"][-1] == pytest.approx(1.0)


def test_share_is_measured_from_the_base():
    frontier = Frontier([0.0, 1.0], [2.0, 4.0])
    assert frontier.share(torch.tensor([2.0, 3.0, 4.0, 1.0]), 1.0).tolist() == pytest.approx([0, 0.5, 1, -0.5])


@pytest.mark.parametrize(
    ("kl", "reward"),
    [([0.1, 1], [0, 1]), ([0, 1], [0, -1]), ([0, 2, 1], [0, 1, 2]), ([0], [0]), ([0, 1], [0])],
)
def test_impossible_frontiers_are_refused(kl, reward):
    with pytest.raises(ValueError, match="frontier"):
        Frontier(kl, reward)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (5, 10), (10, 10), (37, 400)])
def test_wilson_equals_scipy(k, n):
    expected = scipy.stats.binomtest(k, n).proportion_ci(0.95, method="wilson")
    found = wilson(k, n)
    assert (found.value, found.low, found.high) == pytest.approx((k / n, expected.low, expected.high))


def test_mean_interval_covers_and_strata_narrow_it():
    generator = torch.Generator().manual_seed(0)
    strata = torch.arange(10).repeat_interleave(30)
    covered, widths = [], []
    for _ in range(300):
        x = strata + torch.randn(300, generator=generator, dtype=torch.float64)
        plain, stratified = mean_interval(x), mean_interval(x, strata)
        covered.append(stratified.low < 4.5 < stratified.high)
        widths.append((stratified.high - stratified.low) / (plain.high - plain.low))
    assert 0.91 < sum(covered) / len(covered) < 0.99
    assert max(widths) < 0.5


def test_mean_of_runs_equals_scipy():
    a, b = [1.0, 2.5, 3.0, 4.5, 5.0], [0.5, 2.0, 3.5, 3.0, 4.0]
    expected = scipy.stats.ttest_rel(a, b).confidence_interval(0.95)
    found = mean_of_runs([x - y for x, y in zip(a, b, strict=True)])
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="at least 2"):
        mean_of_runs([1.0])


def test_bootstrap_of_a_mean_agrees_with_the_normal_interval_and_is_deterministic():
    x = torch.randn(400, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    state = torch.get_rng_state()
    found = bootstrap(lambda m: m[..., 0], x, resamples=4000)
    assert torch.equal(state, torch.get_rng_state())
    normal = mean_interval(x[:, 0])
    assert (found.low, found.high) == pytest.approx((normal.low, normal.high), abs=0.01)
    assert found == bootstrap(lambda m: m[..., 0], x, resamples=4000)
    # Values that only differ between strata have no sampling error within them.
    strata = torch.arange(4).repeat_interleave(100)
    exact = bootstrap(lambda m: m[..., 0], strata[:, None].double(), strata)
    assert exact == (1.5, 1.5, 1.5)


def test_win_rate_counts_ties_half():
    found = win_rate([1, 2, 3, 4], [0, 2, 4, 1])
    assert found.value == pytest.approx((1 + 0.5 + 0 + 1) / 4)
    assert found == wilson(2.5, 4)
    by_prompt = win_rate([1, 2, 3, 4], [0, 2, 4, 1], torch.tensor([0, 0, 1, 1]))
    assert by_prompt.value == found.value
    assert 0 <= by_prompt.low < by_prompt.high <= 1
    with pytest.raises(ValueError, match="one length"):
        win_rate([1, 2], [1])


def test_auc_is_the_chance_of_a_right_order():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(5, (60,), generator=generator).double()  # many ties
    positive = torch.rand(60, generator=generator) < 0.4
    pairs = [(s, t) for s in scores[positive] for t in scores[~positive]]
    expected = sum(float(s > t) + 0.5 * float(s == t) for s, t in pairs) / len(pairs)
    assert auc(scores, positive) == pytest.approx(expected)
    assert math.isnan(auc(scores, torch.ones(60, dtype=torch.bool)))


def test_recovery_of_the_truth_its_opposite_and_nothing():
    truth = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert recovery(truth.exp(), truth)["spearman"] == pytest.approx(1)
    flipped = recovery(-truth, truth)
    assert (flipped["spearman"], flipped["auc"]) == pytest.approx((-1, 0))
    nothing = recovery(torch.zeros(500), truth)
    assert math.isnan(nothing["spearman"])
    assert nothing["auc"] == pytest.approx(0.5)
    # Tokens that decide nothing do not count.
    noisy = torch.cat([truth, torch.zeros(500)])
    decides = torch.arange(1000) < 500
    assert recovery(torch.cat([truth, -truth]), noisy, decides)["tokens"] == 500
    assert recovery(torch.cat([truth, -truth]), noisy, decides)["spearman"] == pytest.approx(1)


def test_credit_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="finite"):
        spearman(torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0]))


def test_wilson_ends_are_exact():
    """Not 2.8e-17, which a report would print."""
    for n in (5, 7, 180):
        assert wilson(0, n).low == 0.0
        assert wilson(n, n).high == 1.0


def test_scores_that_are_nan_do_not_count_as_lost():
    nan = float("nan")
    for pair in (([nan], [0.0]), ([0.0], [nan])):
        with pytest.raises(ValueError, match="a score is NaN"):
            win_rate(*pair)


def test_classes_that_were_not_read_are_wrong() -> None:
    truth, predicted = [0, 1, 1, 0], [0, 1, -1, 2]
    real = classification(truth, predicted)
    assert real.accuracy == 0.5
    assert real.by_class == {0: 0.5, 1: 0.5}
    assert real.unread == 0.25
    assert real.macro_f1 == pytest.approx(2 / 3)  # each class: all that was predicted is right, half is found
    assert classification(truth, predicted, classes="seen").macro_f1 == pytest.approx(1 / 3)
