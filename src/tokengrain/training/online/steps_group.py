"""Credit steps of phase "advantages" that compare completions of a prompt, and simple ones that come after."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from tokengrain.callables import NonNegative, Positive
from tokengrain.credit.group import Baseline, GroupStatistics, Scale, group_advantages
from tokengrain.errors import RunError
from tokengrain.rollout.mismatch import importance_weights
from tokengrain.training.online.parts import scored
from tokengrain.training.online.step import Phase, RolloutStep, Stateless


def _counted(step: RolloutStep) -> Tensor:
    """The sum of a completion's rewards `[C]`; NaN also for prompts that are not trained on."""
    return torch.where(scored(step), step.total, torch.nan)


class GroupAdvantages(Stateless):
    """The same advantage for all tokens of a completion: its reward against those of its group.

    GRPO, DAPO: scale "group"; Dr. GRPO: "none"; RLOO: baseline "leave_one_out" with scale "none". Token rewards
    count with their sum.

    Args:
        scale, baseline, eps, ddof: see `group_advantages`; scale "batch" divides by the deviation of all rewards of
            the rollout, on all ranks.
    """

    name = "group"
    phase: Phase = "advantages"
    needs_group = True

    def __init__(
        self,
        *,
        scale: Scale = "group",
        baseline: Baseline = "mean",
        eps: NonNegative = 1e-6,
        ddof: Literal[0, 1] = 1,
    ) -> None:
        self.scale, self.baseline, self.eps, self.ddof = scale, baseline, eps, ddof

    def __call__(self, step: RolloutStep) -> None:
        scale: Scale = "none" if self.scale == "batch" else self.scale
        total = _counted(step)
        advantages = group_advantages(
            total, step.group, scale=scale, baseline=self.baseline, eps=self.eps, ddof=self.ddof
        )
        if self.scale == "batch":
            rewards = step.gather(total)
            one = torch.zeros(len(rewards), dtype=torch.long, device=rewards.device)
            advantages = advantages / (GroupStatistics(rewards, one, self.ddof).std + self.eps)
        step.advantages = step.broadcast(advantages)


class Broadcast(Stateless):
    """The reward itself as the advantage of all tokens of a completion; 0 where it could not be scored.

    Args:
        baseline: "batch": minus the mean reward of the rollout, on all ranks; "none": as it is.
    """

    name = "broadcast"
    phase: Phase = "advantages"

    def __init__(self, *, baseline: Literal["none", "batch"] = "none") -> None:
        self.baseline = baseline

    def __call__(self, step: RolloutStep) -> None:
        rewards = _counted(step)
        if self.baseline == "batch":
            rewards = rewards - step.gather(rewards).nanmean()
        step.advantages = step.broadcast(torch.nan_to_num(rewards, nan=0.0))


class Importance(Stateless):
    """Weighs tokens by how much more probable they are to the trainer than to the sampler, truncated.

    Args:
        kind: "token" or "sequence", see `importance_weights`.
        cap: largest weight.
        against: "raw": the sampler's probabilities at temperature 1: corrects for what the engine computes
            differently; "sampling": those that tokens were drawn from: also for temperature, top-k, top-p, min-p.
    """

    name = "importance"
    phase: Phase = "after"
    provides = frozenset({"weights"})

    def __init__(
        self,
        *,
        kind: Literal["token", "sequence"] = "token",
        cap: Positive = 2.0,
        against: Literal["raw", "sampling"] = "raw",
    ) -> None:
        self.kind, self.cap, self.against = kind, cap, against

    def __call__(self, step: RolloutStep) -> None:
        column = f"{self.against}_logps"
        if column not in step.quantities:
            raise RunError(f"credit 'importance': the sampler does not know {column}; expected against: another one")
        old = step.quantity("old_logps")
        weights = importance_weights(step.quantity(column), old, step.segments, kind=self.kind, cap=self.cap)
        step.metrics["importance/mean"] = float(weights.mean())
        step.metrics["importance/capped"] = float((weights >= self.cap * (1 - 1e-6)).to(weights.dtype).mean())
        step.weights = weights if step.weights is None else step.weights * weights


class MaskTruncated(Stateless):
    """DAPO's overlong filtering: truncated completions get advantage 0, as they were cut off and not finished."""

    name = "mask_truncated"
    phase: Phase = "after"

    def __call__(self, step: RolloutStep) -> None:
        if step.advantages is None:
            raise RunError("credit 'mask_truncated' needs advantages; expected a step that sets them")
        step.advantages = torch.where(step.broadcast(step.truncated), 0.0, step.advantages)
