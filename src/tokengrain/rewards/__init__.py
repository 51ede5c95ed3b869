"""Rewards: plain functions over prompts, completions and data columns, several with weights, nothing silent."""
