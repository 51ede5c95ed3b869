"""What a credit source costs and how well it agrees with the truth."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.bench.questions import ON_PAIRS, Question
from tokengrain.evaluation import CreditTruth, calibration, credit_scores, pointing_scores

PART = 64
"""Prompts per call of a source."""


@dataclass
class Passes:
    """Forward passes through the decoders of transformers models: how many, and over how many tokens."""

    calls: int = 0
    tokens: int = 0


@contextmanager
def counted_passes() -> Iterator[Passes]:
    """Count the forward passes of all transformers models while the block runs, whoever calls them."""
    from torch.nn.modules.module import register_module_forward_hook
    from transformers import PreTrainedModel

    found = Passes()

    def count(module: Any, args: tuple[Any, ...], output: Any) -> None:
        # A model with a head calls its base model, and only a base model is its own `base_model`.
        if isinstance(module, PreTrainedModel) and module.base_model is module:
            found.calls += 1
            last = getattr(output, "last_hidden_state", None)
            found.tokens += last.shape[0] * last.shape[1] if last is not None else 0

    handle = register_module_forward_hook(count)
    try:
        yield found
    finally:
        handle.remove()


def credit_of(source: Callable[[TokenBatch], Tensor], batch: TokenBatch, part: int = PART) -> Tensor:
    """Credit of all counted tokens `[N]` on the CPU, `part` prompts at a time."""
    return torch.cat([source(b).detach().float().cpu() for b in parts_of(batch, part)])


def parts_of(batch: TokenBatch, part: int = PART) -> list[TokenBatch]:
    """The batch cut into batches of `part` prompts, in order."""
    return [batch.select(range(i, min(i + part, batch.n_prompts))) for i in range(0, batch.n_prompts, part)]


def credit_and_cost(
    source: Callable[[TokenBatch], Tensor], batch: TokenBatch, part: int = PART
) -> tuple[Tensor, dict[str, float]]:
    """Credit `[N]` of a source, and what it cost.

    Returns:
        The credit, and `seconds` per 1,000 credited tokens, `passes` through a model per call with `part`
        prompts, `reads`, tokens that went through a model per credited token.
    """
    first = batch.select(range(min(part, batch.n_prompts)))
    source(first.select([0]))  # what happens once, such as finding out how to score a model, is not its price
    with counted_passes() as passes:
        source(first)
    start = time.perf_counter()
    credit = credit_of(source, batch, part)
    seconds = time.perf_counter() - start
    return credit, {
        "seconds": 1000 * seconds / batch.segments.total,
        "passes": passes.calls,
        "reads": passes.tokens / first.segments.total,
    }


def measure(
    source: Callable[[TokenBatch], Tensor], truth: CreditTruth, question: Question = ON_PAIRS
) -> tuple[dict[str, Any], Tensor]:
    """One source on one world's completions.

    Returns:
        The numbers of `credit_scores` and `pointing_scores`, `bins` of `calibration` and those of
        `credit_and_cost`; and the credit `[N]`.
    """
    batch, decided = truth.batch, truth.decisions
    credit, cost = credit_and_cost(source, batch)
    found: dict[str, Any] = credit_scores(credit, truth.advantages, decided, batch.segments)
    marked = question.marked(truth.advantages)
    found |= pointing_scores(credit, marked, decided, batch.segments, low=question.low)
    bins = calibration(credit[decided], truth.advantages[decided], batch.segments.ids[decided]).bins
    return found | cost | {"bins": bins}, credit
