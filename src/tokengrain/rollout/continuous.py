"""`HFContinuous`: transformers' continuous batching (`generate_batch`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tokengrain.errors import ModelError, RecipeError
from tokengrain.rollout.base import (
    PromptItem,
    RolloutError,
    Rollouts,
    SampledCompletion,
    SamplingConfig,
    checked_prompts,
)
from tokengrain.rollout.hf import check_room, unwrapped
from tokengrain.rollout.prompts import needs_tokenizer, stop_ids_of
from tokengrain.rollout.stops import StopStrings
from tokengrain.scoring.forward import evaluating
from tokengrain.scoring.install import causal_lm


class HFContinuous:
    """Samples with transformers' continuous batching: a paged cache, new prompts as others end.

    The prompt's cache is shared by its completions. The seed makes a call repeatable with the same prompts in
    the same order on the same device; unlike `HFGenerate`'s, completions depend on the batch. Text after a stop
    string is generated and thrown away, because the engine knows stop tokens only. `raw_logps` are known
    only where the sampling leaves the model's distribution as it is.

    Args:
        model: a causal language model whose attention is "sdpa", "eager" or flash attention, without
            virtual tokens before the prompt.
        tokenizer: as in `HFGenerate`.
        settings: of transformers' `ContinuousBatchingConfig`, such as `page_size` or `max_memory_percent`.

    Raises:
        ModelError: the installed transformers or this model has no continuous batching.
    """

    name = "continuous"

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, settings: Mapping[str, Any] | None = None) -> None:
        self.tokenizer, self.settings = tokenizer, dict(settings or {})
        self.refresh(model)

    def refresh(self, model_or_path: Any) -> None:
        """Sample from another model. (A model that is being trained is always sampled from as it is.)"""
        if not isinstance(model_or_path, nn.Module):
            raise RolloutError(f"{self.name} samples from a model in this process, got {model_or_path!r}")
        model = unwrapped(model_or_path)
        lm = causal_lm(model)
        if getattr(lm, "_is_stateful", False):
            raise ModelError(f"{type(lm).__name__} keeps a recurrent state; continuous batching needs attention only")
        try:
            from transformers.generation.configuration_utils import ContinuousBatchingConfig
        except ImportError:
            raise ModelError(
                "the installed transformers has no ContinuousBatchingConfig; expected 5.17 or newer, or the "
                "sampler 'generate'"
            ) from None
        if not hasattr(lm, "generate_batch") or "return_logprobs" not in vars(ContinuousBatchingConfig()):
            raise ModelError(
                f"{type(lm).__name__} with the installed transformers has no continuous batching that gives "
                "log-probabilities; expected transformers 5.17 or newer, or the sampler 'generate'"
            )
        self.model = model
        self.lm: Any = lm

    def sample(self, prompts: Sequence[PromptItem], *, n: int, sampling: SamplingConfig) -> Rollouts:
        """`n` completions of each prompt. Raises `RolloutError` where the engine fails, with its message."""
        from transformers.generation.configuration_utils import ContinuousBatchingConfig

        started = time.perf_counter()
        prompts = checked_prompts(prompts, n)
        needs_tokenizer(self.tokenizer, sampling.stop)
        check_room(self.lm, prompts, sampling)
        stop_ids = sampling.stop_ids if sampling.stop_ids is not None else stop_ids_of(self.tokenizer, self.lm)
        known = {
            "return_logprobs": True,
            "seed": sampling.seed % 2**31,
            # A processor that the engine lacks would change the distribution silently.
            "drop_unsupported_processors": False,
        }
        try:
            batching = ContinuousBatchingConfig(**{**known, **self.settings})
        except (TypeError, ValueError) as error:
            raise RecipeError(f"settings of continuous batching: {error}") from None
        with evaluating(self.model):
            # The implementation of attention is put back: the engine changes it on models without a paged one.
            before = self.lm.config._attn_implementation
            try:
                found = self.lm.generate_batch(
                    [p.ids for p in prompts],
                    generation_config=_generation_config(n, sampling, stop_ids),
                    continuous_batching_config=batching,
                )
            except (ValueError, NotImplementedError, ImportError, RuntimeError, AttributeError) as error:
                raise RolloutError(
                    f"continuous batching does not run here ({type(error).__name__}: {error}); expected a model "
                    "and device that transformers' generate_batch supports, or the sampler 'generate'"
                ) from error
            finally:
                if self.lm.config._attn_implementation != before:
                    self.lm.set_attn_implementation(before)
        results = list(found.values())
        if len(results) != len(prompts) * n:
            raise RolloutError(
                f"continuous batching gave {len(results)} of {len(prompts) * n} completions; its own log says why"
            )
        stops = StopStrings(self.tokenizer, sampling.stop) if sampling.stop else None
        groups = []
        for p, prompt in enumerate(prompts):
            part = results[p * n : (p + 1) * n]
            groups.append(tuple(_completion(prompt, r, sampling, stop_ids, stops) for r in part))
        return Rollouts(prompts, tuple(groups), sampling, time.perf_counter() - started)


def _generation_config(n: int, sampling: SamplingConfig, stop_ids: Sequence[int]) -> Any:
    from transformers import GenerationConfig

    sample = sampling.temperature > 0
    changes: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    if sample:
        changes = {"temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": sampling.top_p}
        if sampling.min_p > 0:
            changes["min_p"] = sampling.min_p
    return GenerationConfig(
        max_new_tokens=sampling.max_new_tokens,
        do_sample=sample,
        num_return_sequences=n,
        repetition_penalty=1.0,
        eos_token_id=list(stop_ids) or [-1],
        pad_token_id=stop_ids[0] if stop_ids else 0,
        **changes,
    )


def _completion(
    prompt: PromptItem, result: Any, sampling: SamplingConfig, stop_ids: Sequence[int], stops: StopStrings | None
) -> SampledCompletion:
    ids, logps = list(result.generated_tokens), list(result.logprobs)
    if result.error is not None or not ids or len(ids) != len(logps):
        raise RolloutError(
            f"row {prompt.row}: continuous batching gave {len(ids)} tokens with {len(logps)} log-probabilities "
            f"({result.error})"
        )
    stopped = ids[-1] in stop_ids
    end = stops.length(ids) if stops is not None else None
    if end is not None:
        ids, logps, stopped = ids[:end], logps[:end], True
    if sampling.temperature == 0:  # the engine reports the model's own there
        return SampledCompletion(ids, [0.0] * len(ids), logps, "stop" if stopped else "length")
    return SampledCompletion(ids, logps, logps if sampling.is_model else None, "stop" if stopped else "length")
