"""Evaluation: reward-KL frontiers, confidence intervals, win rates, credit recovery, best of n, pass@k."""
