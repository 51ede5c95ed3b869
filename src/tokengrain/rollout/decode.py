"""Decoding a batch: `decode_shared` (prompt computed once for its completions, finished rows leave) and
`decode_generate` (transformers' own `generate`). Both draw with the same `Picker`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from tokengrain.rollout.picking import Picker
from tokengrain.rollout.stops import StopStrings

# Finished rows are dropped once they are this share of the batch: dropping copies the cache.
FINISHED_SHARE = 1 / 8


@dataclass
class Drawn:
    """What was drawn for R completions of at most T tokens.

    Attributes:
        ids: long `[R, T]`; logps, raw: float `[R, T]` (see `Picker`).
        lengths: long `[R]`, tokens of each; stopped: bool `[R]`, whether it ended by itself.
    """

    rows: int
    steps: int
    device: torch.device
    stop_ids: Tensor
    stops: StopStrings | None = None
    ids: Tensor = field(init=False)
    logps: Tensor = field(init=False)
    raw: Tensor = field(init=False)
    lengths: Tensor = field(init=False)
    stopped: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.stop_ids = self.stop_ids.to(self.device)
        self.ids = torch.zeros(self.rows, self.steps, dtype=torch.long, device=self.device)
        self.logps = torch.zeros(self.rows, self.steps, device=self.device)
        self.raw = torch.zeros(self.rows, self.steps, device=self.device)
        self.lengths = torch.zeros(self.rows, dtype=torch.long, device=self.device)
        self.stopped = torch.zeros(self.rows, dtype=torch.bool, device=self.device)

    def add(self, rows: Tensor, step: int, tokens: Tensor, logps: Tensor, raw: Tensor) -> Tensor:
        """Put down a token for each of the rows. Returns which of them end with it, bool `[B]`."""
        self.ids[rows, step] = tokens
        self.logps[rows, step] = logps.to(self.logps)
        self.raw[rows, step] = raw.to(self.raw)
        done = torch.isin(tokens, self.stop_ids)
        if self.stops is not None:
            texts = self.ids[rows, max(0, step + 1 - self.stops.window) : step + 1].tolist()
            done = done | torch.tensor([self.stops.hit(ids) for ids in texts], device=self.device)
        ended = rows[~self.stopped[rows]]
        self.lengths[ended] = step + 1
        self.stopped[rows] |= done
        return done


def shares_prefill(model: nn.Module, lm: nn.Module) -> bool:
    """Whether a prompt's cache can be copied for each of its completions: plain caches, explicit positions."""
    names = inspect.signature(type(lm).forward).parameters
    stateful = getattr(lm, "_is_stateful", False) or (
        hasattr(model, "active_peft_config") and getattr(model.active_peft_config, "is_prompt_learning", False)
    )
    return not stateful and {"position_ids", "past_key_values", "attention_mask"} <= set(names)


def plain_cache(cache: Any) -> bool:
    """Whether every layer of a cache is keys and values that can be repeated and selected by row."""
    from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

    layers = getattr(cache, "layers", ())
    return isinstance(cache, DynamicCache) and all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers
    )


def padded(prompts: Sequence[Sequence[int]], pad_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, long `[B, L]`, and which tokens are prompt, long `[B, L]`."""
    width = max(len(p) for p in prompts)
    ids = torch.tensor([[pad_id] * (width - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=device)
    return ids, mask


def decode_shared(model: Any, lm: nn.Module, ids: Tensor, mask: Tensor, n: int, picker: Picker, drawn: Drawn) -> bool:
    """Draw `n` completions of each prompt into `drawn`, those of a prompt next to each other.

    Args:
        model: the model to call; lm: the causal language model in it.
        ids, mask: prompts padded on the left, `[B, L]`.

    Returns:
        False if the model turned out to have a cache that cannot be copied; then nothing was drawn.
    """
    device = ids.device
    ragged = not bool(mask.all())
    keep: dict[str, Any] = {"use_cache": True}
    if "logits_to_keep" in inspect.signature(type(lm).forward).parameters:
        keep["logits_to_keep"] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = model(input_ids=ids, attention_mask=mask if ragged else None, position_ids=positions, **keep)
    cache = out.past_key_values
    if not plain_cache(cache):
        return False
    logits = out.logits[:, -1]
    if n > 1:
        cache.batch_repeat_interleave(n)
        logits, mask, positions = (x.repeat_interleave(n, 0) for x in (logits, mask, positions))
    rows = torch.arange(len(logits), device=device)
    position = positions[:, -1:]
    active = torch.ones(len(rows), dtype=torch.bool, device=device)
    for step in range(drawn.steps):
        tokens, logps, raw = picker(logits, rows, step)
        active = active & ~drawn.add(rows, step, tokens, logps, raw)
        left = int(active.sum())
        if not left or step + 1 == drawn.steps:
            break
        position = position + 1
        if ragged:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        if len(rows) - left >= FINISHED_SHARE * len(rows):
            index = active.nonzero()[:, 0]
            cache.batch_select_indices(index)
            rows, tokens, position, mask, active = (x[index] for x in (rows, tokens, position, mask, active))
        out = model(
            input_ids=tokens[:, None],
            attention_mask=mask if ragged else None,
            position_ids=position,
            past_key_values=cache,
            **keep,
        )
        cache, logits = out.past_key_values, out.logits[:, -1]
    return True


class PickProcessor:
    """A logits processor that leaves one token possible: the one that `Picker` draws."""

    def __init__(self, picker: Picker, drawn: Drawn, prompt_length: int) -> None:
        self.picker, self.drawn, self.prompt_length = picker, drawn, prompt_length
        self.rows = torch.arange(drawn.rows, device=drawn.device)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        tokens, logps, raw = self.picker(scores, self.rows, step)
        self.drawn.add(self.rows, step, tokens, logps, raw)
        return torch.full_like(scores, float("-inf")).scatter(1, tokens[:, None], 0.0)

    def finished(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """As a stopping criterion: the completions that have ended."""
        return self.drawn.stopped.clone()


def decode_generate(
    model: Any, ids: Tensor, mask: Tensor, n: int, picker: Picker, drawn: Drawn, *, pad_id: int, static: bool
) -> None:
    """The same with `model.generate`: for caches of fixed size, and for models whose cache cannot be copied."""
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

    ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
    pick: Any = PickProcessor(picker, drawn, ids.shape[1])
    config = GenerationConfig(
        max_new_tokens=drawn.steps,
        do_sample=False,
        num_beams=1,
        # Said explicitly, so that the model's own generation config cannot change the distribution.
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        min_new_tokens=0,
        # -1 is no token: without it the model's own would end completions.
        eos_token_id=drawn.stop_ids.tolist() or [-1],
        pad_token_id=pad_id,
        cache_implementation="static" if static else None,
    )
    model.generate(
        input_ids=ids,
        attention_mask=mask,
        generation_config=config,
        logits_processor=LogitsProcessorList([pick]),
        stopping_criteria=StoppingCriteriaList([pick.finished]),
    )
