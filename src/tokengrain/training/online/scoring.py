"""What the trainer itself computes about a rollout: old log-probabilities, entropy, reference, values."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from tokengrain.batch import TokenBatch
from tokengrain.scoring import score
from tokengrain.scoring.forward import evaluating
from tokengrain.training.online.step import CriticLike, RolloutStep

OLD_LOGPS = "old_logps"
POLICY = {OLD_LOGPS: "logps", "entropy": "entropy", "hidden": "hidden"}
_PLACE = "place"


def in_parts(
    batch: TokenBatch, max_tokens: int | None, measure: Callable[[TokenBatch], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Measure a batch micro-batch by micro-batch; the values `[N, ...]` in the batch's own order."""
    indexed = batch.with_columns(**{_PLACE: torch.arange(batch.segments.total, device=batch.device)})
    parts = indexed.split(max_tokens)
    found = [measure(part) for part in parts]
    place = torch.cat([part.columns[_PLACE] for part in parts])
    ordered = {}
    for name in found[0]:
        values = torch.cat([f[name] for f in found])
        ordered[name] = torch.empty_like(values)
        ordered[name][place.to(values.device)] = values
    return ordered


class RolloutScorer:
    """Scores rollouts the way the trainer scores its batches: same layout, precision and micro-batches, in
    evaluation mode, without gradient.

    Args:
        model: the policy, without wrappers.
        reference: gives `ref_logps`; None if nothing needs them.
        critic: gives `values`; None if there is none.
        max_tokens: per micro-batch.
        mixed_precision: a context around every forward pass.
        options: passed to `score`.
    """

    def __init__(
        self,
        model: Any,
        reference: Any,
        critic: CriticLike | None,
        *,
        max_tokens: int | None,
        mixed_precision: Callable[[], AbstractContextManager[Any]],
        options: dict[str, Any],
    ) -> None:
        self.model, self.reference, self.critic = model, reference, critic
        self.max_tokens, self.mixed_precision, self.options = max_tokens, mixed_precision, options

    def add(self, step: RolloutStep, names: Collection[str]) -> None:
        """Add those of `names` to the step's columns that it does not have."""
        wanted = set(names) - step.quantities.keys()
        if not wanted or not step.batch.n_completions:
            return

        def measure(part: TokenBatch) -> dict[str, Tensor]:
            return self._policy(part, wanted & POLICY.keys()) | self._others(part, wanted)

        with torch.no_grad():
            step.quantities.update(in_parts(step.batch, self.max_tokens, measure))

    def _policy(self, part: TokenBatch, wanted: set[str]) -> dict[str, Tensor]:
        if not wanted:
            return {}
        with evaluating(self.model), self.mixed_precision():
            scores = score(self.model, part, [POLICY[name] for name in sorted(wanted)], **self.options)
        return {name: getattr(scores, POLICY[name]).detach() for name in sorted(wanted)}

    def _others(self, part: TokenBatch, wanted: set[str]) -> dict[str, Tensor]:
        found = {}
        if "ref_logps" in wanted:
            with self.mixed_precision():
                found["ref_logps"] = self.reference(part, {"logps"}).logps.detach()
        if "values" in wanted:
            assert self.critic is not None  # checked when the trainer was made
            with self.mixed_precision():
                found["values"] = self.critic.values(part).detach()
        return found
