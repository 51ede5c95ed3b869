"""What `credit_scores` and its parts say about credit that is right, scaled, turned round or random."""

from __future__ import annotations

import math

import pytest
import torch

from tokengrain.batch import Segments
from tokengrain.evaluation.credit import calibration, credit_scores, lowest_hits
from tokengrain.evaluation.statistics import mean_of_runs


def draw(n: int = 1200, seed: int = 0) -> tuple[torch.Tensor, Segments]:
    truth = torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return truth, Segments.from_lengths([12] * (n // 12))


def test_the_truth_scores_perfectly_and_its_opposite_worst() -> None:
    truth, segments = draw()
    everywhere = torch.ones(len(truth), dtype=torch.bool)
    right = credit_scores(truth, truth, everywhere, segments)
    for name in ("spearman", "auc", "auc_harm", "top1", "scale", "r2"):
        assert right[name] == pytest.approx(1), name
    assert right["skill"] > 0.9
    assert right["top1_chance"] == pytest.approx(1 / 12)
    wrong = credit_scores(-truth, truth, everywhere, segments)
    assert (wrong["spearman"], wrong["auc"], wrong["auc_harm"], wrong["top1"]) == pytest.approx((-1, 0, 0, 0))
    assert wrong["scale"] == pytest.approx(-1)


def test_a_monotone_source_ranks_perfectly_but_its_size_is_judged() -> None:
    truth, segments = draw()
    everywhere = torch.ones(len(truth), dtype=torch.bool)
    bent = credit_scores(truth.exp() - 1, truth, everywhere, segments)
    assert bent["spearman"] == pytest.approx(1)
    assert bent["top1"] == pytest.approx(1)
    assert bent["r2"] < 0.7
    tenfold = credit_scores(10 * truth, truth, everywhere, segments)
    assert (tenfold["scale"], tenfold["r2"]) == pytest.approx((0.1, 1))


def test_random_credit_is_at_chance_and_says_nothing() -> None:
    truth, segments = draw(24_000)
    noise = torch.randn(len(truth), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found = credit_scores(noise, truth, torch.ones(len(truth), dtype=torch.bool), segments)
    assert found["auc"] == pytest.approx(0.5, abs=0.02)
    assert found["auc_harm"] == pytest.approx(0.5, abs=0.02)
    assert found["top1"] == pytest.approx(found["top1_chance"], abs=0.03)
    assert abs(found["skill"]) < 0.01
    assert found["ece"] < 0.02


def test_completions_without_a_harmful_token_raise_the_alarm_question_only() -> None:
    segments = Segments.from_lengths([3, 3, 2])
    truth = torch.tensor([0.1, -1.0, 0.2, 0.5, -0.2, 0.0, 0.4, -2.0])
    credit = torch.tensor([0.0, -0.5, 0.0, 0.3, -0.4, 0.0, -0.1, 0.2])
    found = credit_scores(credit, truth, torch.ones(8, dtype=torch.bool), segments)
    assert (found["completions"], found["harmed"]) == (3, 2)
    # The first is hit, the third not; the second has nothing to hit.
    assert found["top1"] == pytest.approx(0.5)
    assert found["top1_chance"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    # Lowest credits of the harmed ones: -0.5 and -0.1; of the other: -0.4.
    assert found["alarm"] == pytest.approx(0.5)
    nothing = credit_scores(credit, truth.clamp(min=0), torch.ones(8, dtype=torch.bool), segments)
    assert math.isnan(nothing["top1"])
    assert math.isnan(nothing["alarm"])


def test_ties_count_by_expectation() -> None:
    segments = Segments.from_lengths([4, 4, 2])
    marked = torch.tensor([1, 0, 0, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    credit = torch.tensor([0.0, 0, 0, 0, -1, 0, 0, 5, 1, 2])
    assert lowest_hits(credit, marked, segments)[:2].tolist() == pytest.approx([0.25, 1.0])
    two = lowest_hits(credit, marked, segments, torch.tensor([2, 2, 1]))
    # Second: -1 is in, and of the two zeros, one of which is marked, one more.
    assert two[:2].tolist() == pytest.approx([0.25, (1 + 0.5) / 2])
    assert math.isnan(two[2])


def test_calibration_knows_a_logistic_source() -> None:
    """Where truth < 0 has chance σ(−credit), predicted and observed shares agree."""
    generator = torch.Generator().manual_seed(3)
    credit = 2 * torch.randn(40_000, generator=generator, dtype=torch.float64)
    negative = torch.rand(40_000, generator=generator, dtype=torch.float64) < torch.sigmoid(-credit)
    truth = torch.where(negative, -1.0, 1.0).double()
    completions = torch.arange(40_000) // 20
    found = calibration(credit, truth, completions)
    assert found.ece < 0.015
    assert found.skill > 0.2
    assert len(found.bins) == 10
    assert all(abs(b["observed"] - 1 / (1 + math.exp(b["credit"]))) < 0.05 for b in found.bins)
    # A source whose steps are not logistic is found out: credit beyond ±2 here means nothing more.
    stepped = calibration(credit.abs(), truth, completions)
    assert stepped.skill < 0.02
    assert calibration(torch.zeros(100), truth[:100], completions[:100]).bins[0]["tokens"] == 100


def test_calibration_of_credit_that_separates_stays_finite() -> None:
    truth, _ = draw()
    found = calibration(truth, truth, torch.arange(len(truth)) // 12)
    assert found.ece < 0.1
    assert found.skill > 0.9


def test_mean_of_runs_is_students_interval() -> None:
    found = mean_of_runs([1.0, 2.0, 3.0])
    assert found.value == 2
    assert found.high - found.value == pytest.approx(4.302653 / math.sqrt(3), rel=1e-5)
    with pytest.raises(ValueError, match="at least 2"):
        mean_of_runs([1.0])


def test_calibration_where_right_and_wrong_completions_take_turns() -> None:
    """Every other completion would be fitted on one kind alone, and say nothing of the other."""
    completions = torch.arange(400) // 10
    truth = torch.where((completions % 2 == 1) & (torch.arange(400) % 10 == 3), -1.0, 0.0).double()
    found = calibration(truth, truth, completions)
    assert found.skill > 0.9
    assert found.ece < 0.1
    mixed = calibration(truth.roll(5), truth, completions)
    assert mixed.skill < 0.1
