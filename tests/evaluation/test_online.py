"""pass@k, avg@k, maj@k against enumeration; intervals by group."""

import itertools
import math

import pytest
import torch

from tokengrain.evaluation.statistics import (
    avg_at_k,
    by_group,
    maj_at_k,
    mean_over_prompts,
    pass_at_k,
    sample_metrics,
    utilised,
    wilson,
)


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_sample(n):
    for c, k in itertools.product(range(n + 1), range(1, n + 1)):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        expected = sum(any(s) for s in subsets) / len(subsets)
        assert float(pass_at_k(n, c, k)) == pytest.approx(expected, abs=1e-12)


def test_pass_at_k_is_unbiased_where_the_plug_in_is_not():
    p, n, k = 0.3, 6, 4
    chances = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - p) ** k
    counts = torch.arange(n + 1)
    unbiased = (torch.tensor(chances, dtype=torch.float64) * pass_at_k(n, counts, k)).sum()
    plug_in = sum(q * (1 - (1 - c / n) ** k) for c, q in enumerate(chances))
    assert float(unbiased) == pytest.approx(truth, abs=1e-12)
    assert plug_in < truth - 0.02


def test_pass_at_k_of_many_samples_and_shapes():
    assert float(pass_at_k(100_000, 1, 50_000)) == pytest.approx(0.5, abs=1e-9)
    found = pass_at_k(torch.tensor([[4], [8]]), torch.tensor([0, 2]), 2)
    assert found.shape == (2, 2)
    assert found[:, 0].tolist() == [0, 0]
    assert found[0, 1] == pytest.approx(1 - 1 / 6)
    for n, c, k in ((4, 1, 5), (4, 1, 0), (4, 5, 2), (4, -1, 2)):
        with pytest.raises(ValueError, match="expected"):
            pass_at_k(n, c, k)


def test_avg_takes_the_first_k():
    correct = torch.tensor([[True, False, False, False], [True, True, True, False]])
    assert avg_at_k(correct).tolist() == [0.25, 0.75]
    assert avg_at_k(correct, 2).tolist() == [0.5, 1.0]
    with pytest.raises(ValueError, match="at most 4"):
        avg_at_k(correct, 5)


@pytest.mark.parametrize(
    ("answers", "right", "expected"),
    [
        (["7", "7", "3"], "7", 1),
        (["3", "7", "3"], "7", 0),
        (["3", "7", "3", "7"], "7", 0.5),
        (["7", "3", "5"], "7", 1 / 3),
        ([None, None, "7"], "7", 1),  # without an answer there is no vote
        ([None, None], "7", 0),
    ],
)
def test_majority_and_its_ties(answers, right, expected):
    correct = torch.tensor([[a == right for a in answers]])
    assert maj_at_k([answers], correct).tolist() == pytest.approx([expected])


def test_majority_of_the_first_k():
    answers = [["3", "7", "7", "7"]]
    correct = torch.tensor([[False, True, True, True]])
    assert [float(maj_at_k(answers, correct, k)) for k in (1, 2, 4)] == [0, 0.5, 1]
    with pytest.raises(ValueError, match="an answer for each"):
        maj_at_k([["3"]], correct)


def test_interval_is_wilson_for_verdicts_and_covers_means():
    verdicts = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert mean_over_prompts(verdicts) == wilson(3, 4)
    ones = mean_over_prompts(torch.ones(5))
    assert ones.low < 0.6  # five of five say little; a bootstrap would give no width at all
    values = torch.rand(200, generator=torch.Generator().manual_seed(0))
    found = mean_over_prompts(values)
    error = float(values.std()) / 200**0.5
    assert found.value == pytest.approx(float(values.mean()))
    assert (found.high - found.low) / 2 == pytest.approx(1.96 * error, rel=0.15)
    with pytest.raises(ValueError, match="no prompts"):
        mean_over_prompts(torch.zeros(0))


def test_groups_are_kept_apart():
    values = torch.tensor([1.0, 0.0, 0.5, 1.0])
    found = by_group(values, ["b", "a", "b", "a"])
    assert list(found) == ["b", "a"]
    assert found["a"] == wilson(1, 2)
    assert found["b"].value == 0.75
    with pytest.raises(ValueError, match="keys"):
        by_group(values, ["a"])


def test_sample_metrics_fit_together():
    correct = torch.rand(30, 6, generator=torch.Generator().manual_seed(1)) < 0.4
    answers = [["r" if c else "w" for c in row] for row in correct.tolist()]
    found = sample_metrics(correct, answers, 5)
    assert list(found) == ["accuracy", "pass@1", "pass@2", "pass@4", "pass@5", "avg@5", "maj@5", "utilisation"]
    torch.testing.assert_close(found["pass@1"], found["accuracy"])
    assert (found["pass@2"] >= found["pass@1"]).all()
    assert torch.equal(found["utilisation"].bool(), utilised(correct))
    assert torch.equal(found["maj@5"].bool(), correct[:, :5].sum(1) >= 3)
    assert utilised(torch.tensor([[True, True], [False, False], [True, False]])).tolist() == [False, False, True]


def test_prompts_that_are_all_alike_still_have_an_interval():
    one = mean_over_prompts(torch.tensor([0.5]))
    assert one.value == 0.5
    assert one.low < 0.2
    assert one.high > 0.8
    many = mean_over_prompts(torch.full((400,), 0.5))
    assert 0.44 < many.low < 0.46 < 0.54 < many.high < 0.56
    assert mean_over_prompts(torch.tensor([7.0, 7.0])) == (7.0, 7.0, 7.0), "no share: nothing is known of its spread"
