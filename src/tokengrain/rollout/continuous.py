"""`HFContinuous`: transformers' continuous batching (`generate_batch`)."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from tokengrain.callables import nearest, validate_settings
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
from tokengrain.scoring.embeddings import device_of
from tokengrain.scoring.forward import evaluating
from tokengrain.scoring.install import causal_lm

SIZES = frozenset({"num_blocks", "max_batch_tokens", "max_memory_percent"})
CPU_PAGE, CPU_REQUESTS, CPU_TOKENS = 32, 64, 256


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
        settings: of transformers' `ContinuousBatchingConfig`, such as `page_size` or `max_memory_percent`. Without
            any about its size the cache takes most of an accelerator's free memory; on a CPU it is just large enough
            for `CPU_REQUESTS` completions at a time.

    Raises:
        ModelError: the installed transformers or this model has no continuous batching.
        RecipeError: settings that it does not have.
    """

    name = "continuous"

    def __init__(self, model: nn.Module, tokenizer: Any = None, *, settings: dict[str, Any] | None = None) -> None:
        self.given = validate_settings("sampler 'continuous'", HFContinuous, {"settings": settings})
        self.tokenizer, self.settings = tokenizer, dict(settings or {})
        self.refresh(model)
        self.check(settings=settings)

    @staticmethod
    def check(*, settings: Mapping[str, Any] | None) -> None:
        """Raises `RecipeError` for settings that the engine does not have, `ModelError` where there is no engine."""
        _batching(settings or {}, 0)

    def refresh(self, model_or_path: Any) -> None:
        """Sample from another model. (A model that is being trained is always sampled from as it is.)"""
        if not isinstance(model_or_path, nn.Module):
            raise RolloutError(f"{self.name} samples from a model in this process, got {model_or_path!r}")
        model = unwrapped(model_or_path)
        lm = causal_lm(model)
        if getattr(lm, "_is_stateful", False):
            raise ModelError(f"{type(lm).__name__} keeps a recurrent state; continuous batching needs attention only")
        config = batching_class()
        if not hasattr(lm, "generate_batch") or "return_logprobs" not in vars(config()):
            raise ModelError(
                f"{type(lm).__name__} with the installed transformers has no continuous batching that gives "
                "log-probabilities; expected transformers 5.17 or newer, or the sampler 'hf'"
            )
        self.model = model
        self.lm: Any = lm

    def sample(self, prompts: Sequence[PromptItem], *, n: int, sampling: SamplingConfig) -> Rollouts:
        """`n` completions of each prompt. Raises `RolloutError` where the engine fails, with its message."""
        started = time.perf_counter()
        prompts = checked_prompts(prompts, n)
        needs_tokenizer(self.tokenizer, sampling.stop)
        check_room(self.lm, prompts, sampling)
        stop_ids = sampling.stop_ids if sampling.stop_ids is not None else stop_ids_of(self.tokenizer, self.lm)
        batching = _batching(self._sized(prompts, n, sampling), sampling.seed)
        with evaluating(self.model):
            # The implementation of attention is put back: the engine changes it on models without a paged one.
            before = self.lm.config._attn_implementation
            try:
                found = self.lm.generate_batch(
                    [p.ids for p in prompts],
                    generation_config=_generation_config(n, sampling, stop_ids),
                    continuous_batching_config=batching,
                )
            # The engine has no error of its own: these are what it raises for models and devices that it lacks.
            except (ValueError, ImportError, RuntimeError, AttributeError) as error:
                raise RolloutError(
                    f"continuous batching does not run here ({type(error).__name__}: {error}); expected a model "
                    "and device that transformers' generate_batch supports, or the sampler 'hf'"
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

    def _sized(self, prompts: Sequence[PromptItem], n: int, sampling: SamplingConfig) -> dict[str, Any]:
        """The settings, with a size for CPUs: the engine's own default is more than half of the machine's memory."""
        if device_of(self.lm).type != "cpu" or SIZES & self.settings.keys():
            return self.settings
        page = self.settings.get("page_size", CPU_PAGE)
        longest = max(len(p.ids) for p in prompts) + sampling.max_new_tokens
        blocks = min(len(prompts) * n, CPU_REQUESTS) * (-(-longest // page) + 1)
        return {"page_size": page, "num_blocks": blocks, "max_batch_tokens": CPU_TOKENS, **self.settings}


def batching_class() -> Any:
    """transformers' `ContinuousBatchingConfig`. Raises `ModelError` where the installed version has none."""
    try:
        from transformers.generation.configuration_utils import ContinuousBatchingConfig
    except ImportError:
        raise ModelError(
            "the installed transformers has no ContinuousBatchingConfig; expected 5.17 or newer, or the sampler 'hf'"
        ) from None
    return ContinuousBatchingConfig


def _batching(settings: Mapping[str, Any], seed: int) -> Any:
    """The engine's configuration. Raises `RecipeError` for settings that it does not have, or that are not free."""
    build = batching_class()
    fixed = {
        "return_logprobs": True,
        "seed": seed % 2**31,
        # A processor that the engine lacks would change the distribution silently.
        "drop_unsupported_processors": False,
    }
    legal = inspect.signature(build).parameters.keys() - fixed.keys()
    for name in settings:
        if name not in legal:
            raise RecipeError(f"sampler 'continuous': settings: unknown setting {name!r}{nearest(name, legal)}")
    try:
        return build(**fixed, **settings)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"sampler 'continuous': settings: {error}") from None


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
