"""Rewards: plain functions over prompts, completions and data columns, several with weights, nothing silent.

def short(prompts, completions, **columns):
    return [-len(c) / 100 for c in completions]

suite = RewardSuite([make_reward("numeric"), make_reward("my.py:short", weight=0.1)], tokenizer=tokenizer)
result = suite.score(rollouts)
"""

from tokengrain.rewards.base import RewardError, RewardFailure, RewardFunction, RewardResult
from tokengrain.rewards.registry import REWARDS, RewardKind, check_reward, make_reward
from tokengrain.rewards.reward_model import RewardModel
from tokengrain.rewards.suite import RewardSuite

__all__ = [
    "REWARDS",
    "RewardError",
    "RewardFailure",
    "RewardFunction",
    "RewardKind",
    "RewardModel",
    "RewardResult",
    "RewardSuite",
    "check_reward",
    "make_reward",
]
