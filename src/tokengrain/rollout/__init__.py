"""Rollouts: prompts -> sampled completions with their log-probabilities, from a model here or from a server.

Every sampler has `sample(prompts, n=, sampling=) -> Rollouts` and `refresh(model_or_path)`; what they return
becomes a `TokenBatch`. None of this needs more than torch until a sampler is made.
"""
