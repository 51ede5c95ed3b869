"""`HFGenerate`: sampling from a transformers model in this process."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from tokengrain.callables import Count, validate_settings
from tokengrain.rollout.base import (
    PromptItem,
    RolloutError,
    Rollouts,
    SampledCompletion,
    SamplingConfig,
    checked_prompts,
)
from tokengrain.rollout.decode import Drawn, decode_generate, decode_shared, padded, shares_prefill
from tokengrain.rollout.picking import Picker, uniforms
from tokengrain.rollout.prompts import needs_tokenizer, stop_ids_of
from tokengrain.rollout.stops import StopStrings
from tokengrain.scoring.embeddings import device_of
from tokengrain.scoring.forward import evaluating
from tokengrain.scoring.install import causal_lm


class HFGenerate:
    """Samples from a transformers model, in batches of prompts of similar length.

    With a dynamic cache a prompt is computed once for all its completions, and completions that have ended
    leave the batch; models that cannot do it (recurrent, hybrid) go through `model.generate`. With a static
    cache everything goes through `model.generate`, which compiles the model on devices where that pays.

    The model is used in evaluation mode without gradients, its mode is put back afterwards. On one device, the same
    seed, prompts and weights give the same completions, whatever the batches are, up to the rounding of
    logits.

    Args:
        model: a causal language model, plain or with an adapter; wrappers of DDP are looked through.
        tokenizer: needed for stop strings, and for end-of-sequence tokens the model does not tell.
        cache: "dynamic" or "static".
        max_batch_tokens: most tokens (prompts and completions at their full length) in the cache at a time; a
            single completion that is longer is sampled all the same.

    Attributes:
        progress: called with how many completions of a call are drawn, and how many there will be.

    Raises:
        RecipeError: an unknown cache, a budget below 1.
    """

    name = "hf"
    neutral: ClassVar[frozenset[str]] = frozenset({"max_batch_tokens"})

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        cache: Literal["dynamic", "static"] = "dynamic",
        max_batch_tokens: Count = 65536,
    ) -> None:
        settings = {"cache": cache, "max_batch_tokens": max_batch_tokens}
        self.given = validate_settings("sampler 'hf'", HFGenerate, settings)
        self.progress: Callable[[int, int], None] | None = None
        self.tokenizer, self.cache, self.max_batch_tokens = tokenizer, cache, max_batch_tokens
        self.refresh(model)

    def refresh(self, model_or_path: Any) -> None:
        """Sample from another model. (A model that is being trained is always sampled from as it is.)"""
        if not isinstance(model_or_path, nn.Module):
            raise RolloutError(f"{self.name} samples from a model in this process, got {model_or_path!r}")
        self.model = unwrapped(model_or_path)
        self.lm = causal_lm(self.model)
        self._shares = self.cache == "dynamic" and shares_prefill(self.model, self.lm)

    def sample(self, prompts: Sequence[PromptItem], *, n: int, sampling: SamplingConfig) -> Rollouts:
        """`n` completions of each prompt. Raises `RolloutError` for prompts that leave no room, for instance."""
        started = time.perf_counter()
        prompts = checked_prompts(prompts, n)
        needs_tokenizer(self.tokenizer, sampling.stop)
        check_room(self.lm, prompts, sampling)
        stop_ids = sampling.stop_ids
        if stop_ids is None:
            stop_ids = stop_ids_of(self.tokenizer, self.lm)
        numbers = uniforms(prompts, n, sampling)
        found: dict[int, SampledCompletion] = {}
        with evaluating(self.model):
            for part in self._batches(prompts, n, sampling.max_new_tokens):
                found |= self._batch(prompts, n, part, numbers, sampling, stop_ids)
                if self.progress is not None:
                    self.progress(len(found), len(prompts) * n)
        groups = tuple(tuple(found[p * n + k] for k in range(n)) for p in range(len(prompts)))
        return Rollouts(prompts, groups, sampling, time.perf_counter() - started)

    def _batches(self, prompts: Sequence[PromptItem], n: int, new_tokens: int) -> list[tuple[list[int], range]]:
        """Prompts by length, longest first, and which of their completions: what fits the budget together."""
        order = sorted(range(len(prompts)), key=lambda p: -len(prompts[p].ids))
        batches: list[tuple[list[int], range]] = []
        while order:
            rows = max(1, self.max_batch_tokens // (len(prompts[order[0]].ids) + new_tokens))
            if rows < n:
                batches += [([order[0]], range(k, min(n, k + rows))) for k in range(0, n, rows)]
                order = order[1:]
            else:
                count = rows // n
                batches.append((order[:count], range(n)))
                order = order[count:]
        return batches

    def _batch(
        self,
        prompts: Sequence[PromptItem],
        n: int,
        part: tuple[list[int], range],
        numbers: torch.Tensor,
        sampling: SamplingConfig,
        stop_ids: Sequence[int],
    ) -> dict[int, SampledCompletion]:
        chosen, copies = part
        where = [p * n + k for p in chosen for k in copies]
        device = device_of(self.lm)
        pad_id = stop_ids[0] if stop_ids else 0
        ids, mask = padded([prompts[p].ids for p in chosen], pad_id, device)
        picker = Picker(sampling, numbers[where], device)
        stops = StopStrings(self.tokenizer, sampling.stop) if sampling.stop else None
        drawn = Drawn(len(where), sampling.max_new_tokens, device, torch.tensor(stop_ids, dtype=torch.long), stops)
        if self._shares:
            self._shares = decode_shared(self.model, self.lm, ids, mask, len(copies), picker, drawn)
        if not self._shares:
            decode_generate(
                self.model, ids, mask, len(copies), picker, drawn, pad_id=pad_id, static=self.cache == "static"
            )
        return dict(zip(where, completions_of(drawn), strict=True))


def completions_of(drawn: Drawn) -> list[SampledCompletion]:
    """Each row up to its end."""
    columns = (drawn.ids, drawn.logps, drawn.raw, drawn.lengths, drawn.stopped)
    return [
        SampledCompletion(ids[:length], logps[:length], raw[:length], "stop" if stopped else "length")
        for ids, logps, raw, length, stopped in zip(*(c.tolist() for c in columns), strict=True)
    ]


def unwrapped(model: nn.Module) -> Any:
    """The model under DDP and the like, which know no `generate`; adapters stay on."""
    inner: Any = model
    while isinstance(getattr(inner, "module", None), nn.Module) and not hasattr(inner, "config"):
        inner = inner.module
    return inner


def check_room(lm: Any, prompts: Sequence[PromptItem], sampling: SamplingConfig) -> None:
    """Raises `RolloutError` if a prompt with `max_new_tokens` goes beyond the model's positions."""
    positions = getattr(lm.config.get_text_config(), "max_position_embeddings", None)
    if positions is None:
        return
    for prompt in prompts:
        if len(prompt.ids) + sampling.max_new_tokens > positions:
            raise RolloutError(
                f"row {prompt.row}: {len(prompt.ids)} prompt tokens and max_new_tokens {sampling.max_new_tokens} are "
                f"more than the model's {positions} positions; expected a shorter prompt or fewer new tokens"
            )
