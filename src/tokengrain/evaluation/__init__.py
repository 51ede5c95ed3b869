"""Evaluation: reward-KL frontiers, confidence intervals, win rates, credit recovery."""

from tokengrain.evaluation.credit import auc, recovery, spearman
from tokengrain.evaluation.frontier import Frontier
from tokengrain.evaluation.intervals import Estimate, bootstrap, mean_interval, paired_difference, wilson
from tokengrain.evaluation.winrate import win_rate

__all__ = [
    "Estimate",
    "Frontier",
    "auc",
    "bootstrap",
    "mean_interval",
    "paired_difference",
    "recovery",
    "spearman",
    "wilson",
    "win_rate",
]
