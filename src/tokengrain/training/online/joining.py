"""Taking prompts out of a rollout, and putting rounds of sampling together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tokengrain.training.online.buffer import concatenate
from tokengrain.training.online.step import RolloutStep

_PER_TOKEN = ("token_rewards", "advantages", "weights")


def select_prompts(step: RolloutStep, prompts: Sequence[int]) -> RolloutStep:
    """The rollout of these prompts, with all that is known of them; `keep` is not taken along."""
    own: dict[str, Any] = {name: getattr(step, name) for name in _PER_TOKEN if getattr(step, name) is not None}
    batch = step.batch.with_columns(**{f"_{name}": values for name, values in own.items()}).select(prompts)
    taken: dict[str, Any] = {name: batch.columns.pop(f"_{name}") for name in own}
    completions = torch.cat([(step.group == g).nonzero()[:, 0] for g in prompts])
    return replace(
        step,
        batch=batch,
        rewards=step.rewards[completions],
        by_name={name: values[completions] for name, values in step.by_name.items()},
        correct=None if step.correct is None else step.correct[completions],
        prompt_ids=tuple(step.prompt_ids[g] for g in prompts),
        keep=None,
        **taken,
    )


def merge(steps: Sequence[RolloutStep]) -> RolloutStep:
    """Rounds of the same rollout as one: their prompts one after the other, metrics averaged over rounds."""
    first = steps[0]
    if len(steps) == 1:
        return first
    names = set.intersection(*(set(s.quantities) for s in steps))
    batches = [replace(s.batch, columns={n: s.quantities[n] for n in sorted(names)}) for s in steps]
    metrics: dict[str, list[float]] = {}
    for step in steps:
        for name, value in step.metrics.items():
            metrics.setdefault(name, []).append(value)
    return replace(
        first,
        batch=concatenate(batches),
        rewards=torch.cat([s.rewards for s in steps]),
        by_name={name: torch.cat([s.by_name[name] for s in steps]) for name in first.by_name},
        correct=_joined([s.correct for s in steps]),
        token_rewards=_token_rewards(steps),
        prompt_ids=tuple(p for s in steps for p in s.prompt_ids),
        keep=None if all(s.keep is None for s in steps) else torch.cat([kept(s) for s in steps]),
        metrics={name: sum(values) / len(values) for name, values in metrics.items()},
    )


def kept(step: RolloutStep) -> Tensor:
    """`step.keep`, all True where it is None: bool `[G]`."""
    if step.keep is not None:
        return step.keep
    return torch.ones(step.batch.n_prompts, dtype=torch.bool, device=step.rewards.device)


def _joined(values: Sequence[Tensor | None]) -> Tensor | None:
    known = [v for v in values if v is not None]
    return torch.cat(known) if len(known) == len(values) else None


def _token_rewards(steps: Sequence[RolloutStep]) -> Tensor | None:
    """Per token; where a round has none they are 0."""
    if all(s.token_rewards is None for s in steps):
        return None
    return torch.cat(
        [s.rewards.new_zeros(s.segments.total) if s.token_rewards is None else s.token_rewards for s in steps]
    )
