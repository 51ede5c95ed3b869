"""Rollouts: prompts -> sampled completions with their log-probabilities, from a model here or from a server."""
