"""Evaluation: reward-KL frontiers, confidence intervals, win rates, credit recovery, best of n, pass@k."""

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
from tokengrain.evaluation.credit_places import pointing_scores
from tokengrain.evaluation.frontier import Frontier
from tokengrain.evaluation.intervals import (
    Estimate,
    bootstrap,
    mean_interval,
    mean_of_runs,
    paired_difference,
    wilson,
)
from tokengrain.evaluation.online import (
    avg_at_k,
    by_group,
    maj_at_k,
    mean_over_prompts,
    pass_at_k,
    sample_metrics,
    utilised,
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
    "avg_at_k",
    "best_of",
    "bootstrap",
    "by_group",
    "calibration",
    "credit_scores",
    "lowest_hits",
    "maj_at_k",
    "mean_interval",
    "mean_of_runs",
    "mean_over_prompts",
    "paired_difference",
    "pass_at_k",
    "pointing_scores",
    "recovery",
    "sample_metrics",
    "score_completions",
    "spearman",
    "utilised",
    "wilson",
    "win_rate",
]
