"""Evaluation: reward-KL frontiers, confidence intervals, win rates, credit recovery, best of n."""

from tokengrain.evaluation.best_of_n import LengthBucket, accuracy_by_length, best_of, score_completions
from tokengrain.evaluation.credit import (
    Calibration,
    CreditTruth,
    auc,
    calibration,
    credit_scores,
    lowest_hits,
    recovery,
    spearman,
)
from tokengrain.evaluation.frontier import Frontier
from tokengrain.evaluation.intervals import (
    Estimate,
    bootstrap,
    mean_interval,
    mean_of_runs,
    paired_difference,
    wilson,
)
from tokengrain.evaluation.winrate import win_rate

__all__ = [
    "Calibration",
    "CreditTruth",
    "Estimate",
    "Frontier",
    "LengthBucket",
    "accuracy_by_length",
    "auc",
    "best_of",
    "bootstrap",
    "calibration",
    "credit_scores",
    "lowest_hits",
    "mean_interval",
    "mean_of_runs",
    "paired_difference",
    "recovery",
    "score_completions",
    "spearman",
    "wilson",
    "win_rate",
]
