"""Rollouts: prompts -> sampled completions with their log-probabilities, from a model here or from a server.

Every sampler has `sample(prompts, n=, sampling=) -> Rollouts` and `refresh(model_or_path)`; what they return
becomes a `TokenBatch`. None of this needs more than torch until a sampler is made.
"""

from tokengrain.rollout.base import (
    FinishReason,
    PromptItem,
    RolloutError,
    Rollouts,
    SampledCompletion,
    Sampler,
    SamplingConfig,
)
from tokengrain.rollout.continuous import HFContinuous
from tokengrain.rollout.hf import HFGenerate
from tokengrain.rollout.mismatch import importance_weights, sampler_mismatch
from tokengrain.rollout.prompts import encode_prompts
from tokengrain.rollout.registry import make_sampler
from tokengrain.rollout.server import OpenAIServer

__all__ = [
    "FinishReason",
    "HFContinuous",
    "HFGenerate",
    "OpenAIServer",
    "PromptItem",
    "RolloutError",
    "Rollouts",
    "SampledCompletion",
    "Sampler",
    "SamplingConfig",
    "encode_prompts",
    "importance_weights",
    "make_sampler",
    "sampler_mismatch",
]
