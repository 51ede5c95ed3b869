"""Drawing the next token: one stream of uniform numbers per completion, inverse of the cumulative distribution.

A completion's numbers depend on the seed, its row and its place in the group, not on the batch it is computed
in. So the order of prompts, the size of batches and completions that end early do not change the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tokengrain.rollout.base import PromptItem, SamplingConfig, derived_seed, occurrences


def uniforms(prompts: Sequence[PromptItem], n: int, sampling: SamplingConfig) -> Tensor:
    """Uniform numbers in [0, 1), float64 `[P * n, max_new_tokens]`, one row per completion."""
    rows = []
    for prompt, seen in zip(prompts, occurrences(prompts), strict=True):
        for k in range(n):
            generator = torch.Generator().manual_seed(derived_seed(sampling.seed, prompt.row, seen, k))
            rows.append(torch.rand(sampling.max_new_tokens, generator=generator, dtype=torch.float64))
    return torch.stack(rows)


class Picker:
    """Draws tokens and knows their log-probabilities.

    Args:
        sampling: temperature and the rest.
        numbers: what `uniforms` gave, for the completions at hand, `[R, T]`.
        device: the logits' device.
    """

    def __init__(self, sampling: SamplingConfig, numbers: Tensor, device: torch.device) -> None:
        self.sampling = sampling
        # MPS has no float64.
        self.wide = torch.float32 if device.type == "mps" else torch.float64
        self.numbers = numbers.to(device=device, dtype=self.wide)
        self.warpers = _warpers(sampling)

    def __call__(self, logits: Tensor, rows: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """Draw a token for each of B completions.

        Args:
            logits: `[B, V]`.
            rows: which completions these are, long `[B]`.
            step: how many tokens they have so far.

        Returns:
            Tokens, long `[B]`; their log-probabilities under the distribution they were drawn from, `[B]`; and
            under the model's own, `[B]`; nats.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        raw = logits.log_softmax(-1)
        if self.sampling.temperature == 0:
            tokens = logits.argmax(-1)
            drawn = torch.zeros_like(raw[:, 0])
        else:
            used = raw if self.warpers is None else self.warpers(None, logits).log_softmax(-1)
            tokens = self._draw(used, self.numbers[rows, step])
            drawn = used.gather(1, tokens[:, None])[:, 0]
        return tokens, drawn, raw.gather(1, tokens[:, None])[:, 0]

    def _draw(self, logps: Tensor, uniform: Tensor) -> Tensor:
        cumulative = logps.to(self.wide).exp().cumsum(-1)
        total = cumulative[:, -1:]
        # The product may round up to the total, which no token's share lies beyond.
        below = torch.nextafter(total, torch.zeros_like(total))
        point = torch.minimum(uniform[:, None] * total, below)
        # The first cumulative value above the point: never a token of probability 0, which adds nothing.
        return torch.searchsorted(cumulative, point, right=True)[:, 0]


def _warpers(sampling: SamplingConfig) -> Any:
    """transformers' own changes to a distribution; None if there is none."""
    if sampling.is_model or sampling.temperature == 0:
        return None
    from transformers.generation.logits_process import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    warpers = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k > 0:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers
