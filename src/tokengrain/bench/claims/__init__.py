"""The papers' claims against their baselines: small experiments, paired by seed, with verdicts."""

from tokengrain.bench.claims.framework import Arm, Claim, Finding, Group, judge
from tokengrain.bench.claims.runner import find_groups, judge_all, run_claims

__all__ = ["Arm", "Claim", "Finding", "Group", "find_groups", "judge", "judge_all", "run_claims"]
