"""Rewards: plain functions over prompts, completions and data columns, several with weights, nothing silent.

def short(prompts, completions, **columns):
    return [-len(c) / 100 for c in completions]

suite = RewardSuite([make_reward("numeric"), make_reward("my.py:short", weight=0.1)], tokenizer=tokenizer)
result = suite.score(rollouts)
"""
